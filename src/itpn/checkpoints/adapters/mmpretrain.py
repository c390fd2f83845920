"""mmpretrain: ``backbone.``, ``neck.`` and ``head.`` around HiViT's names."""

from typing import Any

from torch import Tensor

from itpn.checkpoints.adapters.itpn import PYRAMID
from itpn.checkpoints.adapters.renaming import (
    IN_BLOCKS,
    Depths,
    Pairs,
    Tensors,
    number_blocks,
    predicts_features,
    read_depths,
    read_our_depths,
    rename_from_ours,
    rename_to_ours,
)
from itpn.models.position import Grid, relative_position_index

TITLE = "mmpretrain"
# fmt: off
IN_DECODER: Pairs = [
    ("ln1", "norm1"), ("ln2", "norm2"), ("ffn.layers.0.0", "mlp.fc1"), ("ffn.layers.1", "mlp.fc2"),
]
# fmt: on


def name_pairs(depths: Depths, features: bool) -> Pairs:
    """Prefixes, theirs and ours.

    Args:
        features: of a model that predicts a teacher's features, not pixels.
    """
    backbone = [*number_blocks(depths), ("patch_embed", "backbone.patch_embed"), ("pos_embed", "backbone.pos_embed")]
    norm = "norm" if features else "ln1"
    decoder = [(norm, "decoder.norm"), ("mask_token", "decoder.mask_token")]
    return [
        *((f"backbone.{theirs}", name) for theirs, name in backbone),
        ("backbone.mask_token", "mask_token"),
        *((f"neck.{theirs}", name) for theirs, name in [*PYRAMID, *decoder]),
        ("head.fc", "backbone.head"),  # after the mean, without a norm
        ("head.cls_head", "decoder.heads.feature"),
    ]


def to_ours(tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    depths, features = read_depths(tensors), predicts_features(tensors)
    if not any(name.startswith("backbone.") for name in tensors):
        tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    return rename_to_ours(tensors, name_pairs(depths, features), _inside)


def from_ours(tensors: Tensors, rel_pos_grid: Grid | None = None) -> tuple[dict[str, Tensor], list[str]]:
    features = any(name.startswith("decoder.heads.feature") for name in tensors)
    theirs, left = rename_from_ours(tensors, name_pairs(read_our_depths(tensors), features), _inside)
    if rel_pos_grid is not None:
        index = relative_position_index(rel_pos_grid)
        theirs["backbone.relative_position_index"] = index
        attention = {name.rpartition(".")[0] for name in theirs if name.endswith("relative_position_bias_table")}
        theirs |= {f"{name}.relative_position_index": index.clone() for name in attention}
    return theirs, left


def _inside(name: str) -> Pairs:
    return IN_DECODER if name.startswith("decoder.") else IN_BLOCKS


def complete(network: Any) -> None:
    """Set what mmpretrain does and no tensor shows."""
    network.backbone["pos_resample"] = "legacy"
    if network.pyramid is None:
        network.backbone["norm_eps"] = 1e-5  # the plain HiViT there
    for options in network.heads.values():
        if options.get("decoder"):
            options["decoder"]["embed_norm_eps"] = 1e-5
            network.backbone["pos_embed"] = "fixed"  # never trained there
            if options["objective"].pop("feature_patches", None):
                options["objective"]["feature_loss"] = "cosine"
