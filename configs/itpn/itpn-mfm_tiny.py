"""iTPN-tiny, pixels and masked feature modelling with an EMA teacher, 96 px."""

from itpn.tasks.pretraining.recipes import masked_feature_modelling, small_pixel_pretraining

config = masked_feature_modelling(
    small_pixel_pretraining("itpn_tiny", decoder=(192, 2, 6), img_size=96, max_epochs=400), head_width=128
)
