"""Whose names a file's tensors have, and what they are called here: one file for each origin."""

import re
from collections.abc import Iterable
from typing import Literal

from itpn.checkpoints.adapters.fast_itpn import FastITPN
from itpn.checkpoints.adapters.itpn import ITPN
from itpn.checkpoints.adapters.mmpretrain import MMPretrain
from itpn.checkpoints.adapters.ours import Ours
from itpn.checkpoints.adapters.renaming import Adapter

Layout = Literal["itpn", "official", "official_fast", "mmpretrain"]
ADAPTERS: dict[Layout, Adapter] = {
    "itpn": Ours(),
    "official": ITPN(),
    "official_fast": FastITPN(),
    "mmpretrain": MMPretrain(),
}


def detect_layout(names: Iterable[str]) -> Layout | None:
    """Whose names these are; None for another network's."""
    names = set(names)
    if any(re.match(r"(backbone\.)?(stages\.0\.0\.mlp|merges\.0)\.", name) for name in names):
        return "itpn"
    if not any(re.match(r"(backbone\.)?blocks\.\d+\.reduction\.", name) for name in names):
        return None
    if any(name.startswith(("backbone.blocks.", "neck.", "head.fc.", "head.cls_head.")) for name in names):
        return "mmpretrain"
    if any(re.match(r"blocks\.\d+\.(attn\.q_proj|mlp\.w1|mlp\.ffn_ln)\.", name) for name in names):
        return "official_fast"
    # a bare HiViT of mmpretrain differs from the original in one name
    return "mmpretrain" if "pos_embed" in names else "official"
