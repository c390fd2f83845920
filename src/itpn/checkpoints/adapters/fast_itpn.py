"""The authors' Fast-iTPN: stages 1 and 2 as convolutions, separate projections of queries, keys and values."""

import re
from typing import Any

import torch
from torch import Tensor

from itpn.checkpoints.adapters.itpn import ITPN
from itpn.checkpoints.adapters.renaming import IN_BLOCKS, Pairs, Tensors
from itpn.models.position import Grid


class FastITPN(ITPN):
    title = "the authors' code (Fast-iTPN)"
    position = "pos_embed"

    def pairs_inside(self, name: str) -> Pairs:
        return [*IN_BLOCKS, ("mlp.ffn_ln", "mlp.norm")]

    def unshown(self, pyramid: bool, headed: bool) -> tuple[dict[str, Any], list[str]]:
        return {}, []

    def skip(self, tensors: Tensors) -> tuple[str, ...]:
        top = tensors.get("align_dim_16tofpn.weight")
        # the pre-trained weights have a pyramid of convolutions, whose code was never published
        return ("pyramid.", "decoder.", "mask_token") if top is not None and top.dim() == 4 else ()

    def to_ours(self, tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        ours, others = super().to_ours(tensors)
        return _fuse(ours), others

    def from_ours(self, tensors: Tensors, rel_pos_grid: Grid | None = None) -> tuple[dict[str, Tensor], list[str]]:
        return super().from_ours(_split(tensors), rel_pos_grid)


def _fuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fast-iTPN's tensors under our names, to ours: 1x1 and 2x2 convolutions to products, projections side by side."""
    fused = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if re.search(r"attn\.[kv]_proj$|mlp\.w2$", stem):
            continue  # with its first part
        if stem.endswith("attn.q_proj"):
            parts = [tensors.get(f"{stem.removesuffix('q_proj')}{part}_proj.{last}") for part in "qkv"]
            name, tensor = f"{stem.removesuffix('q_proj')}qkv.{last}", _cat(name, parts)
        elif stem.endswith("mlp.w1"):
            parts = [tensor, tensors.get(f"{stem.removesuffix('w1')}w2.{last}")]
            name, tensor = f"{stem.removesuffix('w1')}fc1.{last}", _cat(name, parts)
        elif stem.endswith("mlp.w3"):
            name = f"{stem.removesuffix('w3')}fc2.{last}"
        elif tensor.dim() == 4 and ".mlp.fc" in name:
            tensor = tensor.flatten(1)
        elif tensor.dim() == 4 and name.endswith("reduction.weight"):
            tensor = tensor.permute(0, 3, 2, 1).flatten(1)  # [O, C, row, col] -> column by column, as tokens merge
        fused[name] = tensor
    return fused


def _cat(name: str, parts: list[Tensor | None]) -> Tensor:
    whole = [part for part in parts if part is not None]
    if len(whole) < len(parts):
        raise ValueError(f"a part that belongs to {name} is missing")
    return torch.cat(whole)


def _split(tensors: Tensors) -> dict[str, Tensor]:
    """Undo :func:`_fuse`."""
    parts: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if name.startswith("backbone.stages.2.") and stem.endswith("attn.qkv"):
            stem = stem.removesuffix("qkv")
            parts |= {f"{stem}{p}_proj.{last}": t for p, t in zip("qkv", tensor.chunk(3), strict=True)}
        elif name.startswith("backbone.stages.2.") and stem.endswith("mlp.fc1"):
            stem = stem.removesuffix("fc1")
            parts |= {f"{stem}w{p}.{last}": t for p, t in zip("12", tensor.chunk(2), strict=True)}
        elif name.startswith("backbone.stages.2.") and stem.endswith("mlp.fc2"):
            parts[f"{stem.removesuffix('fc2')}w3.{last}"] = tensor
        elif name.startswith("backbone.stages.") and re.search(r"mlp\.fc[12]\.weight$", name):
            parts[name] = tensor[:, :, None, None]
        elif name.startswith("backbone.merges.") and name.endswith("reduction.weight"):
            parts[name] = tensor.unflatten(1, (2, 2, -1)).permute(0, 3, 2, 1)
        else:
            parts[name] = tensor
    return parts
