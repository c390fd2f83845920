"""iTPN-B, features of CLIP-B/16, 300 epochs of ImageNet-1K on 8 GPUs, as in mmpretrain."""

from itpn.tasks.pretraining.recipes import clip_pretraining

config = clip_pretraining("itpn_base", max_epochs=300)
