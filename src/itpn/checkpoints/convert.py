"""Checkpoints from one code base's form to another's, bit by bit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from timm.layers import to_2tuple
from torch import Tensor

from itpn.checkpoints.adapters import ADAPTERS, Layout, detect_layout
from itpn.checkpoints.contents import HEADLESS, UNSHOWN, Contents
from itpn.checkpoints.files import Checkpoint, read_checkpoint
from itpn.checkpoints.io import save_to, write_safetensors
from itpn.errors import UserError, refusal
from itpn.models.build import backbone_arguments
from itpn.models.heads import heads
from itpn.models.position import Grid
from itpn.system.writing import open_whole

Form = Literal["itpn", "official", "mmpretrain"]
DEFAULTS = {name: backbone_arguments()[name].default for name in UNSHOWN}


@dataclass
class Converted:
    """What was written.

    Attributes:
        form: the layout of the names.
        count: tensors written.
        left: tensors that have no place in the new form.
        unsaid: settings that the new form has no place for and that are not what it is read with; they must be set in
            the code that reads it.
        nonfinite: tensors with NaN or infinite values, and how many.
    """

    form: str
    count: int
    left: list[str]
    unsaid: dict[str, Any]
    nonfinite: dict[str, int]


def convert(source: str | Path, target: Path, form: Form | None = None, num_heads: int | None = None) -> Converted:
    """Write a checkpoint under other names, the numbers unchanged.

    Args:
        target: ``.safetensors`` for ours, with the architecture in the metadata; ``.pth`` or ``.pt`` for the others,
            a dict with ``model`` (official) or ``state_dict`` (mmpretrain) as those code bases save it.
        form: ``itpn`` for a ``.safetensors``, else it must be said; ``official`` is the authors', of Fast-iTPN too.
        num_heads: of stage 3, where the file cannot tell them; kept in our metadata.

    Raises:
        UserError: no such file, a form that does not fit the ending or cannot hold the network (nothing is written
            then), or a target that is no file.
        MachineError: the disk is full, or there is no permission; what stood there before is unchanged.
    """
    form = _choose_form(source, target, form)
    checkpoint = read_checkpoint(source)
    contents = checkpoint.contents.with_num_heads(num_heads)
    layout, grid = _choose_layout(checkpoint, contents, form)
    tensors, left = ADAPTERS[layout].from_ours(checkpoint.tensors, grid)
    left += [name for name in checkpoint.others if not name.endswith("relative_position_index")]
    _check_parts(checkpoint, left, form, contents.pyramid is not None)
    metadata = _metadata(checkpoint, contents) if form == "itpn" else {}
    # before anything is written: a file that would be read as another network is never made
    unsaid = _compare(contents, _read_back(checkpoint, tensors, metadata, form).contents)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if form == "itpn":
            write_safetensors(target, tensors, metadata)
        else:
            tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
            with open_whole(target) as file:
                save_to(file, {"model": tensors} if form == "official" else {"meta": {}, "state_dict": tensors})
    except OSError as error:
        raise refusal(f"{target} cannot be written", error) from error
    return Converted(layout, len(tensors), left, unsaid, checkpoint.nonfinite)


def _choose_form(source: str | Path, target: Path, form: Form | None) -> Form:
    form = form or ("itpn" if target.suffix == ".safetensors" else None)
    if form is None:
        raise UserError(f"say which names {target} gets: --to official or --to mmpretrain")
    endings = (".safetensors",) if form == "itpn" else (".pth", ".pt")
    if target.suffix not in endings:
        raise UserError(f"{target} must end in {' or '.join(endings)} for --to {form}")
    try:
        same = target.exists() and Path(source).exists() and target.samefile(source)
    except OSError as error:  # a name too long, a folder that may not be entered
        raise UserError(f"{target} cannot be written ({error.strerror}): give the path of a file") from error
    if same:
        raise UserError(
            f"{target} is the file that is read: what it holds beside the weights would be lost; give another"
        )
    return form


def _choose_layout(checkpoint: Checkpoint, contents: Contents, form: Form) -> tuple[Layout, Grid | None]:
    """Whose names a form has for a network, and the grid of its relative position tables.

    Raises:
        UserError: the form cannot hold the network.
    """
    backbone, source = contents.backbone, checkpoint.source
    if form == "itpn":
        return form, None
    fast = bool(backbone.get("swiglu") and backbone.get("sub_norm"))
    if fast and form == "mmpretrain":
        raise UserError(f"{source} is a Fast-iTPN, which mmpretrain does not have: convert it --to official")
    if form == "mmpretrain" and any(depth % 2 for depth in backbone["depths"][:2]):
        depths = "+".join(map(str, backbone["depths"]))
        raise UserError(
            f"{source} has {depths} blocks, but mmpretrain builds stages 1 and 2 of pairs: use --to official"
        )
    tables = {
        "img_size": "backbone.pos_embed" in checkpoint.tensors,
        "rel_pos_size": backbone.get("rel_pos_bias") is True,
    }
    for name in [name for name, there in tables.items() if there]:
        _check_square(source, contents, to_2tuple(backbone.get(name) or backbone["img_size"]), form)
    if not backbone.get("rel_pos_bias"):
        return "official_fast" if fast else form, None
    height, width = to_2tuple(backbone.get("rel_pos_size") or backbone["img_size"])
    grid = (height // backbone["patch_size"], width // backbone["patch_size"])
    return "official_fast" if fast else form, grid


def _check_square(source: str, contents: Contents, size: tuple[int, int], form: Form) -> None:
    """Public files hold tables of positions without their height and width, and are read as square."""
    height, width = size
    if height != width:
        patch, known = contents.backbone["patch_size"], heads()
        task = next(name for name in contents.names if name in HEADLESS or (name in known and not known[name].pyramid))
        raise UserError(
            f"{source} has a table of {height // patch}x{width // patch} positions (images of "
            f"{height}x{width} px), but files of the form {form} hold square ones alone: keep this file, or "
            f"resample them first: itpn.save_pretrained of itpn.load(FILE, task={task!r}, "
            f"img_size={max(height, width)})"
        )


def _check_parts(checkpoint: Checkpoint, left: list[str], form: Form, pyramid: bool) -> None:
    """A part of a network goes over whole or not at all: the rest of it would compute something else."""
    parts = {name.partition(".")[0] for name in checkpoint.tensors if name not in left}
    if lost := [name for name in left if name in checkpoint.tensors and name.partition(".")[0] in parts]:
        part = "backbone" if lost[0].startswith(("backbone.", "pyramid.")) or not pyramid else "pyramid"
        raise UserError(
            f"{checkpoint.source} has {', '.join(lost[:2])}, which files of the form {form} have no place for, and "
            "computes something else without them: use another form, or convert what itpn.save_pretrained writes of "
            f"itpn.load(FILE, task={part!r})"
        )


def _read_back(checkpoint: Checkpoint, tensors: dict[str, Tensor], metadata: dict[str, Any], form: Form) -> Checkpoint:
    """What reading the file will give.

    Raises:
        UserError: it will be taken for another network, or other tensors come back.
    """
    layout = detect_layout(tensors)
    ours, others = ({}, {}) if layout is None else ADAPTERS[layout].to_ours(tensors)
    if not ours or not all(
        name in checkpoint.tensors and _same(t, checkpoint.tensors[name]) for name, t in ours.items()
    ):
        raise UserError(f"{checkpoint.source} cannot be held by a file of the form {form}: use another form")
    return Checkpoint(checkpoint.source, layout or "itpn", ours, others, metadata)


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit by bit: NaN is NaN."""
    bits = [t.contiguous().flatten().view(torch.uint8) for t in (one, other)]
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(*bits)


