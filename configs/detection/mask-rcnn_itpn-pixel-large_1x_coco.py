"""Mask R-CNN of iTPN-L from pixels, COCO, 12 epochs of 16x2 images."""

from itpn.tasks.detection.recipes import detection

config = detection("itpn_large_2240", epochs=12)
