"""Classes of pixels in your own images: any checkpoint, settings for one GPU and a few thousand images."""

from itpn.tasks.segmentation.recipes import small_segmentation

config = small_segmentation()
