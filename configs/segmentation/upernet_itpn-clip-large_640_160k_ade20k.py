"""UPerNet of iTPN-L from CLIP supervision, ADE20K, 640 px, 160,000 steps of 8x2 images."""

from itpn.tasks.segmentation.recipes import segmentation

config = segmentation("itpn_large_2240", img_size=640)
