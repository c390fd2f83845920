"""mmpretrain: ``backbone.``, ``neck.`` and ``head.`` around HiViT's names."""

from typing import Any

from torch import Tensor

from itpn.checkpoints.adapters.itpn import PYRAMID
from itpn.checkpoints.adapters.renaming import IN_BLOCKS, Adapter, Depths, Pairs, Tensors, number_blocks

# fmt: off
IN_DECODER: Pairs = [
    ("ln1", "norm1"), ("ln2", "norm2"), ("ffn.layers.0.0", "mlp.fc1"), ("ffn.layers.1", "mlp.fc2"),
]
# fmt: on


class MMPretrain(Adapter):
    title = "mmpretrain"

    def pairs(self, depths: Depths, features: bool) -> Pairs:
        backbone = [
            *number_blocks(depths),
            ("patch_embed", "backbone.patch_embed"),
            ("pos_embed", "backbone.pos_embed"),
        ]
        decoder = [("norm" if features else "ln1", "decoder.norm"), ("mask_token", "decoder.mask_token")]
        return [
            *((f"backbone.{theirs}", name) for theirs, name in backbone),
            ("backbone.mask_token", "mask_token"),
            *((f"neck.{theirs}", name) for theirs, name in [*PYRAMID, *decoder]),
            ("head.fc", "backbone.head"),  # after the mean, without a norm
            ("head.cls_head", "decoder.heads.feature"),
        ]

    def pairs_inside(self, name: str) -> Pairs:
        return IN_DECODER if name.startswith("decoder.") else IN_BLOCKS

    def to_ours(self, tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if not any(name.startswith("backbone.") for name in tensors):
            tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
        return super().to_ours(tensors)

    def index_names(self, theirs: Tensors) -> list[str]:
        tables = [name for name in theirs if name.endswith("relative_position_bias_table")]
        return [f"{where}.relative_position_index" for where in ("backbone", *(n.rpartition(".")[0] for n in tables))]

    def unshown(self, pyramid: bool, headed: bool) -> tuple[dict[str, Any], list[str]]:
        own: dict[str, Any] = {"pos_resample": "legacy"}
        if not pyramid:
            own["norm_eps"] = 1e-5  # the plain HiViT there
        if headed:
            own["pos_embed"] = "fixed"  # never trained there
        return own, []
