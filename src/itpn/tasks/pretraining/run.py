"""A pre-training run: its teacher, its images, its pictures."""

import functools
import itertools
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from itpn.checkpoints.files import read_checkpoint, save_weights
from itpn.checkpoints.loading import build_from, load_weights
from itpn.config import Config, image_size
from itpn.data.augment import EvaluationTransform, PretrainingTransform
from itpn.data.cache import FeatureCache, read_index
from itpn.data.evaluation import make_evaluation_loader, view_labelled
from itpn.data.files import ImageSource, find_training_images
from itpn.data.gpu_decoding import DeferredTransform, check_nvjpeg, collate_deferred
from itpn.data.labelled import LabelledImages, draw_share, find_labelled
from itpn.data.loader import TrainingLoader, stack
from itpn.data.shards import check_shards
from itpn.errors import UserError
from itpn.metrics.classification import collect_features
from itpn.metrics.features import knn_accuracy, linear_accuracy
from itpn.seeding import derive_seed
from itpn.system.console import print_aside
from itpn.tasks.drawing import draw_predictions, read_whole_images
from itpn.tasks.pretraining.module import PretrainingTask
from itpn.teachers.ema import MovingAverageTeacher
from itpn.teachers.timm_teacher import FeatureTeacher, build_teacher
from itpn.training.data import describe_size, make_training_loader
from itpn.training.evaluation import Evaluation
from itpn.training.launch import choose_devices, read_launch
from itpn.training.loop import Run, fit
from itpn.training.state import Job


def pretrain(config: Config, recipe: str, source: ImageSource | None = None, run: Run = fit) -> Path:
    """Start or resume a pre-training run; see :func:`itpn.training.loop.fit`.

    Args:
        source: the images, where they have been looked for already.
        run: what to do, instead of training.
    """
    images = source or find_training_images(config.data.root, config.data.members)
    tell_what_is_left_out(images)
    if config.data.decode == "gpu" and (images.cache or not choose_devices(config.trainer, read_launch()).cuda):
        what = "is not for cached features" if images.cache else "needs a GPU, and none is used here"
        raise UserError(f"--data.decode gpu {what}: leave it out")
    if config.data.decode == "gpu":
        check_nvjpeg()
    if images.cache:
        check_cache(config, images.cache)
    sets = find_probe_sets(config)
    teacher = None if images.cache else make_frozen_teacher(config)
    torch.manual_seed(derive_seed(config.seed, "weights"))
    model = build_from(config)

    def load() -> list[str]:
        path = config.model.checkpoint
        if path is None:
            return []
        return [f"starting from the weights of {path}", *load_weights(model, read_checkpoint(path))]

    def make() -> Job:
        average = MovingAverageTeacher(model, config.teacher.normalize) if config.teacher.name == "ema" else None
        task = PretrainingTask(
            model,
            config,
            recipe,
            lambda rank, world: make_loader(config, images, rank, world, teacher.img_size if teacher else None),
            average or teacher,
        )

        watcher = None if sets is None else FeatureProbe(task, config, *sets)
        samples = functools.cache(lambda: read_samples(images, config))

        def save(path: Path) -> dict[str, str]:
            whole = model
            if config.trainer.strategy == "fsdp":  # the other processes have gone, with their parts; the file is whole
                whole = build_from(config)
                load_weights(whole, read_checkpoint(path.parent / "checkpoints" / "last.ckpt"))
            save_weights(path, whole, recipe, config)
            return {}

        kind = "cached features" if images.cache else "shards" if images.shards else "files"
        return Job(
            task,
            lambda: draw_predictions(task, samples()),
            {
                **({"teacher": describe_teacher(config, images)} if config.teacher.name else {}),
                "data": kind,
                "size": describe_size(image_size(config.data)),
            },
            len(images.images) or None,
            save,
            watcher,
            [model] if average is None else [model, average],
            compile_by_default=config.trainer.strategy == "ddp",
        )

    return run(config, recipe, load, make)


def tell_what_is_left_out(source: ImageSource) -> None:
    """Say once which images, of those that were looked for, are not read."""
    notes = list(source.notes)
    if source.shards:
        notes += check_shards(source.shards, source.members)
    if read_launch().main:
        for note in notes:
            print_aside(note)


def find_probe_sets(config: Config) -> tuple[LabelledImages, LabelledImages] | None:
    """Labelled images to learn from and to be asked about, evenly from those of the probe's root."""
    if config.probe.root is None:
        return None
    train, val = find_labelled((config.probe.root,), val_share=0.2, seed=config.seed)
    assert val is not None
    count = config.probe.max_images
    first, second = (draw_share(images, min(1.0, count / len(images)), config.seed) for images in (train, val))
    return train.take(first), val.take(second)


