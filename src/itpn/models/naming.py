"""Tensor names of the public code bases and ours, in both directions.

Three families of names are around: the authors' (``official``, which the original HiViT shares), the authors' for
Fast-iTPN (``official_fast``: stages 1 and 2 as convolutions, separate projections), and mmpretrain's. A rename is a
change of prefix, so a table serves both directions; what Fast-iTPN keeps in several tensors, we keep in one.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from itpn.models.position import relative_position_index

Layout = Literal["itpn", "official", "official_fast", "mmpretrain"]
Pairs = list[tuple[str, str]]  # theirs, ours

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
CLASSIFIER: Pairs = [("fc_norm", "backbone.fc_norm"), ("head", "backbone.head")]
FEATURE_HEADS: Pairs = [  # of CLIP supervision, in the authors' code
    ("mask_token", "mask_token"), ("norm", "decoder.norm"), ("lm_head", "decoder.heads.feature"),
    ("cls_pt_layers", "auxiliary.blocks"), ("norm_cls", "auxiliary.norm"), ("lm_cls_head", "auxiliary.head"),
]
PIXEL_HEADS: Pairs = [("mask_token", "decoder.mask_token"), ("decoder_norm", "decoder.norm")]
IN_BLOCKS: Pairs = [("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")]
IN_FAST_BLOCKS: Pairs = [*IN_BLOCKS, ("mlp.ffn_ln", "mlp.norm")]
IN_MMPRETRAIN_DECODER: Pairs = [
    ("ln1", "norm1"), ("ln2", "norm2"), ("ffn.layers.0.0", "mlp.fc1"), ("ffn.layers.1", "mlp.fc2"),
]
# fmt: on


def detect_layout(names: Iterable[str]) -> Layout | None:
    """Which family of names these are; None for another network's."""
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


def read_depths(names: Iterable[str], layout: Layout) -> tuple[int, int, int]:
    """Blocks per stage. ValueError where they cannot be told."""
    names = list(names)
    if layout == "itpn":
        found = [re.match(r"(?:backbone\.)?stages\.(\d)\.(\d+)\.", name) for name in names]
        blocks = {(int(m[1]), int(m[2])) for m in found if m}
        return tuple(1 + max((b for s, b in blocks if s == stage), default=-1) for stage in range(3))  # type: ignore[return-value]
    numbered = [m for name in names if (m := re.match(r"(?:backbone\.)?blocks\.(\d+)\.(.*)", name))]
    merges = sorted({int(m[1]) for m in numbered if m[2].startswith("reduction")})
    if len(merges) != 2:
        raise ValueError(f"two merges between three stages expected, found {len(merges)}")
    last = max(int(m[1]) for m in numbered)
    return merges[0], merges[1] - merges[0] - 1, last - merges[1]


def name_pairs(layout: Layout, depths: tuple[int, int, int], features: bool) -> Pairs:
    """Prefixes, theirs and ours.

    Args:
        features: of a model that predicts a teacher's features, not pixels.
    """
    ours = [f"backbone.stages.0.{i}" for i in range(depths[0])] + ["backbone.merges.0"]
    ours += [f"backbone.stages.1.{i}" for i in range(depths[1])] + ["backbone.merges.1"]
    ours += [f"backbone.stages.2.{i}" for i in range(depths[2])]
    patch = ("patch_embed", "backbone.patch_embed")
    blocks = [(f"blocks.{number}", name) for number, name in enumerate(ours)]  # blocks and merges in one list
    if layout == "mmpretrain":
        decoder = [("ln1", "decoder.norm"), ("mask_token", "decoder.mask_token")]
        if features:
            decoder = [("norm", "decoder.norm"), ("mask_token", "decoder.mask_token")]
        return [
            *((f"backbone.{theirs}", name) for theirs, name in [*blocks, patch, ("pos_embed", "backbone.pos_embed")]),
            ("backbone.mask_token", "mask_token"),
            *((f"neck.{theirs}", name) for theirs, name in [*PYRAMID, *decoder]),
            ("head.fc", "backbone.head"),  # after the mean, without a norm
            ("head.cls_head", "decoder.heads.feature"),
        ]
    position = "pos_embed" if layout == "official_fast" else "absolute_pos_embed"
    heads = FEATURE_HEADS if features else PIXEL_HEADS
    return [*blocks, patch, (position, "backbone.pos_embed"), *CLASSIFIER, *PYRAMID, *heads]


