"""The images of a pre-training run, the teacher that sees them too, and the labelled images of its probe."""

import functools
import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from itpn.data.augment import PretrainingTransform, center_crop
from itpn.data.batches import stack
from itpn.data.cache import FeatureCache, read_index
from itpn.data.evaluation import read_some
from itpn.data.files import ImageSource, find_training_images
from itpn.data.gpu_decoding import GpuTransform, check_nvjpeg, collate_encoded
from itpn.data.labelled import LabelledImages, draw_fraction, find_labelled
from itpn.data.loader import TrainingLoader
from itpn.data.readers import FileReader
from itpn.data.shards import check_shards
from itpn.data.windows import Windows
from itpn.errors import UserError
from itpn.tasks.data import RunData, find_windows, make_training_loader, print_once
from itpn.tasks.pixels import augmentation, image_type, make_read_settings, pixels_of
from itpn.tasks.prediction import read_images
from itpn.tasks.pretraining.config import PretrainingConfig
from itpn.teachers import AUTO
from itpn.teachers.feature_teacher import TEACHERS, FeatureTeacher, RGBView, choose_channels
from itpn.teachers.timm_teacher import build_teacher, hash_weights
from itpn.training.config import describe_crops, image_size
from itpn.training.launch import choose_devices, read_launch

SAMPLES = 8


@dataclass(frozen=True)
class PretrainingData(RunData):
    """Images without labels.

    Attributes:
        train: files, shards or cached crops with features.
        val: labelled images of the probe, to learn from and to be tested on; None without a probe.
        windows: of large images, in place of ``train``; None for whole images.
        teacher: a frozen network that gives targets; None for none, the EMA of the network itself, or cached features.
    """

    train: ImageSource
    val: tuple[LabelledImages, LabelledImages] | None = None
    teacher: FeatureTeacher | None = None
    windows: Windows | None = None

    @property
    def count(self) -> int | None:
        return len(self.windows or self.train.images) or None


def find_data(config: PretrainingConfig, source: ImageSource | None = None) -> PretrainingData:
    """What a run trains on.

    Args:
        source: the images, where they have been looked for already.

    Raises:
        UserError: no images, features of other settings, no weights of the teacher, no GPU that decodes.
    """
    images = source or find_training_images(config.data.root, config.data.members, config.data.bands)
    print_notes(images)
    if config.data.decode == "gpu":
        if images.cache or not choose_devices(config.trainer, read_launch()).cuda:
            what = "is not for cached features" if images.cache else "needs a GPU, and none is used here"
            raise UserError(f"--data.decode gpu {what}: leave it out")
        check_nvjpeg()
    if images.cache:
        check_cache(config, images.cache)
    teacher = None if images.cache else make_frozen_teacher(config)
    if config.data.window_size is not None and not images.images:
        raise UserError("--data.window-size is for images in files, not for shards or cached features: leave it out")
    windows, notes = find_windows(config, FileReader(images.images))
    return PretrainingData(images, find_probe_sets(config), notes, teacher, windows)


def describe_data(config: PretrainingConfig, data: PretrainingData) -> dict[str, str]:
    kind = "cached features" if data.train.cache else "shards" if data.train.shards else "files"
    rows = {"data": kind, "size": describe_crops(image_size(config.data))}
    return rows if config.teacher.name is None else {"teacher": describe_teacher(config, data), **rows}


def describe_teacher(config: PretrainingConfig, data: PretrainingData) -> str:
    name = config.teacher.name if data.teacher is None else data.teacher.name
    if name == "ema":
        return f"EMA of the network, momentum {config.teacher.momentum} to {config.teacher.momentum_end}"
    cache = data.train.cache
    where = f"features in {cache}" if cache else config.teacher.checkpoint
    if where is None:
        where = "a teacher of your own" if name in TEACHERS else "weights of timm's hub"
    return f"{name}, {where}"


def print_notes(source: ImageSource) -> None:
    """Say once which images, of those that were looked for, are not read."""
    notes = list(source.notes)
    if source.shards:
        notes += check_shards(source.shards, source.members)
    for note in notes:
        print_once(note)


