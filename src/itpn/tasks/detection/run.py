"""A detector's run: what it starts from, its images, its evaluation while it goes on."""

import functools
import math
from pathlib import Path
from typing import Any

import lightning as L
from PIL import Image
from torch import Tensor

from itpn.checkpoints.finetuning import make_detector
from itpn.config import DetectionConfig
from itpn.data.annotations import find_objects
from itpn.data.evaluation import make_evaluation_loader, read_some
from itpn.data.loader import TrainingLoader, collect
from itpn.data.objects import DetectionImages, DetectionTransform, check_size
from itpn.errors import UserError
from itpn.metrics.classification import nothing_readable
from itpn.metrics.detection import collect_detections, gather_detections, score_detections
from itpn.models.modes import eval_mode
from itpn.system.console import print_aside
from itpn.tasks.detection.module import DetectionTask, detect
from itpn.tasks.drawing import draw_objects, join_pictures
from itpn.tasks.starting import read_start, save_network, scale_epochs, start_network
from itpn.training.data import make_training_loader
from itpn.training.evaluation import Evaluation
from itpn.training.launch import choose_devices, read_launch
from itpn.training.loop import Run, fit
from itpn.training.state import Job

Sets = tuple[DetectionImages, DetectionImages | None]
SHOWN, MIN_SCORE = 8, 0.3  # images in pictures, score of the boxes in them


def find_sets(config: DetectionConfig) -> Sets:
    """The images to train on, and those to evaluate on."""
    data = config.data
    tell = print_aside if read_launch().main else lambda line: None
    train, val = find_objects(data.root, data.val_root, data.mistakes, tell, data.max_pixels)
    return train if data.empty_images else train.with_objects(), val


def train_detector(config: DetectionConfig, recipe: str, sets: Sets | None = None, run: Run = fit) -> Path:
    """Start or resume a detector's run; see :func:`itpn.training.loop.fit`.

    Args:
        sets: the images, where they have been looked for already.
        run: what to do, instead of training.
    """
    found = read_start(config)
    train, val = sets or find_sets(config)
    outlined, others = train.outlined
    masks = outlined > others if config.model.masks is None else config.model.masks
    if masks and not outlined:
        raise UserError(f"the annotations in {config.data.root} have no outlines: give --model.masks False")
    notes = []
    if config.model.masks is None and 0 < outlined <= others:
        notes.append(f"masks are not learned, for {others:,} of {outlined + others:,} objects have no outline")
    if masks and others:
        words = f"{others:,} objects without an outline"
        if config.data.mistakes == "error":
            raise UserError(f"{words} in {config.data.root}: --model.masks False learns boxes alone")
        notes.append(f"{words} are left out: --model.masks False learns all boxes")
        train, val = train.with_outlines(), None if val is None else val.with_outlines()
        train = train if config.data.empty_images else train.with_objects()
    notes += note_lost(train, config, masks)
    if val is None or not len(val.with_objects()):
        notes.append(
            "there are no " + ("images" if val is None else "objects") + " to evaluate on: give --data.val-root"
        )
        val = None
    scale_epochs(config, len(train), choose_devices(config.trainer, read_launch()).processes)
    model, more_notes = start_network(config, found, lambda: make_detector(config, train.classes, masks, found))
    notes += more_notes
    model.set_grad_checkpointing(config.model.grad_checkpointing)

    def make() -> Job:
        task = DetectionTask(
            model, config, recipe, train.classes, lambda rank, world: make_loader(config, train, masks, rank, world)
        )
        validation = None if val is None else DetectionValidation(task, config, val)
        shown = functools.cache(lambda: [i for _, i in read_some(val or train, SHOWN, config.data.max_pixels)])
        more = "" if val is None else f", {len(val):,} more to evaluate on"
        size = f"short side up to {config.data.img_size} px"
        return Job(
            task,
            lambda: draw_found(task, shown()),
            {"data": f"{len(train.classes)} classes{more}", "size": size},
            len(train),
            lambda path: save_network(path, task),
            validation,
            [model.backbone],  # the heads see as many boxes as there are
        )

    return run(config, recipe, lambda: notes, make)


