"""iTPN-L from pixel supervision, ImageNet-1K classification, 50 epochs on 8 GPUs."""

from itpn.tasks.classification.recipes import pixel_fine_tuning

config = pixel_fine_tuning("itpn_large")
