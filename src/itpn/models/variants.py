"""Constructor arguments of the networks by name. Imports no torch, so that `itpn list` is fast."""

from typing import Any

# blocks per stage as published; an iTPN backbone has no relative position bias in pixel pre-training
# fmt: off
FAST: dict[str, Any] = {
    "mlp_ratios": (3.0, 3.0, 3.0), "qkv_bias": "qv", "patch_norm": False, "merge": "conv", "sub_norm": True,
    "swiglu": True, "layer_scale_stages": (3,),
}
BACKBONES: dict[str, dict[str, Any]] = {
    "hivit_tiny": {"embed_dim": 384, "depths": (2, 2, 10), "num_heads": 6, "rel_pos_bias": True},
    "hivit_small": {"embed_dim": 384, "depths": (4, 4, 20), "num_heads": 6, "rel_pos_bias": True},
    "hivit_base": {"embed_dim": 512, "depths": (4, 4, 24), "num_heads": 8, "rel_pos_bias": True},
    # the depths of the masked autoencoder that HiViT's authors released
    "hivit_base_4420": {"embed_dim": 512, "depths": (4, 4, 20), "num_heads": 8, "rel_pos_bias": True},
    # ours, for tests and demos on a laptop
    "itpn_nano": {"embed_dim": 128, "depths": (1, 1, 4), "num_heads": 4},
    # ours, for small images and small data sets
    "itpn_tiny": {"embed_dim": 192, "depths": (2, 2, 8), "num_heads": 6},
    # mmpretrain's depths
    "itpn_base": {"embed_dim": 512, "depths": (4, 4, 24), "num_heads": 8},
    "itpn_large": {"embed_dim": 768, "depths": (4, 4, 40), "num_heads": 12},
    # the depths of the authors' released weights
    "itpn_base_3324": {"embed_dim": 512, "depths": (3, 3, 24), "num_heads": 8},
    "itpn_large_2240": {"embed_dim": 768, "depths": (2, 2, 40), "num_heads": 12},
    # the authors' 1112, 2220, 3324 and 2240; released weights have layer scale in stage 3 (init_values)
    "fast_itpn_tiny": {"embed_dim": 384, "depths": (1, 1, 12), "num_heads": 6, **FAST},
    "fast_itpn_small": {"embed_dim": 384, "depths": (2, 2, 20), "num_heads": 6, **FAST},
    "fast_itpn_base": {"embed_dim": 512, "depths": (3, 3, 24), "num_heads": 8, **FAST},
    "fast_itpn_large": {"embed_dim": 768, "depths": (2, 2, 40), "num_heads": 12, **FAST},
    # ours, the Fast-iTPN form of itpn_nano
    "fast_itpn_nano": {"embed_dim": 128, "depths": (1, 1, 4), "num_heads": 4, **FAST},
}
# fmt: on

PYRAMIDS: dict[str, dict[str, int]] = {
    "itpn_nano": {"width": 32, "depth": 1},
    "fast_itpn_nano": {"width": 32, "depth": 1},
    "itpn_tiny": {"width": 64, "depth": 2},
}
PUBLISHED_PYRAMID = {"width": 256, "depth": 2}
# name of the network that has backbone and pyramid, by the backbone's name
WITH_PYRAMID = {name: f"{name}_pyramid" for name in BACKBONES if "itpn" in name}
