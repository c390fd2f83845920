"""iTPN-L 2240 from CLIP supervision, ImageNet-1K classification, 50 epochs on 8 GPUs."""

from itpn.tasks.classification.recipes import clip_fine_tuning

config = clip_fine_tuning("itpn_large_2240")
