"""iTPN-B, pixels and masked feature modelling with an EMA teacher, 800 epochs of ImageNet-1K on 8 GPUs."""

from itpn.tasks.pretraining.recipes import masked_feature_modelling, pixel_pretraining

config = masked_feature_modelling(pixel_pretraining("itpn_base", max_epochs=800), head_width=256)
