"""Checkpoints from one code base's form to another's, bit by bit."""

import inspect
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from itpn.checkpoints.architecture import UNSHOWN, read_architecture
from itpn.checkpoints.files import Checkpoint, describe_preprocessing, read_checkpoint, write_safetensors, write_whole
from itpn.errors import UserError, refusal
from itpn.models.hivit import HiViT
from itpn.models.naming import Layout, from_ours

Form = Literal["itpn", "official", "mmpretrain"]
FORMS: tuple[Form, ...] = ("itpn", "official", "mmpretrain")
DEFAULTS = {name: inspect.signature(HiViT).parameters[name].default for name in UNSHOWN}


@dataclass
class Converted:
    """What was written.

    Attributes:
        form: the layout of the names.
        count: tensors written.
        left: tensors that have no place in the new form.
        unsaid: settings that the new form has no place for and that are not what it is read with; they must be set in
            the code that reads it.
        broken: tensors with NaN or infinite numbers, and how many.
    """

    form: str
    count: int
    left: list[str]
    unsaid: dict[str, Any]
    broken: dict[str, int]


def convert(source: str | Path, target: Path, form: Form | None = None, num_heads: int | None = None) -> Converted:
    """Write a checkpoint under other names, the numbers unchanged.

    Args:
        target: ``.safetensors`` for ours, with the architecture in the metadata; ``.pth`` or ``.pt`` for the others,
            a dict with ``model`` (official) or ``state_dict`` (mmpretrain) as those code bases save it.
        form: ``itpn`` for a ``.safetensors``, else it must be said; ``official`` is the authors', of Fast-iTPN too.

        num_heads: of stage 3, where the file cannot tell them; kept in our metadata.

    Raises:
        UserError: no such file, a form that does not fit the ending or the network, or nowhere to write.
    """
    form = form or ("itpn" if target.suffix == ".safetensors" else None)
    if form is None:
        raise UserError(f"say which names {target} gets: --to official or --to mmpretrain")
    if (form == "itpn") != (target.suffix == ".safetensors") or target.suffix not in (".safetensors", ".pth", ".pt"):
        wanted = ".safetensors" if form == "itpn" else ".pth or .pt"
        raise UserError(f"{target} must end in {wanted} for --to {form}")
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise UserError(
            f"{target} is the file that is read: what it holds beside the weights would be lost; give another"
        )
    found = read_checkpoint(source)
    tensors, left, layout = _rename(found, form)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if form == "itpn":
            write_safetensors(target, tensors, _metadata(found, num_heads))
        else:
            buffer = io.BytesIO()
            tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
            wrapped: dict[str, Any] = {"model": tensors} if form == "official" else {"meta": {}, "state_dict": tensors}
            torch.save(wrapped, buffer)
            write_whole(target, buffer.getvalue())
    except OSError as error:
        raise refusal(f"{target} cannot be written", error) from error
    return Converted(layout, len(tensors), left, _unsaid(found, target, num_heads), found.broken)


def _unsaid(found: Checkpoint, target: Path, num_heads: int | None) -> dict[str, Any]:
    """Settings of the backbone that are not read back from what was written."""
    before = {**DEFAULTS, **read_architecture(found, num_heads).backbone}
    after = {**DEFAULTS, **read_architecture(read_checkpoint(target)).backbone}
    idle = [
        *(["migrate_from"] if not before["migrate_ratio"] else []),
        *(["gather_side"] if not before["gather_window"] else []),
    ]
    return {name: before[name] for name in DEFAULTS if before[name] != after[name] and name not in idle}


def _rename(found: Checkpoint, form: Form) -> tuple[dict[str, Tensor], list[str], str]:
    """Tensors under the names of a form, what is left out, and the layout's name."""
    others = [name for name in found.others if not name.endswith("relative_position_index")]
    if form == "itpn":
        return found.tensors, others, form
    backbone = read_architecture(found).backbone
    fast = backbone["swiglu"] and backbone["sub_norm"]
    if fast and form == "mmpretrain":
        raise UserError(f"{found.source} is a Fast-iTPN, which mmpretrain does not have: convert it --to official")
    if form == "mmpretrain" and any(depth % 2 for depth in backbone["depths"][:2]):
        depths = "+".join(map(str, backbone["depths"]))
        raise UserError(
            f"{found.source} has {depths} blocks, but mmpretrain builds stages 1 and 2 of pairs: use --to official"
        )
    grid = None
    if backbone.get("rel_pos_bias"):
        size = backbone.get("rel_pos_size") or backbone["img_size"]
        height, width = size if isinstance(size, list | tuple) else (size, size)
        grid = (height // backbone["patch_size"], width // backbone["patch_size"])
    layout: Layout = "official_fast" if fast else form
    tensors, left = from_ours(found.tensors, layout, grid)
    return tensors, left + others, layout


def _metadata(found: Checkpoint, num_heads: int | None) -> dict[str, Any]:
    """Of our file: what one of ours says already, else the architecture and where it came from."""
    kept = ("task", "recipe", "config", "preprocessing", "classes", "source")
    metadata = {name: found.metadata[name] for name in kept if name in found.metadata}
    if found.config is not None:
        return {"preprocessing": describe_preprocessing(found.config), **metadata}
    architecture = read_architecture(found, num_heads)
    source = {"layout": found.layout, "file": Path(found.source).name}
    return {"task": architecture.tasks[0], "source": source, **metadata, "architecture": architecture.to_dict()}
