"""iTPN-B of the released depths, features of CLIP-L/14, 224 px, 800 epochs, as in the authors' code."""

from itpn.tasks.pretraining.recipes import CLIP_L, official_clip_pretraining

config = official_clip_pretraining("itpn_base_3324", CLIP_L, max_epochs=800)
