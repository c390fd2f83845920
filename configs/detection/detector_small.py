"""Boxes and masks of your own objects: any checkpoint, settings for one GPU and a few thousand images."""

from itpn.tasks.detection.recipes import small_detection

config = small_detection()
