"""A segmenter's run: what it starts from, its images, its evaluation while it goes on."""

import functools
from pathlib import Path
from typing import Any

import lightning as L
from PIL import Image
from torch import Tensor

from itpn.checkpoints.finetuning import make_segmenter
from itpn.config import SegmentationConfig
from itpn.data.evaluation import make_evaluation_loader, read_some
from itpn.data.labelmaps import (
    LabelMaps,
    MaskRules,
    SegmentationTransform,
    find_label_maps,
    view_labels,
)
from itpn.data.loader import TrainingLoader, collect
from itpn.data.masks import LabelTable
from itpn.errors import UserError
from itpn.metrics.classification import nothing_readable
from itpn.metrics.segmentation import collect_confusion, gather_confusion
from itpn.models.modes import eval_mode
from itpn.system.console import print_aside
from itpn.tasks.drawing import draw_labels, join_pictures
from itpn.tasks.segmentation.module import Segmentation, SegmentationTask
from itpn.tasks.starting import read_start, save_network, scale_epochs, start_network
from itpn.training.data import describe_size, make_training_loader
from itpn.training.evaluation import Evaluation
from itpn.training.launch import choose_devices, read_launch
from itpn.training.loop import Run, fit
from itpn.training.state import Job

Sets = tuple[LabelMaps, LabelMaps | None]
SHOWN = 6  # images in pictures
FIGURES = ("miou", "mean_accuracy", "pixel_accuracy")


def make_rules(config: SegmentationConfig) -> MaskRules:
    data = config.data
    tell = print_aside if read_launch().main else lambda line: None
    return MaskRules(data.classes, data.reduce_zero_label, data.ignore, data.mistakes, tell, data.max_pixels)


def find_sets(config: SegmentationConfig) -> Sets:
    """The images to train on, and those to evaluate on."""
    return find_label_maps(**describe_sets(config))


def describe_sets(config: SegmentationConfig) -> dict[str, Any]:
    """Arguments of :func:`find_label_maps` and :func:`read_to_evaluate`."""
    data = config.data
    places = {"root": data.root, "masks": data.masks, "val_root": data.val_root, "val_masks": data.val_masks}
    return {**places, "rules": make_rules(config), "val_share": data.val_share, "seed": config.seed}


def train_segmenter(config: SegmentationConfig, recipe: str, sets: Sets | None = None, run: Run = fit) -> Path:
    """Start or resume a segmenter's run; see :func:`itpn.training.loop.fit`.

    Args:
        sets: the images, where they have been looked for already.
        run: what to do, instead of training.
    """
    found = read_start(config)
    train, val = sets or find_sets(config)
    processes = choose_devices(config.trainer, read_launch()).processes
    if min(config.data.batch_size * processes, len(train)) == 1:
        raise UserError(
            "batch norm needs two images at a time: give "
            + ("--data.batch-size 2 or more" if len(train) > 1 else f"more images than one in {config.data.root}")
        )
    scale_epochs(config, len(train), processes)
    model, notes = start_network(config, found, lambda: make_segmenter(config, train.classes, found))
    model.set_grad_checkpointing(config.model.grad_checkpointing)
    if val is None:
        notes.append("there are no images to evaluate on: give --data.val-root or --data.val-share")

    def make() -> Job:
        task = SegmentationTask(
            model,
            config,
            recipe,
            train.classes,
            lambda rank, world: make_loader(config, train, rank, world),
            train.table.colours,
        )
        validation = None if val is None else SegmentationValidation(task, config, val)
        shown = functools.cache(lambda: [i for _, i in read_some(val or train, SHOWN, config.data.max_pixels)])
        more = "" if val is None else f", {len(val):,} more to evaluate on"
        size = (config.data.img_size, config.data.img_size)
        return Job(
            task,
            lambda: draw_scenes(task, config, shown()),
            {"data": f"{len(train.classes)} classes of pixels{more}", "size": describe_size(size)},
            len(train),
            lambda path: save_network(path, task),
            validation,
            [model],
        )

    return run(config, recipe, lambda: notes, make)


def make_transform(config: SegmentationConfig, table: LabelTable) -> SegmentationTransform:
    data = config.data
    assert data.mean is not None
    red, green, blue = (round(255 * value) for value in (data.mean * 3)[:3])  # one number is for all channels
    return SegmentationTransform(
        table,
        data.img_size,
        data.short,
        scales=data.scales,
        max_share=data.max_class_share,
        hflip=data.hflip,
        photometric=data.photometric,
        interpolation=data.interpolation,
        fill=(red, green, blue),
        max_pixels=data.max_pixels,
    )


def make_segmentation(config: SegmentationConfig) -> Segmentation:
    """How the settings segment an image."""
    own = config.evaluation
    window = None if own.mode == "whole" else config.data.img_size
    return Segmentation(config.data.short, window, own.stride, own.scales, own.flip, config.data.interpolation)


def make_loader(config: SegmentationConfig, images: LabelMaps, rank: int, world_size: int) -> TrainingLoader:
    return make_training_loader(config, images, make_transform(config, images.table), rank, world_size)


def view_scene(table: LabelTable, max_pixels: int, image: Tensor, mask: str) -> dict[str, Any]:
    """An image and its classes, as they are."""
    return {"image": image, "target": view_labels(image, table, mask, max_pixels)}


def make_batches(images: LabelMaps, config: SegmentationConfig, rank: int = 0, world_size: int = 1) -> Any:
    """Every image once, as it is."""
    return make_evaluation_loader(
        images,
        functools.partial(view_scene, images.table, config.data.max_pixels),
        config.evaluation.batch_size,
        config.data.num_workers,
        rank,
        world_size,
        config.data.max_pixels,
        collate=collect,
    )


def draw_scenes(task: SegmentationTask, config: SegmentationConfig, images: list[Tensor]) -> Image.Image:
    """What the network sees in some images."""
    segment = make_segmentation(config)
    with eval_mode(task):
        labels = [segment(task.model, task.normalize, image.to(task.device)) for image in images]
    return join_pictures(
        [draw_labels(i, own, task.classes, task.colours) for i, own in zip(images, labels, strict=True)], per_row=3
    )


class SegmentationValidation(Evaluation):
    """Figures of the network over all pixels of a set."""

    def __init__(self, task: SegmentationTask, config: SegmentationConfig, images: LabelMaps) -> None:
        super().__init__([f"val_{name}" for name in FIGURES], config.evaluation.every_n_epochs)
        self.task = task
        self.config = config
        self.images = images

    def evaluate(self, fabric: L.Fabric) -> dict[str, float]:
        skipped: list[tuple[str, str]] = []
        segment = functools.partial(make_segmentation(self.config), self.task.model, self.task.normalize)
        with fabric.autocast():
            scores = collect_confusion(
                segment,
                len(self.images.classes),
                make_batches(self.images, self.config, fabric.global_rank, fabric.world_size),
                self.task.device,
                skipped,
            )
        unread = self.name_skipped(fabric, skipped)
        scores = gather_confusion(scores, fabric.world_size)
        if not scores.images:
            raise nothing_readable(unread)
        figures = {f"val_{name}": value for name, value in scores.figures.items()}
        self.score = figures["val_miou"]
        return figures

    def describe(self) -> dict[str, str]:
        miou, mean, pixels = (self.metrics[f"val_{name}"] for name in FIGURES)
        if miou is None or mean is None or pixels is None:
            return {}
        return {
            "pixels": f"mIoU {100 * miou:.1f}, accuracy {100 * pixels:.1f}, of classes {100 * mean:.1f} "
            f"of {len(self.images):,} images"
        }