def _compare(contents: Contents, written: Contents) -> dict[str, Any]:
    """Settings of the backbone that are not read back from what is written."""
    before, after = {**DEFAULTS, **contents.backbone}, {**DEFAULTS, **written.backbone}
    idle = [
        *(["migrate_from"] if not before["migrate_ratio"] else []),
        *(["gather_side"] if not before["gather_window"] else []),
    ]
    return {name: before[name] for name in DEFAULTS if before[name] != after[name] and name not in idle}


def _metadata(checkpoint: Checkpoint, contents: Contents) -> dict[str, Any]:
    """Of our file: what one of ours says already, else the network and where it came from."""
    kept = ("task", "recipe", "settings", "preprocessing", "classes", "colours", "source")
    metadata = {name: checkpoint.metadata[name] for name in kept if name in checkpoint.metadata}
    source = {"layout": checkpoint.layout, "file": Path(checkpoint.source).name}
    own: dict[str, Any] = {} if checkpoint.settings else {"task": contents.names[0], "source": source}
    if checkpoint.preprocessing:
        own["preprocessing"] = checkpoint.preprocessing
    guessed = {"guessed": contents.guessed} if contents.guessed else {}
    return {**own, **metadata, **guessed, "network": contents.spec(contents.names[0]).to_dict()}
