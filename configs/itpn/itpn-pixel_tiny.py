"""iTPN-tiny, pixel supervision, 96 px: small images, one GPU or a patient CPU."""

from itpn.tasks.pretraining.recipes import small_pixel_pretraining

config = small_pixel_pretraining("itpn_tiny", decoder=(192, 2, 6), img_size=96, max_epochs=400)
