"""iTPN-L, pixel supervision, 1600 epochs of ImageNet-1K on 8 GPUs."""

from itpn.tasks.pretraining.recipes import pixel_pretraining

config = pixel_pretraining("itpn_large", max_epochs=1600)
