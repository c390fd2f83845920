"""Fast-iTPN-S, ImageNet-1K classification at 384 px, 100 epochs on 8 GPUs."""

from itpn.tasks.classification.recipes import fast_fine_tuning

config = fast_fine_tuning("fast_itpn_small", 384)
