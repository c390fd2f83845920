"""From a file to a network: loading, inspecting, and starting a run from one."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from itpn.checkpoints.architecture import (
    TASKS,
    Architecture,
    Task,
    build,
    complete,
    count_blocks,
    find_variant,
    read_architecture,
    read_backbone,
    read_pyramid,
)
from itpn.checkpoints.diagnosis import Finding, fit, judge_others
from itpn.checkpoints.files import Checkpoint, count_broken, read_checkpoint
from itpn.config import Config, ModelConfig, image_size, override_model
from itpn.errors import UserError
from itpn.models.position import Grid
from itpn.models.variants import PUBLISHED_PYRAMID, PYRAMIDS
from itpn.pretraining.build import build_masked_model
from itpn.pretraining.model import MaskedImageModel

LAYOUTS = {
    "itpn": "itpn or timm",
    "official": "the authors' code (iTPN, HiViT)",
    "official_fast": "the authors' code (Fast-iTPN)",
    "mmpretrain": "mmpretrain",
}


def load(
    checkpoint: str | Path, task: Task | None = None, strict: bool = True, average: bool = False, **overrides: Any
) -> nn.Module:
    """Build the network that a checkpoint of iTPN, Fast-iTPN or HiViT holds, with its weights, in eval mode.

    Reads files of itpn, timm, the authors' code and mmpretrain; the architecture is read from names and shapes.

    Args:
        checkpoint: a file, or ``hf-hub:OWNER/NAME``.
        task: ``"pretraining"`` gives a :class:`~itpn.pretraining.model.MaskedImageModel`, ``"classification"`` a
            :class:`~itpn.models.hivit.HiViT` with its classifier, ``"backbone"`` one without, ``"pyramid"`` a
            :class:`~itpn.models.pyramid.PyramidBackbone` for detection and segmentation. By default the first of
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
    problems = [finding.text for finding in findings if finding.kind in ("random", "harmful")]
    if problems and strict:
        raise UserError(
            f"checkpoint {source} {'; it '.join(problems)}. Pass strict=False to load it all the same, what it lacks "
            "being random"
        )
    model.load_state_dict(state, strict=False)
    notes = [f"{source} {finding.text}" for finding in findings if finding.kind != "expected"]
    if broken := count_broken(checkpoint.tensors):
        notes.append(f"{source} has {describe_broken(broken)}")
    return model.eval(), notes


def make_model(checkpoint: Checkpoint, task: Task | None, overrides: dict[str, Any]) -> nn.Module:
    """The network for a file and a task, freshly initialised."""
    config = checkpoint.config
    if config is not None and task in (None, "pretraining"):
        return build_from(override_model(config, overrides))
    heads = {name: overrides.pop(name, None) for name in ("num_heads", "decoder_heads")}
    architecture = read_architecture(checkpoint, **heads)
    return build(architecture, task or architecture.tasks[0], **overrides)


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
        UserError: the file holds another model, and which options would build it.
    """
    state, findings = fit(checkpoint, model)
    source = checkpoint.source
    problems = [f.text for f in findings if f.kind == "harmful"]
    problems += [f.text for f in findings if f.kind == "random" and f.text.startswith("has no pyramid that fits")]
    if problems:
        options = describe_options(checkpoint, model)
        hint = f"; it takes {options}" if options else ""
        raise UserError(f"checkpoint {source} holds another model: it {problems[0]}{hint}")
    model.load_state_dict(state, strict=False)
    notes = [f"{source} {f.text}: it starts fresh" for f in findings if f.kind == "random"]
    notes += [f"{source} {f.text}" for f in findings if f.kind == "converted"]
    if broken := count_broken(checkpoint.tensors):
        notes.append(f"{source} has {describe_broken(broken)}")
    return notes


def describe_options(checkpoint: Checkpoint, model: MaskedImageModel) -> str:
    """The options of `itpn train` that turn a recipe's network into the file's; empty where none would."""
    theirs = _settings(checkpoint.tensors, checkpoint.grid)
    ours = _settings(model.state_dict(), model.backbone.grid_size)
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
    }
    if "decoder.norm.weight" in tensors:
        settings["decoder-width"] = len(tensors["decoder.norm.weight"])
        settings["decoder-depth"] = count_blocks(tensors, r"decoder\.blocks\.(\d+)\.")
    return settings


def describe_broken(broken: dict[str, int]) -> str:
    first = next(iter(broken))
    return f"{sum(broken.values())} infinite numbers or NaN in {len(broken)} tensors, {first} first: it is of no use"


@dataclass
class Use:
    """One of the things that a file can be used for.

    Attributes:
        findings: see :class:`itpn.checkpoints.diagnosis.Finding`.
        command: how.
    """

    task: Task
    command: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def missing(self) -> list[str]:
        """What would start at random, or be lost."""
        return [finding.text for finding in self.findings if finding.kind in ("random", "harmful")]

    @property
    def ready(self) -> bool:
        return not self.missing


@dataclass
class Report:
    """What a checkpoint is, what it can be used for, and what would be missing.

    Attributes:
        format: whose names the tensors have: itpn, official, official_fast or mmpretrain.
        task: what it was made for.
        model: the registered model with these sizes, if there is one.
        parameters: in the file's networks, in millions.
        uses: one for each task.
        leftovers: tensors that none of our networks has a place for, and whether it matters.
        broken: tensors with NaN or infinite numbers, and how many.
    """

    source: str
    format: str
    key: str
    task: Task
    model: str | None
    architecture: Architecture
    parameters: float
    uses: list[Use]
    leftovers: list[Finding]
    broken: dict[str, int]

    def use(self, task: Task) -> Use:
        return next(use for use in self.uses if use.task == task)

    @property
    def summary(self) -> dict[str, str]:
        """Titles and lines of the report's first part."""
        backbone, pyramid, decoder = (
            self.architecture.backbone,
            self.architecture.pyramid,
            self.architecture.decoder,
        )
        family = "Fast-iTPN" if backbone["swiglu"] else "HiViT" if pyramid is None else "iTPN"
        made_for = {
            "pretraining": f"pre-trained to predict {' and '.join(decoder['heads'] if decoder else ())}",
            "classification": f"a classifier of {backbone.get('num_classes')} classes",
            "pyramid": "backbone and pyramid of a detector or segmenter",
            "backbone": "a backbone",
        }[self.task]
        names = LAYOUTS[self.format] + (f", under {self.key!r}" if self.key else "")
        rows = {
            "what": f"{self.model or f'{family} of unknown name'}: {made_for}; {self.parameters:.2f} M parameters",
            "names": names,
            "backbone": (
                f"{backbone['embed_dim']} channels, {'+'.join(map(str, backbone['depths']))} blocks, "
                f"{_count(backbone['num_heads'], 'head')}, patches of {backbone['patch_size']} px, "
                f"{_count(backbone['in_chans'], 'channel')} in, positions for {_size(backbone['img_size'])} px"
            ),
            "options": ", ".join(_describe_backbone(backbone)) or "plain",
        }
        if pyramid:
            rows["pyramid"] = f"{pyramid['width']} channels, {_count(pyramid['depth'], 'block')} a level"
        if decoder:
            predicted = ", ".join(f"{width} numbers a unit ({name})" for name, width in decoder["heads"].items())
            rows["decoder"] = f"{decoder['width']} channels, {_count(decoder['depth'], 'block')}, {predicted}"
        if self.architecture.guessed:
            rows["guessed"] = f"{', '.join(self.architecture.guessed)}: not in the file, give them if they differ"
        if self.broken:
            rows["broken"] = describe_broken(self.broken)
        return rows

    def __str__(self) -> str:
        lines = [self.source, *(f"  {title:<10}{line}" for title, line in self.summary.items())]
        for use in self.uses:
            lines.append(f"  {use.task:<16}{'ready' if use.ready else 'it ' + '; it '.join(use.missing)}")
        return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _size(size: Any) -> str:
    return f"{size}x{size}" if isinstance(size, int) else "x".join(map(str, size))


