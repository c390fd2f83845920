"""iTPN-B of the released depths, features of CLIP-B/16, 256 px, 800 epochs, as in the authors' code."""

from itpn.tasks.pretraining.recipes import CLIP_B, official_clip_pretraining

config = official_clip_pretraining("itpn_base_3324", CLIP_B, max_epochs=800, img_size=256)
