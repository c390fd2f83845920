"""UPerNet of iTPN-B from CLIP supervision, ADE20K, 512 px, 160,000 steps of 8x2 images."""

from itpn.tasks.segmentation.recipes import segmentation

config = segmentation("itpn_base_3324")
