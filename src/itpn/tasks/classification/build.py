"""From settings, images and a checkpoint to the parts of a classifier's run."""

from collections.abc import Sequence
from typing import Any

from itpn.checkpoints.files import Checkpoint
from itpn.models.backbone import Backbone
from itpn.tasks.classification import network
from itpn.tasks.classification.config import ClassificationConfig
from itpn.tasks.classification.data import make_loader, make_transform
from itpn.tasks.classification.evaluation import ClassificationEvaluator
from itpn.tasks.classification.module import ClassificationTask
from itpn.tasks.data import RunData
from itpn.tasks.finetuning.start import scale_epochs
from itpn.training.config import describe_crops, image_size


def resolve(
    config: ClassificationConfig, found: Checkpoint | None, data: RunData
) -> tuple[ClassificationConfig, Sequence[str]]:
    config = network.resolve(config, found)
    make_transform(config)  # a wrong name of an augmentation is found before a folder is made
    return scale_epochs(config, len(data.train)), ()


def build_model(config: ClassificationConfig, data: RunData, found: Checkpoint | None) -> tuple[Backbone, list[str]]:
    return network.build_model(config, data.train.classes, found)


def build_module(model: Backbone, config: ClassificationConfig, recipe: str, data: RunData) -> ClassificationTask:
    transform = make_transform(config)
    return ClassificationTask(
        model,
        config,
        recipe,
        data.train.classes,
        lambda rank, world: make_loader(config, data.train, transform, rank, world),
    )


def build_evaluator(config: ClassificationConfig, data: RunData) -> ClassificationEvaluator | None:
    return None if data.val is None else ClassificationEvaluator(config, data.val)


def describe_data(config: ClassificationConfig, data: RunData) -> dict[str, Any]:
    return {"data": f"{len(data.train.classes)} classes", "size": describe_crops(image_size(config.data))}
