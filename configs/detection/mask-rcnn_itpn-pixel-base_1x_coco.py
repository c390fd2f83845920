"""Mask R-CNN of iTPN-B from pixels, COCO, 12 epochs of 16x2 images."""

from itpn.tasks.detection.recipes import detection

config = detection("itpn_base_3324", epochs=12)
