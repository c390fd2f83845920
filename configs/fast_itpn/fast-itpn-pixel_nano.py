"""Fast-iTPN-nano, pixel supervision, 64 px: minutes on a laptop. Our settings, those of itpn-pixel_nano."""

from itpn.tasks.pretraining.recipes import small_pixel_pretraining

config = small_pixel_pretraining("fast_itpn_nano", decoder=(128, 2, 4), img_size=64, max_epochs=100)
