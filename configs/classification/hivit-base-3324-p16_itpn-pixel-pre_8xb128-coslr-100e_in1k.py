"""iTPN-B 3324 from pixel supervision, ImageNet-1K classification, 100 epochs on 8 GPUs."""

from itpn.tasks.classification.recipes import pixel_fine_tuning

config = pixel_fine_tuning("itpn_base_3324")
