"""What a checkpoint is, what it can be used for, and what would be missing."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from itpn.checkpoints.adapters import ADAPTERS, Layout
from itpn.checkpoints.contents import HEADLESS, Contents, all_names
from itpn.checkpoints.files import Checkpoint, read_checkpoint
from itpn.checkpoints.io import describe_nonfinite
from itpn.checkpoints.match import Finding, judge_others, match
from itpn.data.image_type import PHOTO
from itpn.models.build import build
from itpn.models.heads import heads
from itpn.models.spec import Options

PURPOSES = {"pyramid": "dense prediction", "backbone": "features"}


@dataclass
class Use:
    """One of the things that a file can be used for.

    Attributes:
        task: a head's name, "pyramid" or "backbone".
        purpose: what for, in a word or two.
        command: how.
        findings: see :class:`itpn.checkpoints.match.Finding`.
    """

    task: str
    purpose: str
    command: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def missing(self) -> list[str]:
        """What would be randomly initialized, or lost."""
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
        contents: the networks that the file has the tensors of.
        parameters: in the file's networks, in millions.
        uses: one for each task.
        leftovers: tensors that none of our networks has, and whether it matters.
        nonfinite: tensors with NaN or infinite values, and how many.
        classes: names of what a classifier or detector tells apart, if the file has them.
        preprocessing: of the images, as far as the file says so: mean, std, size and the like.
    """

    source: str
    format: Layout
    key: str
    task: str
    model: str | None
    contents: Contents
    parameters: float
    uses: list[Use]
    leftovers: list[Finding]
    nonfinite: dict[str, int]
    classes: tuple[str, ...] = ()
    preprocessing: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> str:
        """Channels, depth and value range of the images that it is of; empty for photographs."""
        own = self.preprocessing
        if own.get("dtype", PHOTO) == PHOTO:
            return ""
        lows_and_highs = own.get("value_range")
        values = [str(value) for value in lows_and_highs] if isinstance(lows_and_highs, list | tuple) else []
        shown = f"{_count(own.get('channels', 0), 'channel')} of {own['dtype']}"
        shown += f", values from {' to '.join(values)}" if len(values) == 2 else ", a range of values for each channel"
        nodata = own.get("nodata")
        return shown if nodata is None else f"{shown}, {nodata} without data"

    def use(self, task: str) -> Use:
        return next(use for use in self.uses if use.task == task)

    @property
    def summary(self) -> dict[str, str]:
        """Titles and lines of the report's first part."""
        backbone, pyramid = self.contents.backbone, self.contents.pyramid
        family = "Fast-iTPN" if backbone.get("swiglu") else "HiViT" if pyramid is None else "iTPN"
        made_for = {"pyramid": "backbone and pyramid of a detector or segmenter", "backbone": "a backbone"}.get(
            self.task
        )
        known = heads()
        head = known.get(self.task)
        if made_for is None:
            unknown = f"a network of the task {self.task!r}, which is not known here (see --recipe)"
            made_for = unknown if head is None else head.summarize(self.contents.spec(self.task))
        names = ADAPTERS[self.format].title + (f", under {self.key!r}" if self.key else "")
        rows = {
            "what": f"{self.model or f'{family} of unknown name'}: {made_for}; {self.parameters:.2f} M parameters",
            "names": names,
            "backbone": (
                f"{backbone['embed_dim']} channels, {'+'.join(map(str, backbone['depths']))} blocks, "
                f"{_count(backbone['num_heads'], 'head')}, patches of {backbone['patch_size']} px, "
                f"{_count(backbone.get('in_chans', 3), 'channel')} in, positions for {_size(backbone['img_size'])} px"
            ),
            "options": ", ".join(_describe_backbone(backbone)) or "plain",
        }
        if self.images:
            rows["images"] = self.images
        if pyramid:
            rows["pyramid"] = f"{pyramid['width']} channels, {_count(pyramid['depth'], 'block')} a level"
        for name, options in self.contents.heads.items():
            if name in known:
                rows = {**rows, **known[name].describe(options)}
        if self.classes:
            some = ", ".join(self.classes[:5])
            rows["classes"] = f"{some}, ... ({len(self.classes)})" if len(self.classes) > 5 else some
        if self.contents.guessed:
            rows["guessed"] = f"{', '.join(self.contents.guessed)}: not in the file, give them if they differ"
        if self.nonfinite:
            rows["not finite"] = describe_nonfinite(self.nonfinite)
        return rows

    def __str__(self) -> str:
        lines = [self.source, *(f"  {title:<10}{line}" for title, line in self.summary.items())]
        whole = "of no use" if self.nonfinite else "ready"
        for use in self.uses:
            lines.append(f"  {use.task:<16}{'it ' + '; it '.join(use.missing) if use.missing else whole}")
        return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _size(size: Any) -> str:
    return f"{size}x{size}" if isinstance(size, int) else "x".join(map(str, size))


def _describe_backbone(backbone: Options) -> list[str]:
    relative = backbone.get("rel_pos_bias")
    options = []
    if backbone.get("init_values"):
        stages = backbone.get("layer_scale_stages", (1, 2, 3))
        options.append(f"layer scale in stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))}")
    if relative:
        kind = "decomposed relative positions" if relative == "decomposed" else "relative position bias"
        options.append(f"{kind} for {_size(backbone.get('rel_pos_size') or backbone['img_size'])} px")
    if backbone.get("swiglu"):
        options.append("SwiGLU and sub-LN")
    if backbone.get("pos_resample") == "legacy":
        options.append("positions resampled as in the public code")
    if backbone.get("norm_eps", 1e-6) != 1e-6:
        options.append(f"norm eps {backbone['norm_eps']}")
    return options


def inspect(checkpoint: str | Path, ema: bool = False) -> Report:
    """What a checkpoint is and what can be done with it; builds nothing that takes memory.

    Args:
        ema: of the EMA of the weights (``model_ema``) where the file has one beside them.

    Raises:
        UserError: no such file, corrupt, with code in it, or of another network.
    """
    file = read_checkpoint(checkpoint, ema)
    contents = file.contents
    uses = []
    with torch.device("meta"):
        for task in all_names():
            findings = match(file, build(contents.complete(task)))[1]
            purpose = PURPOSES[task] if task in HEADLESS else heads()[task].purpose
            uses.append(Use(task, purpose, _command(file, contents, task, findings), findings))
    return Report(
        source=str(checkpoint),
        format=file.layout,
        key=file.key,
        task=contents.names[0],
        model=file.settings.get("model", {}).get("name") or contents.variant,
        contents=contents,
        parameters=sum(tensor.numel() for tensor in file.tensors.values()) / 1e6,
        uses=uses,
        leftovers=judge_others(file, classifier="backbone.head.weight" in file.tensors),
        nonfinite=file.nonfinite,
        classes=tuple(file.metadata.get("classes") or ()),
        preprocessing=file.preprocessing,
    )


def _command(checkpoint: Checkpoint, contents: Contents, task: str, findings: list[Finding]) -> str:
    """How a file is used for a task."""
    source = checkpoint.source
    head = heads().get(task)
    command = None if head is None else head.command(source, contents.spec(task))
    if command is not None:
        return command
    if head is not None and head.recipe is not None and task not in contents.heads:
        return f"itpn train {head.recipe} --model.checkpoint {source}"
    fresh = ", strict=False" if any(finding.kind in ("random", "harmful") for finding in findings) else ""
    return f"itpn.load({source!r}, task={task!r}{fresh})"
