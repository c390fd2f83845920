"""iTPN-B, pixel supervision, 800 epochs of ImageNet-1K on 8 GPUs."""

from itpn.tasks.pretraining.recipes import pixel_pretraining

config = pixel_pretraining("itpn_base", max_epochs=800)
