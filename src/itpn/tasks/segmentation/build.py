"""From settings, images and a checkpoint to the parts of a segmenter's run."""

from collections.abc import Sequence
from typing import Any

from itpn.checkpoints.files import Checkpoint
from itpn.errors import UserError
from itpn.models.segmenter import Segmenter
from itpn.tasks.data import RunData
from itpn.tasks.finetuning.network import resolve_with_head
from itpn.tasks.finetuning.start import scale_epochs
from itpn.tasks.segmentation import network
from itpn.tasks.segmentation.config import SegmentationConfig
from itpn.tasks.segmentation.data import make_loader
from itpn.tasks.segmentation.evaluation import SegmentationEvaluator
from itpn.tasks.segmentation.module import SegmentationTask
from itpn.training.config import describe_crops
from itpn.training.launch import choose_devices, read_launch


def resolve(
    config: SegmentationConfig, found: Checkpoint | None, data: RunData
) -> tuple[SegmentationConfig, Sequence[str]]:
    processes = choose_devices(config.trainer, read_launch()).processes
    if min(config.data.batch_size * processes, len(data.train)) == 1:
        raise UserError(
            "batch norm needs two images at a time: give "
            + ("--data.batch-size 2 or more" if len(data.train) > 1 else f"more images than one in {config.data.root}")
        )
    config, notes = resolve_with_head(config, found)
    return scale_epochs(config, len(data.train), processes), notes


def build_model(config: SegmentationConfig, data: RunData, found: Checkpoint | None) -> tuple[Segmenter, list[str]]:
    return network.build_model(config, data.train.classes, found)


def build_module(model: Segmenter, config: SegmentationConfig, recipe: str, data: RunData) -> SegmentationTask:
    return SegmentationTask(
        model,
        config,
        recipe,
        data.train.classes,
        lambda rank, world: make_loader(config, data.train, rank, world),
        data.train.table.colours,
    )


def build_evaluator(config: SegmentationConfig, data: RunData) -> SegmentationEvaluator | None:
    return None if data.val is None else SegmentationEvaluator(config, data.val)


def describe_data(config: SegmentationConfig, data: RunData) -> dict[str, Any]:
    size = (config.data.img_size, config.data.img_size)
    return {"data": f"{len(data.train.classes)} classes of pixels", "size": describe_crops(size)}
