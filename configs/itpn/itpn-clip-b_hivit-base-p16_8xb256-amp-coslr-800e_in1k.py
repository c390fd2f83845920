"""iTPN-B, features of CLIP-B/16, 800 epochs of ImageNet-1K on 8 GPUs, as in mmpretrain."""

from itpn.tasks.pretraining.recipes import clip_pretraining

# mmpretrain names cross entropy here, almost surely by a slip: --model.feature-loss cross_entropy repeats it
config = clip_pretraining("itpn_base", max_epochs=800)
