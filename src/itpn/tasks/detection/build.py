"""From settings, images and a checkpoint to the parts of a detector's run."""

from collections.abc import Sequence
from typing import Any

from itpn.checkpoints.files import Checkpoint
from itpn.models.detector import Detector
from itpn.tasks.detection import network
from itpn.tasks.detection.config import DetectionConfig
from itpn.tasks.detection.data import DetectionData, make_loader
from itpn.tasks.detection.evaluation import DetectionEvaluator
from itpn.tasks.detection.module import DetectionTask
from itpn.tasks.finetuning.network import resolve_with_head
from itpn.tasks.finetuning.start import scale_epochs


def resolve(
    config: DetectionConfig, found: Checkpoint | None, data: DetectionData
) -> tuple[DetectionConfig, Sequence[str]]:
    config, notes = resolve_with_head(config, found)
    return scale_epochs(config, len(data.train)), notes


def build_model(config: DetectionConfig, data: DetectionData, found: Checkpoint | None) -> tuple[Detector, list[str]]:
    return network.build_model(config, data.train.classes, data.masks, found)


def build_module(model: Detector, config: DetectionConfig, recipe: str, data: DetectionData) -> DetectionTask:
    return DetectionTask(
        model,
        config,
        recipe,
        data.train.classes,
        lambda rank, world: make_loader(config, data.train, data.masks, rank, world),
    )


def build_evaluator(config: DetectionConfig, data: DetectionData) -> DetectionEvaluator | None:
    return None if data.val is None else DetectionEvaluator(config, data.val, data.masks)


def describe_data(config: DetectionConfig, data: DetectionData) -> dict[str, Any]:
    return {"data": f"{len(data.train.classes)} classes", "size": f"short side up to {config.data.img_size} px"}
