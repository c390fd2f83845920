"""Mask R-CNN of iTPN-B from CLIP, COCO, 36 epochs of 16x2 images."""

from itpn.tasks.detection.recipes import clip_detection

config = clip_detection("itpn_base_3324", epochs=36)
