"""The authors' iTPN: HiViT's names, the pyramid's, and those of the decoders for pixels or for CLIP's features."""

from typing import Any

from torch import Tensor

from itpn.checkpoints.adapters.hivit import backbone_pairs
from itpn.checkpoints.adapters.renaming import (
    IN_BLOCKS,
    Depths,
    Pairs,
    Tensors,
    predicts_features,
    read_depths,
    read_our_depths,
    rename_from_ours,
    rename_to_ours,
)
from itpn.models.position import Grid, relative_position_index

TITLE = "the authors' code (iTPN, HiViT)"

# fmt: off
PYRAMID: Pairs = [
    ("align_dim_16tofpn", "pyramid.top"),
    ("align_dim_16to8", "pyramid.laterals.1"), ("align_dim_8to4", "pyramid.laterals.0"),
    ("split_16to8.reduction", "pyramid.splits.1.expansion"), ("split_8to4.reduction", "pyramid.splits.0.expansion"),
    ("split_16to8", "pyramid.splits.1"), ("split_8to4", "pyramid.splits.0"),
    ("block_16to8", "pyramid.blocks.1"), ("block_8to4", "pyramid.blocks.0"),
    *((f"fpn_modules.{i}", f"pyramid.outputs.{2 - i}") for i in range(3)),
    *((f"decoder_embed.{i}.0", f"decoder.embed_norms.{2 - i}") for i in range(3)),
    *((f"decoder_embed.{i}.1", f"decoder.embeds.{2 - i}") for i in range(3)),
    ("decoder_blocks", "decoder.blocks"), ("decoder_pred", "decoder.heads.pixel"),
    ("decoder_pos_embed", "decoder.pos_embed"),
]
FEATURE_HEADS: Pairs = [  # of CLIP supervision
    ("mask_token", "mask_token"), ("norm", "decoder.norm"), ("lm_head", "decoder.heads.feature"),
    ("cls_pt_layers", "auxiliary.blocks"), ("norm_cls", "auxiliary.norm"), ("lm_cls_head", "auxiliary.head"),
]
PIXEL_HEADS: Pairs = [("mask_token", "decoder.mask_token"), ("decoder_norm", "decoder.norm")]
# fmt: on


def name_pairs(depths: Depths, features: bool, position: str = "absolute_pos_embed") -> Pairs:
    """Prefixes, theirs and ours.

    Args:
        features: of a model that predicts a teacher's features, not pixels.
        position: their name of the position table.
    """
    return [*backbone_pairs(depths, position), *PYRAMID, *(FEATURE_HEADS if features else PIXEL_HEADS)]


def to_ours(tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    pairs = name_pairs(read_depths(tensors), predicts_features(tensors))
    return rename_to_ours(tensors, pairs, lambda _: IN_BLOCKS)


def from_ours(tensors: Tensors, rel_pos_grid: Grid | None = None) -> tuple[dict[str, Tensor], list[str]]:
    features = any(name.startswith("decoder.heads.feature") for name in tensors)
    pairs = name_pairs(read_our_depths(tensors), features)
    theirs, left = rename_from_ours(tensors, pairs, lambda _: IN_BLOCKS)
    if rel_pos_grid is not None:
        theirs["relative_position_index"] = relative_position_index(rel_pos_grid)
    return theirs, left


def complete(network: Any) -> None:
    """Set what the authors' code does and no tensor shows."""
    network.backbone["pos_resample"] = "legacy"
    set_auxiliary_norm(network)
    if network.pyramid is not None and network.decoder is None:
        network.backbone["norm_eps"] = 1e-5
        network.guessed.append("norm_eps=1e-5 (as the authors' detectors and segmenters have)")


def set_auxiliary_norm(network: Any) -> None:
    """The public auxiliary heads have another eps in their blocks than ours."""
    for options in network.heads.values():
        if options.get("auxiliary"):
            options["auxiliary"]["block_norm_eps"] = 1e-5
