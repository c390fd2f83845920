"""Mask R-CNN of iTPN-L from CLIP, COCO, 12 epochs of 16x2 images."""

from itpn.tasks.detection.recipes import clip_detection

config = clip_detection("itpn_large_2240", epochs=12)
