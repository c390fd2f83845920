"""What a checkpoint is, what it can be used for, and what would be missing."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from itpn.checkpoints.architecture import TASKS, Architecture, Task, build, complete, read_architecture
from itpn.checkpoints.diagnosis import Finding, fit, judge_others
from itpn.checkpoints.files import Checkpoint, read_checkpoint
from itpn.checkpoints.loading import build_from, describe_broken, describe_options
from itpn.config import ModelConfig
from itpn.masked.build import build_masked_model

LAYOUTS = {
    "itpn": "itpn or timm",
    "official": "the authors' code (iTPN, HiViT)",
    "official_fast": "the authors' code (Fast-iTPN)",
    "mmpretrain": "mmpretrain",
}
# what names things, and the recipe that trains one
PREDICTORS = {
    "classification": "backbone.head",
    "detection": "roi_heads.box_predictor.cls_score",
    "segmentation": "classifier",
}
SMALL = {
    "classification": "classifier_small",
    "detection": "detector_small",
    "segmentation": "segmenter_small",
}


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
        classes: names of what a classifier or detector tells apart, if the file has them.
        preprocessing: of the images, as far as the file says so: mean, std, size and the like.
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
    classes: tuple[str, ...] = ()
    preprocessing: dict[str, Any] = field(default_factory=dict)

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
        detector, segmenter = self.architecture.detector or {}, self.architecture.segmenter or {}
        family = "Fast-iTPN" if backbone["swiglu"] else "HiViT" if pyramid is None else "iTPN"
        made_for = {
            "pretraining": f"pre-trained to predict {' and '.join(decoder['heads'] if decoder else ())}",
            "segmentation": f"a segmenter of {segmenter.get('num_classes')} classes of pixels",
            "detection": f"a detector of {detector.get('num_classes', 0) - 1} kinds of objects",
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
        if self.classes:
            some = ", ".join(self.classes[:5])
            rows["classes"] = f"{some}, ... ({len(self.classes)})" if len(self.classes) > 5 else some
        if self.architecture.guessed:
            rows["guessed"] = f"{', '.join(self.architecture.guessed)}: not in the file, give them if they differ"
        if self.broken:
            rows["broken"] = describe_broken(self.broken)
        return rows

    def __str__(self) -> str:
        lines = [self.source, *(f"  {title:<10}{line}" for title, line in self.summary.items())]
        whole = "of no use" if self.broken else "ready"
        for use in self.uses:
            lines.append(f"  {use.task:<16}{'it ' + '; it '.join(use.missing) if use.missing else whole}")
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
        broken=found.broken,
        classes=tuple(found.metadata.get("classes") or ()),
        preprocessing=found.preprocessing,
    )


def _command(checkpoint: Checkpoint, task: Task, model: str | None, findings: list[Finding]) -> str:
    """How a file is used for a task."""
    source = checkpoint.source
    if task != "pretraining":
        predictor = PREDICTORS.get(task)
        if predictor is not None and f"{predictor}.weight" not in checkpoint.tensors:
            return f"itpn train {SMALL[task]} --model.checkpoint {source}"
        fresh = ", strict=False" if any(finding.kind in ("random", "harmful") for finding in findings) else ""
        return f"itpn.load({source!r}, task={task!r}{fresh})"
    if model is None:
        return f"itpn.load({source!r})" if "decoder.embeds.0.weight" in checkpoint.tensors else ""
    options = describe_options(checkpoint, build_masked_model(ModelConfig(name=model), (224, 224)))
    return f"itpn train RECIPE --model.checkpoint {source} --model.name {model} {options}".strip()
