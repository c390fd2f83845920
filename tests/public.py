"""Golden files of the public code bases: reading them, and their tensor names in ours."""

import json
from argparse import Namespace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from itpn.checkpoints.adapters import ADAPTERS, detect_layout

GOLDEN = Path(__file__).parent / "golden"


def read_golden(name: str) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """A golden file as {"param": {...}, "input": {...}, "output": {...}, "grad": {...}} and its config."""
    groups: dict[str, dict[str, Tensor]] = {"param": {}, "input": {}, "output": {}, "grad": {}}
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118  (not a mapping)
            group, _, rest = key.partition("/")
            groups[group][rest] = file.get_tensor(key)
        return groups, json.loads(file.metadata()["config"])


def our_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of any golden file under our names."""
    layout = detect_layout(tensors)
    assert layout is not None
    return ADAPTERS[layout].to_ours(tensors)[0]


def save_public(folder: Path, case: str, key: str = "model") -> Path:
    """A golden file's parameters as the public code saves them, names untouched."""
    path = folder / f"{case}.pth"
    torch.save({key: read_golden(case)[0]["param"], "epoch": 7, "args": Namespace(lr=1e-3)}, path)
    return path