def find_probe_sets(config: PretrainingConfig) -> tuple[LabelledImages, LabelledImages] | None:
    """Labelled images to learn from and to evaluate on, evenly from those of the probe's root."""
    if config.probe.root is None:
        return None
    train, val = find_labelled((config.probe.root,), val_fraction=0.2, seed=config.seed, bands=config.data.bands)
    assert val is not None
    count = config.probe.max_images
    first, second = (draw_fraction(images, min(1.0, count / len(images)), config.seed) for images in (train, val))
    return train.take(first), val.take(second)


def make_frozen_teacher(config: PretrainingConfig) -> FeatureTeacher | None:
    """The outside teacher that a run needs, if any, with its weights; their licence is printed where it is known.

    Raises:
        UserError: its weights cannot be had or are others than the run's, or its patches cannot match the student's.
    """
    name = config.teacher.name
    if name is None or name == "ema":
        return None
    rows, cols = (side // config.model.patch_size for side in image_size(config.data))
    teacher = build_teacher(name, config.teacher.checkpoint, (rows, cols))
    if config.teacher.width not in (None, teacher.width):
        raise UserError(f"--teacher.width is {config.teacher.width}, but {name} has {teacher.width}: leave it out")
    if None not in (config.teacher.sha256, teacher.sha256) and config.teacher.sha256 != teacher.sha256:
        raise UserError(
            f"the weights of teacher {teacher.name} have the SHA-256 {teacher.sha256}, not {config.teacher.sha256}: "
            "give those weights, or others to a run of another --name"
        )
    if teacher.licence is not None:
        print_once(f"licence of the weights of teacher {teacher.name}: {teacher.licence}")
    return teacher


def show_to_teacher(config: PretrainingConfig, teacher: FeatureTeacher) -> None:
    """Have a teacher of photographs see what the images of resolved settings are.

    Raises:
        UserError: which channels it is to see has to be said, or there are no such channels.
    """
    kind = image_type(config)
    channels = choose_channels(teacher.name, config.teacher.channels, kind.channels)
    # a teacher sees photographs as they are
    teacher.view = None if kind.is_photo and channels == (0, 1, 2) else RGBView(channels, pixels_of(config))


def check_cache(config: PretrainingConfig, folder: str) -> None:
    """Refuse cached crops and features of other settings."""
    index = read_index(folder)
    wanted = {"--data.img-size": image_size(config.data), "--model.patch-size": config.model.patch_size}
    held = {"--data.img-size": index.img_size, "--model.patch-size": index.patch_size}
    if config.teacher.name not in (None, "ema", AUTO):
        # not the file of its weights, which need not be there any more
        wanted["--teacher.name"], held["--teacher.name"] = config.teacher.name, index.teacher
    if index.sha256 is not None and config.teacher.checkpoint is not None:
        wanted["weights of the SHA-256"] = hash_weights(config.teacher.checkpoint)
    elif index.sha256 is not None and config.teacher.sha256 is not None:
        wanted["weights of the SHA-256"] = config.teacher.sha256
    held["weights of the SHA-256"] = index.sha256
    for option, value in wanted.items():
        if value != held[option]:
            raise UserError(f"{folder} holds features for {option} {held[option]}, not {value}")


def make_loader(
    config: PretrainingConfig,
    source: ImageSource | Windows,
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
        **augmentation(config),
    )
    on_gpu = GpuTransform(transform) if data.decode == "gpu" else None
    return make_training_loader(
        config,
        source,
        on_gpu or transform,
        rank,
        world_size,
        collate=collate_encoded if on_gpu else stack,
        finish_batch=on_gpu and on_gpu.finish_batch,
        shuffle_buffer=data.shuffle_buffer,
        samples_per_epoch=data.samples_per_epoch,
    )


def read_samples(source: ImageSource | Windows, config: PretrainingConfig, count: int = SAMPLES) -> Tensor:
    """Readable images from all over the data, at the size of crops, [n, C, H, W] as they are stored."""
    crop = functools.partial(center_crop, img_size=image_size(config.data), nodata=pixels_of(config).nodata)
    reading = make_read_settings(config, source)
    if isinstance(source, Windows):
        return torch.stack([crop(image) for _, image in read_some(source, count, reading)])
    if source.cache:
        return FeatureCache(source.cache).first(count)
    if source.images:
        stride = max(1, len(source.images) // count)
        source = replace(source, images=source.images[::stride] + source.images)
    images = read_images(replace(source, roots=config.data.root), reading, crop, lambda line: None)
    return torch.stack([image for _, image in itertools.islice(images, count)])
