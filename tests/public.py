"""Golden files of the public code bases: reading them, and their tensor names in ours."""

import json
import re
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def read_golden(name: str) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """A golden file as {"param": {...}, "input": {...}, "output": {...}, "grad": {...}} and its config."""
    groups: dict[str, dict[str, Tensor]] = {"param": {}, "input": {}, "output": {}, "grad": {}}
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118  (not a mapping)
            group, _, rest = key.partition("/")
            groups[group][rest] = file.get_tensor(key)
        return groups, json.loads(file.metadata()["config"])


def our_names(tensors: dict[str, Tensor], depths: tuple[int, int, int], prefix: str = "") -> dict[str, Tensor]:
    """Rename tensors of either public code base (prefix "backbone." for a bare HiViT)."""
    flat = {}  # the public code numbers blocks and merges in one list
    position = 0
    for stage, depth in enumerate(depths):
        for block in range(depth):
            flat[position] = f"backbone.stages.{stage}.{block}"
            position += 1
        if stage < 2:
            flat[position] = f"backbone.merges.{stage}"
            position += 1
    rules = [
        (r"^neck\.norm\b", "decoder.norm"),  # CLIP supervision: no decoder blocks, a norm and a linear layer
        (r"^norm\b", "decoder.norm"),
        (r"^(head\.cls_head|lm_head)\b", "decoder.heads.feature"),
        (r"^cls_pt_layers", "auxiliary.blocks"),
        (r"^norm_cls\b", "auxiliary.norm"),
        (r"^lm_cls_head\b", "auxiliary.head"),
        (r"^neck\.", ""),
        (r"^(blocks|patch_embed|pos_embed|absolute_pos_embed)", r"backbone.\1"),
        (r"^backbone\.absolute_pos_embed", "backbone.pos_embed"),
        (r"^backbone\.blocks\.(\d+)", lambda m: flat[int(m[1])]),
        (r"^align_dim_16tofpn", "pyramid.top"),
        (r"^align_dim_16to8", "pyramid.laterals.1"),
        (r"^align_dim_8to4", "pyramid.laterals.0"),
        (r"^split_16to8\.reduction", "pyramid.splits.1.expansion"),
        (r"^split_8to4\.reduction", "pyramid.splits.0.expansion"),
        (r"^split_16to8", "pyramid.splits.1"),
        (r"^split_8to4", "pyramid.splits.0"),
        (r"^block_16to8", "pyramid.blocks.1"),
        (r"^block_8to4", "pyramid.blocks.0"),
        (r"^fpn_modules\.(\d)", lambda m: f"pyramid.outputs.{2 - int(m[1])}"),
        (r"^decoder_embed\.(\d)\.0", lambda m: f"decoder.embed_norms.{2 - int(m[1])}"),
        (r"^decoder_embed\.(\d)\.1", lambda m: f"decoder.embeds.{2 - int(m[1])}"),
        (r"^decoder_blocks", "decoder.blocks"),
        (r"^(decoder_norm|ln1)\b", "decoder.norm"),
        (r"^decoder_pred", "decoder.heads.pixel"),
        (r"^decoder_pos_embed", "decoder.pos_embed"),
        (r"^mask_token", "mask_token" if "lm_head.weight" in tensors else "decoder.mask_token"),
        (r"^backbone\.mask_token", "mask_token"),
        (r"gamma_(\d)$", r"ls\1.gamma"),
        (r"(decoder\.blocks\.\d+)\.ln(\d)", r"\1.norm\2"),
        (r"ffn\.layers\.0\.0", "mlp.fc1"),
        (r"ffn\.layers\.1", "mlp.fc2"),
    ]
    renamed = {}
    for name, tensor in tensors.items():
        if name.endswith("relative_position_index"):
            continue  # a constant that we compute
        name = prefix + name
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed
