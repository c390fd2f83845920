"""From a file to a network: loading one, and starting a run from one."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from itpn.checkpoints.architecture import (
    TASKS,
    Task,
    build,
    count_blocks,
    find_variant,
    read_architecture,
    read_backbone,
    read_pyramid,
)
from itpn.checkpoints.diagnosis import fit
from itpn.checkpoints.files import Checkpoint, read_checkpoint
from itpn.config import Config, image_size, override_model
from itpn.errors import UserError
from itpn.masked.build import build_masked_model
from itpn.masked.masked_model import MaskedImageModel
from itpn.models.hivit import HiViT, find_backbone
from itpn.models.position import Grid
from itpn.models.pyramid import PyramidBackbone
from itpn.models.variants import PUBLISHED_PYRAMID, PYRAMIDS


def load(
    checkpoint: str | Path, task: Task | None = None, strict: bool = True, average: bool = False, **overrides: Any
) -> nn.Module:
    """Build the network that a checkpoint of iTPN, Fast-iTPN or HiViT holds, with its weights, in eval mode.

    Reads files of itpn, timm, the authors' code and mmpretrain; the architecture is read from names and shapes.

    Args:
        checkpoint: a file, or ``hf-hub:OWNER/NAME``.
        task: ``"pretraining"`` gives a :class:`~itpn.masked.masked_model.MaskedImageModel`, ``"classification"`` a
            :class:`~itpn.models.hivit.HiViT` with its classifier, ``"backbone"`` one without, ``"pyramid"`` a
            :class:`~itpn.models.pyramid.PyramidBackbone` for detection and segmentation, ``"detection"`` a
            :class:`~itpn.models.detector.Detector`, ``"segmentation"`` a
            :class:`~itpn.models.segmenter.Segmenter`. By default the first of
            these that the file has everything for.
        strict: refuse a network of which a part would stay random, or a file of which a part would be lost; otherwise
            these are warnings.
        average: take the moving average of the weights (``model_ema``) where the file has one beside them.
        overrides: settings that differ from the file's: arguments of HiViT (``img_size``, ``in_chans``,
            ``num_classes``, ``drop_path_rate``, ...), ``levels`` of a pyramid; ``num_heads`` and ``decoder_heads``
            where the file cannot tell them; for pre-training files of ours :class:`itpn.config.ModelConfig`'s.

    Raises:
        UserError: no such file, damaged, with code in it, of another network; or ``strict`` and something
            is missing.
    """
    model, notes = load_found(read_checkpoint(checkpoint, average), task, strict, **overrides)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return model


def load_found(
    checkpoint: Checkpoint, task: Task | None = None, strict: bool = True, **overrides: Any
) -> tuple[nn.Module, list[str]]:
    """:func:`load` for a file that was read.

    Returns:
        The network in eval mode, and what is not as in the file, a sentence each.
    """
    if task is not None and task not in TASKS:
        raise UserError(f"no task {task!r}; there are {', '.join(TASKS)}")
    model = make_model(checkpoint, task, overrides)
    state, findings = fit(checkpoint, model)
    source = checkpoint.source
    problems = [finding for finding in findings if finding.kind in ("random", "harmful")]
    if problems and strict:
        misfit = any(finding.kind == "harmful" for finding in problems)
        raise UserError(
            f"checkpoint {source} {'; it '.join(finding.text for finding in problems)}. "
            + (
                "strict=False loads what fits, but this"
                if misfit
                else "Pass strict=False to load it all the same: that"
            )
            + (" is another network than the file's" if misfit else " part starts at random")
        )
    model.load_state_dict(state, strict=False)
    describe_weights(model, checkpoint)
    notes = [f"{source} {finding.text}" for finding in findings if finding.kind != "expected"]
    if checkpoint.broken:
        notes.append(f"{source} has {describe_broken(checkpoint.broken)}")
    return model.eval(), notes


def describe_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put what a file says of its images and classes where timm's users look for it, ``model.pretrained_cfg``."""
    if not isinstance(model, HiViT | PyramidBackbone) or not hasattr(model, "pretrained_cfg"):
        return
    own = checkpoint.preprocessing
    cfg: dict[str, Any] = {name: own[name] for name in ("mean", "std", "crop_pct", "interpolation") if name in own}
    for name in ("mean", "std"):  # one number for all channels
        if name in cfg:
            cfg[name] = tuple(cfg[name]) * (model.in_chans if len(cfg[name]) == 1 else 1)
    names = checkpoint.metadata.get("classes")
    cfg |= {"label_names": names} if names and len(names) == model.num_classes else {}
    shape = {"input_size": find_backbone(model).image_shape, "num_classes": model.num_classes}
    model.pretrained_cfg = {**model.pretrained_cfg, **shape, **cfg}


def make_model(checkpoint: Checkpoint, task: Task | None, overrides: dict[str, Any]) -> nn.Module:
    """The network for a file and a task, freshly initialised."""
    config = checkpoint.config
    if config is not None and task in (None, "pretraining"):
        return build_from(override_model(config, overrides))
    heads = {name: overrides.pop(name, None) for name in ("num_heads", "decoder_heads")}
    architecture = read_architecture(checkpoint, **heads)
    task = task or architecture.tasks[0]
    if task == "detection" and architecture.detector is None:
        # a fresh one sees images as its backbone did
        for name in ("mean", "std"):
            values = checkpoint.preprocessing.get(name, ())
            if values:
                overrides.setdefault(f"image_{name}", tuple(values) * (3 if len(values) == 1 else 1))
    return build(architecture, task, **overrides)


def build_from(config: Config) -> MaskedImageModel:
    """The masked model of a whole config."""
    return build_masked_model(config.model, image_size(config.data), config.teacher)


def load_weights(model: MaskedImageModel, checkpoint: Checkpoint) -> list[str]:
    """Start a run from a file: copy into the run's model what fits.

    A part that the file lacks starts fresh (a decoder, heads; a pyramid, if the file has none at all). A backbone or
    pyramid of another shape is refused: it is another model.

    Returns:
        What is not as in the file, a sentence each.

    Raises:
        UserError: the file holds another model, and which options would build it; or numbers that are none.
    """
    read_architecture(checkpoint)  # says so if the file is not whole
    state, findings = fit(checkpoint, model)
    source = checkpoint.source
    problems = [f.text for f in findings if f.kind == "harmful"]
    if any(name.startswith("pyramid.") for name in checkpoint.tensors):  # one there is no start afresh
        problems += [f.text for f in findings if f.kind == "random" and f.names[0].startswith("pyramid.")]
    if problems:
        settings = read_backbone(checkpoint.tensors, grid=checkpoint.grid)
        if find_variant(settings) is None:
            sizes = f"{settings['embed_dim']} channels and {'+'.join(map(str, settings['depths']))} blocks"
            raise UserError(
                f"checkpoint {source} holds a network of {sizes}, which no model of `itpn list` has: `itpn train` "
                "cannot start from it (itpn.load can)"
            )
        options = describe_options(checkpoint, model)
        hint = f"; it takes {options}" if options else ""
        raise UserError(f"checkpoint {source} holds another model: it {problems[0]}{hint}")
    check_sound(checkpoint)
    model.load_state_dict(state, strict=False)
    notes = [f"{source} {f.text}: it starts fresh" for f in findings if f.kind == "random"]
    return notes + [f"{source} {f.text}" for f in findings if f.kind == "converted"]


def describe_options(checkpoint: Checkpoint, model: MaskedImageModel) -> str:
    """The options of `itpn train` that turn a recipe's network into the file's; empty where none would."""
    theirs = _settings(checkpoint.tensors, checkpoint.grid)
    ours = _settings(model.state_dict(), model.backbone.grid_size)
    if checkpoint.config is not None and theirs["decoder-depth"]:
        theirs["decoder-heads"] = checkpoint.config.model.decoder_heads  # which no tensor shows
        ours["decoder-heads"] = model.decoder.num_heads if model.decoder is not None else None
    if theirs["name"] != ours["name"]:
        own = PYRAMIDS.get(str(theirs["name"]), PUBLISHED_PYRAMID)  # comes with the name
        ours |= {"pyramid-width": own["width"], "pyramid-depth": own["depth"]}
    return " ".join(f"--model.{o} {v}" for o, v in theirs.items() if v is not None and v != ours[o])


def _settings(tensors: Mapping[str, Tensor], grid: Grid | None) -> dict[str, str | int | None]:
    """Options of `itpn train` that say what these tensors belong to."""
    backbone, pyramid = read_backbone(tensors, grid=grid), read_pyramid(tensors) or {}
    settings: dict[str, str | int | None] = {
        "name": find_variant(backbone),
        "patch-size": backbone["patch_size"],
        "rel-pos-bias": str(bool(backbone.get("rel_pos_bias"))),
        "init-values": "0.1" if "init_values" in backbone else "None",
        "pyramid-width": pyramid.get("width"),
        "pyramid-depth": pyramid.get("depth"),
        "decoder-width": None,
        "decoder-depth": None,
        "decoder-heads": None,
    }
    if "decoder.norm.weight" in tensors:
        settings["decoder-width"] = len(tensors["decoder.norm.weight"])
        settings["decoder-depth"] = count_blocks(tensors, r"decoder\.blocks\.(\d+)\.")
    return settings


def check_sound(checkpoint: Checkpoint) -> None:
    """Raise :class:`UserError` where a file has infinite numbers or NaN."""
    if checkpoint.broken:
        raise UserError(f"checkpoint {checkpoint.source} has {describe_broken(checkpoint.broken)}")


def describe_broken(broken: dict[str, int]) -> str:
    first = next(iter(broken))
    return f"{sum(broken.values())} infinite numbers or NaN in {len(broken)} tensors, {first} first: it is of no use"
