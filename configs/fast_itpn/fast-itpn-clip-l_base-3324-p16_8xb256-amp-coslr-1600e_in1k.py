"""Fast-iTPN-B, features of CLIP-L/14, 1600 epochs of ImageNet-1K on 8 GPUs.

Fast-iTPN's pre-training was never published: these are our settings, see fast_clip_pretraining.
"""

from itpn.tasks.pretraining.recipes import fast_clip_pretraining

config = fast_clip_pretraining("fast_itpn_base")
