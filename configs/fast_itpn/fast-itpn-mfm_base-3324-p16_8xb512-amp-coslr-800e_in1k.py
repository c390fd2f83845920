"""Fast-iTPN-B, pixels and masked feature modelling with an EMA teacher, 800 epochs of ImageNet-1K on 8 GPUs.

Fast-iTPN's pre-training was never published: these are our settings, those of iTPN with Fast-iTPN's layer scale.
"""

from itpn.tasks.pretraining.recipes import masked_feature_modelling, pixel_pretraining, with_layer_scale

config = with_layer_scale(masked_feature_modelling(pixel_pretraining("fast_itpn_base", max_epochs=800), head_width=256))
