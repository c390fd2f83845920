"""The original HiViT (Zhang et al. 2023): the names of its backbone and classifier, which iTPN's authors kept."""

from itpn.checkpoints.adapters.renaming import Depths, Pairs, number_blocks
from itpn.models.backbone import CLASSIFIER


def backbone_pairs(depths: Depths, position: str = "absolute_pos_embed") -> Pairs:
    """Prefixes, theirs and ours."""
    return [
        *number_blocks(depths),
        ("patch_embed", "backbone.patch_embed"),
        (position, "backbone.pos_embed"),
        *((own.strip(".").removeprefix("backbone."), own.strip(".")) for own in CLASSIFIER),
    ]