class FeatureProbe(Evaluation):
    """Asks nearest neighbours and a linear classifier of frozen features how far the backbone has come."""

    def __init__(self, task: PretrainingTask, config: Config, known: LabelledImages, asked: LabelledImages) -> None:
        super().__init__(["probe_knn", "probe_linear"], config.probe.every_n_epochs)
        self.task = task
        self.config = config
        self.sets = known, asked

    def evaluate(self, fabric: L.Fabric) -> dict[str, float]:
        data, task = self.config.data, self.task
        transform = EvaluationTransform(image_size(data), 1.0, data.interpolation)
        skipped: list[tuple[str, str]] = []
        columns: list[Tensor] = []
        rank, processes = fabric.global_rank, fabric.world_size
        with fabric.autocast():
            for images in self.sets:
                batches = make_evaluation_loader(
                    images,
                    functools.partial(view_labelled, transform),
                    data.batch_size,
                    data.num_workers,
                    rank,
                    processes,
                    data.max_pixels,
                )
                columns += collect_features(
                    task.model.backbone, task.normalize, batches, task.device, skipped, processes
                )
        self.name_skipped(fabric, skipped)
        with torch.random.fork_rng(devices=[]):  # a new layer draws weights, of which training must not notice
            known, labels, asked, answers = columns
            return {
                "probe_knn": knn_accuracy(known, labels, asked, answers),
                "probe_linear": linear_accuracy(known, labels, asked, answers),
            }

    def describe(self) -> dict[str, str]:
        knn, linear = self.metrics["probe_knn"], self.metrics["probe_linear"]
        return {"probe": f"{knn:.1%} by nearest neighbours, {linear:.1%} by a linear classifier"}


def make_frozen_teacher(config: Config) -> FeatureTeacher | None:
    """The outside teacher that a run needs, if any, with its weights; its width goes into the settings.

    Raises:
        UserError: its weights cannot be had, or its units cannot match the student's.
    """
    name = config.teacher.name
    if name is None or name == "ema":
        return None
    rows, cols = (side // config.model.patch_size for side in image_size(config.data))
    teacher = build_teacher(name, config.teacher.checkpoint, (rows, cols))
    if config.teacher.width not in (None, teacher.width):
        raise UserError(f"--teacher.width is {config.teacher.width}, but {name} has {teacher.width}: leave it out")
    config.teacher.width = teacher.width
    return teacher


def check_cache(config: Config, folder: str) -> None:
    """Refuse cached crops and features that are not what the settings ask for; their width goes into the settings."""
    index = read_index(folder)
    asked = {"--data.img-size": image_size(config.data), "--model.patch-size": config.model.patch_size}
    held = {"--data.img-size": index.img_size, "--model.patch-size": index.patch_size}
    if config.teacher.name not in (None, "ema"):
        # not the file of its weights, which need not be there any more
        asked["--teacher.name"], held["--teacher.name"] = config.teacher.name, index.teacher
        config.teacher.width = index.width
    for option, value in asked.items():
        if value != held[option]:
            raise UserError(f"{folder} holds features for {option} {held[option]}, not {value}")


def make_loader(
    config: Config,
    source: ImageSource,
    rank: int,
    world_size: int,
    teacher_size: tuple[int, int] | None = None,
) -> TrainingLoader:
    """Args as of :class:`TrainingLoader`; ``teacher_size`` is that of a second view, in pixels."""
    data = config.data
    transform = PretrainingTransform(
        image_size(data),
        scale=data.crop_scale,
        ratio=data.crop_ratio,
        interpolation=data.interpolation,
        hflip=data.hflip,
        color_jitter=data.color_jitter,
        teacher_size=teacher_size,
    )
    on_gpu = data.decode == "gpu"
    return make_training_loader(
        config,
        source,
        DeferredTransform(transform) if on_gpu else transform,
        rank,
        world_size,
        collate=collate_deferred if on_gpu else stack,
        shuffle_buffer=data.shuffle_buffer,
        samples_per_epoch=data.samples_per_epoch,
    )


def read_samples(source: ImageSource, config: Config, count: int = 8) -> Tensor:
    """The images of the pictures: readable ones from all over the data, uint8 [n, 3, H, W]."""
    if source.cache:
        return FeatureCache(source.cache).first(count)
    if source.images:
        stride = max(1, len(source.images) // count)
        source = ImageSource(images=source.images[::stride] + source.images)
    reasons: list[str] = []
    images = read_whole_images(source, image_size(config.data), config.data.max_pixels, reasons.append)
    chosen = [image for _, image in itertools.islice(images, count)]
    if not chosen:
        first = f"; the first is {reasons[0]}" if reasons else ""
        raise UserError(f"none of the images in {', '.join(config.data.root)} can be read{first}")
    return torch.stack(chosen)


def describe_teacher(config: Config, source: ImageSource) -> str:
    if config.teacher.name == "ema":
        return f"moving average, {config.teacher.momentum} to {config.teacher.momentum_end} kept at each step"
    where = f"features in {source.cache}" if source.cache else config.teacher.checkpoint or "weights of timm's hub"
    return f"{config.teacher.name}, {where}"
