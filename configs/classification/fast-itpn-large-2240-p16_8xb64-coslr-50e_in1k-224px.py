"""Fast-iTPN-L, ImageNet-1K classification at 224 px, 50 epochs on 8 GPUs."""

from itpn.tasks.classification.recipes import fast_fine_tuning

config = fast_fine_tuning("fast_itpn_large", 224)