def note_lost(train: DetectionImages, config: DetectionConfig, masks: bool) -> list[str]:
    """Name the objects that are too small to be trained on at the size of the run.

    Raises:
        UserError: all are.
    """
    lost = make_transform(config, masks).count_lost(train)
    if not lost:
        return []
    total = sum(not known["iscrowd"] for index in range(len(train)) for known in train.objects_of(index))
    words = (
        f"{lost:,} of {total:,} objects in {config.data.root} are under 1 pixel at --data.img-size "
        f"{config.data.img_size}, and are not learned: raise it, or cut the images into tiles"
    )
    if lost == total:
        raise UserError(words)
    return [words]


def make_transform(config: DetectionConfig, masks: bool) -> DetectionTransform:
    data = config.data
    return DetectionTransform(
        data.img_size,
        data.longest,
        scales=data.scales,
        crop_prob=data.crop_prob,
        large_scale_jitter=data.large_scale_jitter,
        hflip=data.hflip,
        interpolation=data.interpolation,
        masks=masks,
    )


def make_loader(
    config: DetectionConfig, images: DetectionImages, masks: bool, rank: int, world_size: int
) -> TrainingLoader:
    return make_training_loader(config, images, make_transform(config, masks), rank, world_size, collate=collect)


def view_whole(image: Tensor, known: dict[str, Any]) -> dict[str, Any]:
    """An image as it is evaluated: the network resizes it."""
    check_size(image, known)
    return {"image": image}


def make_batches(images: DetectionImages, config: DetectionConfig, rank: int = 0, world_size: int = 1) -> Any:
    """Every image once, as it is evaluated."""
    return make_evaluation_loader(
        images,
        view_whole,
        config.evaluation.batch_size,
        config.data.num_workers,
        rank,
        world_size,
        config.data.max_pixels,
        collate=collect,
    )


def draw_found(task: DetectionTask, images: list[Tensor]) -> Image.Image:
    """What the network finds in some images."""
    with eval_mode(task):  # one at a time: wide and high images together would be padded to squares
        found = [detect(task.model, task.normalize, [image.to(task.device)])[0] for image in images]
    return join_pictures(
        [draw_objects(image, one, task.classes, MIN_SCORE) for image, one in zip(images, found, strict=True)]
    )


class DetectionValidation(Evaluation):
    """COCO's figures of the network."""

    def __init__(self, task: DetectionTask, config: DetectionConfig, images: DetectionImages) -> None:
        self.masks = task.model.has_masks and images.has_outlines
        kinds = ("box", "mask") if self.masks else ("box",)
        super().__init__(
            [f"val_{kind}_{name}" for kind in kinds for name in ("ap", "ap50", "ap75")],
            config.evaluation.every_n_epochs,
        )
        self.task = task
        self.config = config
        self.images = images

    def evaluate(self, fabric: L.Fabric) -> dict[str, float]:
        skipped: list[tuple[str, str]] = []
        with fabric.autocast():
            results, seen = collect_detections(
                functools.partial(detect, self.task.model, self.task.normalize),
                self.images,
                make_batches(self.images, self.config, fabric.global_rank, fabric.world_size),
                self.task.device,
                skipped,
            )
        unread = self.name_skipped(fabric, skipped)
        results, seen = gather_detections(results, seen, fabric.world_size)
        if not seen:
            raise nothing_readable(unread)
        flat = score_detections(self.images, results, seen, self.masks).flat("val_")
        figures = {name: 0.0 if math.isnan(flat[name]) else flat[name] for name in self.metrics}
        self.score = figures["val_box_ap"]
        return figures

    def describe(self) -> dict[str, str]:
        rows = {}
        for kind, title in {"box": "boxes", "mask": "masks"}.items():
            shown = [
                f"{name.upper()} {100 * value:.1f}"
                for name in ("ap", "ap50", "ap75")
                if (value := self.metrics.get(f"val_{kind}_{name}")) is not None
            ]
            if shown:
                rows[title] = f"{', '.join(shown)} of {len(self.images):,} images"
        return rows