def _describe_backbone(backbone: dict[str, Any]) -> list[str]:
    relative = backbone.get("rel_pos_bias")
    options = []
    if backbone.get("init_values"):
        stages = backbone.get("layer_scale_stages", (1, 2, 3))
        options.append(f"layer scale in stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))}")
    if relative:
        kind = "decomposed relative positions" if relative == "decomposed" else "relative position bias"
        options.append(f"{kind} for {_size(backbone.get('rel_pos_size') or backbone['img_size'])} px")
    if backbone["swiglu"]:
        options.append("SwiGLU and sub-LN")
    if backbone.get("pos_resample") == "legacy":
        options.append("positions resampled as in the public code")
    if backbone.get("norm_eps", 1e-6) != 1e-6:
        options.append(f"norm eps {backbone['norm_eps']}")
    return options


def inspect(checkpoint: str | Path, average: bool = False) -> Report:
    """What a checkpoint is and what can be done with it; builds nothing that takes memory.

    Raises:
        UserError: no such file, damaged, with code in it, or of another network.
    """
    found = read_checkpoint(checkpoint, average)
    architecture = read_architecture(found)
    config = found.config
    model = config.model.name if config else architecture.name
    uses = []
    with torch.device("meta"):
        for task in TASKS:
            built = (
                build_from(config) if config and task == "pretraining" else build(complete(architecture, task), task)
            )
            findings = fit(found, built)[1]
            uses.append(Use(task, _command(found, task, model, findings), findings))
    return Report(
        source=str(checkpoint),
        format=found.layout,
        key=found.key,
        task="pretraining" if config else architecture.tasks[0],
        model=model,
        architecture=architecture,
        parameters=sum(tensor.numel() for tensor in found.tensors.values()) / 1e6,
        uses=uses,
        leftovers=judge_others(found, classifier=bool(architecture.backbone.get("num_classes"))),
        broken=count_broken(found.tensors),
    )


def _command(checkpoint: Checkpoint, task: Task, model: str | None, findings: list[Finding]) -> str:
    """How a file is used for a task."""
    source = checkpoint.source
    if task != "pretraining":
        new = task == "classification" and "backbone.head.weight" not in checkpoint.tensors
        classes = ", num_classes=N" if new else ""
        fresh = ", strict=False" if any(finding.kind in ("random", "harmful") for finding in findings) else ""
        return f"itpn.load({source!r}, task={task!r}{classes}{fresh})"
    if model is None:
        return f"itpn.load({source!r})" if "decoder.embeds.0.weight" in checkpoint.tensors else ""
    options = describe_options(checkpoint, build_masked_model(ModelConfig(name=model), (224, 224)))
    return f"itpn train RECIPE --model.checkpoint {source} --model.name {model} {options}".strip()
