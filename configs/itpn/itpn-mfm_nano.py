"""iTPN-nano, pixels and masked feature modelling with an EMA teacher, 64 px."""

from itpn.tasks.pretraining.recipes import masked_feature_modelling, small_pixel_pretraining

config = masked_feature_modelling(
    small_pixel_pretraining("itpn_nano", decoder=(128, 2, 4), img_size=64, max_epochs=100), head_width=64
)