def to_ours(tensors: Mapping[str, Tensor], layout: Layout) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rename a public file's tensors to ours.

    Returns:
        Our tensors, with the prefixes ``backbone.``, ``pyramid.``, ``decoder.``, ``auxiliary.`` and the mask token
        (our own names without a prefix are taken for a backbone's); and what has no place in our networks, under its
        own name.

    Raises:
        ValueError: the blocks are not those of three stages.
    """
    if layout == "itpn":
        bare = not any(name.startswith("backbone.") for name in tensors)
        return {f"backbone.{name}" if bare else name: tensor for name, tensor in tensors.items()}, {}
    tensors = dict(tensors)
    depths = read_depths(tensors, layout)
    if layout == "mmpretrain" and not any(name.startswith("backbone.") for name in tensors):
        tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    features = any(name.endswith(("lm_head.weight", "cls_head.weight")) for name in tensors)
    pairs = name_pairs(layout, depths, features)
    top = tensors.get("align_dim_16tofpn.weight")
    # Fast-iTPN's pre-trained weights have a pyramid of convolutions, whose code was never published
    unknown = ("pyramid.", "decoder.", "mask_token") if top is not None and top.dim() == 4 else ()
    ours, others = {}, {}
    for name, tensor in tensors.items():
        renamed = _rename(name, pairs, "ours")
        if renamed is None or name.endswith("relative_position_index") or renamed.startswith(unknown):
            others[name] = tensor
            continue
        ours[_rename_inside(renamed, layout, "ours")] = tensor
    return (_fuse(ours) if layout == "official_fast" else ours), others


def from_ours(
    tensors: Mapping[str, Tensor], layout: Layout, rel_pos_grid: tuple[int, int] | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """Rename our tensors to a public layout's; undoes :func:`to_ours` bit by bit.

    Args:
        rel_pos_grid: rows and columns of the relative position tables, whose index the public files hold as well.

    Returns:
        Their tensors, and our names that have no place there.
    """
    depths = read_depths(tensors, "itpn")
    features = any(name.startswith("decoder.heads.feature") for name in tensors)
    pairs = name_pairs(layout, depths, features)
    theirs, left = {}, []
    for name, tensor in (_split(tensors) if layout == "official_fast" else tensors).items():
        renamed = _rename(_rename_inside(name, layout, "theirs"), pairs, "theirs")
        if renamed is None:
            left.append(name)
        else:
            theirs[renamed] = tensor
    if rel_pos_grid is not None:
        index = relative_position_index(rel_pos_grid)
        prefix = "backbone." if layout == "mmpretrain" else ""
        theirs[f"{prefix}relative_position_index"] = index
        if layout == "mmpretrain":
            attention = {name.rpartition(".")[0] for name in theirs if name.endswith("relative_position_bias_table")}
            theirs |= {f"{name}.relative_position_index": index.clone() for name in attention}
    return theirs, left


def _rename(name: str, pairs: Pairs, to: Literal["ours", "theirs"]) -> str | None:
    for theirs, ours in pairs:
        old, new = (theirs, ours) if to == "ours" else (ours, theirs)
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    return None


def _rename_inside(name: str, layout: Layout, to: Literal["ours", "theirs"]) -> str:
    """Names below a block, of a tensor whose prefix is ours."""
    found = re.match(r"((?:backbone\.stages\.\d|auxiliary\.blocks|decoder\.blocks|pyramid\.\w+\.\d)\.\d+)\.(.*)", name)
    if not found:
        return name
    pairs = IN_FAST_BLOCKS if layout == "official_fast" else IN_BLOCKS
    if layout == "mmpretrain" and name.startswith("decoder."):
        pairs = IN_MMPRETRAIN_DECODER
    renamed = _rename(found[2], pairs, to)
    return name if renamed is None else f"{found[1]}.{renamed}"


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


def _split(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
