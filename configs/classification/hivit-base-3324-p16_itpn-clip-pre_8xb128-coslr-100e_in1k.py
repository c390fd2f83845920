"""iTPN-B 3324 from CLIP supervision, ImageNet-1K classification, 100 epochs on 8 GPUs."""

from itpn.tasks.classification.recipes import clip_fine_tuning

config = clip_fine_tuning("itpn_base_3324")
