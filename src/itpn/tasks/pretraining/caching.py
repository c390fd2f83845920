"""`itpn cache-features`: a recipe's teacher, run once over the images, into shards to train from."""

import dataclasses
import hashlib
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from itpn.data.cache import CacheIndex, read_index, shard_path, write_index, write_shard
from itpn.data.file_types import CACHE_INDEX
from itpn.data.files import ImageSource
from itpn.data.loader import TrainingLoader
from itpn.data.skipped import SkippedImages
from itpn.errors import MachineError, RunStopped, UserError
from itpn.system.console import Output, print_note, print_warnings
from itpn.system.writing import check_settings, writing_to
from itpn.tasks.augmentation import replace_colours
from itpn.tasks.pixels import adopt_pixels, describe_pixels, image_type, resolve_pixels
from itpn.tasks.pretraining.config import PretrainingConfig
from itpn.tasks.pretraining.data import make_frozen_teacher, make_loader, print_notes, show_to_teacher
from itpn.teachers.feature_teacher import FeatureTeacher
from itpn.training.config import freeze, image_size, to_dict
from itpn.training.launch import choose_precision

SHARD_SIZE = 512
CROP_SETTINGS = (
    "crop_scale",
    "crop_ratio",
    "interpolation",
    "hflip",
    "color_jitter",
    "rotate90",
    "channel_jitter",
    "channel_drop",
    "axes",
    "max_pixels",
    "shuffle_buffer",
    "samples_per_epoch",
)
AT_A_TIME = 64  # each image of a loader's process holds a file open until it is copied


def cache_features(config: PretrainingConfig, source: ImageSource, out: Path, views: int, half: bool) -> None:
    """Write crops and the teacher's features of ``views`` epochs; what is there already is kept.

    The crops are those that training with the same settings and seed would draw in its first epochs.

    Raises:
        UserError: no teacher to run, the folder cannot be written or holds features of other settings.
    """
    console = Output()
    if config.teacher.name in (None, "ema"):
        raise UserError("only features of an outside teacher can be cached: give --teacher.name, a model of timm")
    if config.data.window_size is not None:
        raise UserError("--data.window-size is not for features that are cached: leave it out")
    print_notes(source)
    config = _resolve(config, source)
    teacher = make_frozen_teacher(config)
    assert teacher is not None
    show_to_teacher(config, teacher)
    # one image a batch, so that none is left over at an epoch's end; of tar shards, one worker reads all
    workers = min(1, config.data.num_workers) if source.shards else config.data.num_workers
    one = replace(config.data, batch_size=1, num_workers=workers, decode="workers")
    loader = make_loader(replace(config, data=one), source, 0, 1, teacher.img_size)
    index = CacheIndex(
        teacher=teacher.name,
        checkpoint=config.teacher.checkpoint,
        width=teacher.width,
        img_size=image_size(config.data),
        patch_size=config.model.patch_size,
        images=loader.images,
        views=views,
        shard_size=SHARD_SIZE,
        settings={**_describe_crops(config, source), "half": half},
        sha256=teacher.sha256,
    )
    _open_folder(out, index)
    cuda = torch.cuda.is_available() and config.trainer.accelerator in ("auto", "gpu")
    teacher.to("cuda" if cuda else "cpu")
    skipped = SkippedImages(len(source.images) or None, config.data.max_corrupt)
    precision = choose_precision(config.trainer.precision, cuda)
    numbers = [n for n in range(index.shards) if not shard_path(out, n).exists()]
    if len(numbers) < index.shards:
        console.print(f"{index.shards - len(numbers)} of {index.shards} shards are there already", highlight=False)
    try:
        for number in track(numbers, "features", console=console, disable=not console.is_terminal):
            _write_shard(out, index, number, loader, teacher, precision, skipped)
    except RunStopped as stop:
        print_note(f"stopped with {_count(out, index)} of {index.shards} shards done; the same command resumes")
        stop.reported = True
        raise
    except MachineError as error:
        done = f"{_count(out, index)} of {index.shards} shards are done, the same command resumes"
        raise MachineError(f"{error} ({done})") from error
    finally:
        loader.close()
    with writing_to(out):
        write_index(out, replace(index, complete=True))
    gigabytes = sum(path.stat().st_size for path in out.glob("features-*")) / 1e9
    console.print(
        f"{index.samples:,} crops ({views} of each image) with features of {teacher.name}, {gigabytes:.3g} GB; "
        f"train from them with --data.root {out}",
        highlight=False,
        soft_wrap=True,
    )


def _resolve(config: PretrainingConfig, source: ImageSource) -> PretrainingConfig:
    """Settings with what the images are."""
    config, notes = resolve_pixels(config, source)
    config, replaced = replace_colours(adopt_pixels(config, {}))
    for note in [*notes, *replaced]:
        print_note(note)
    return freeze(config)


def _describe_crops(config: PretrainingConfig, source: ImageSource) -> dict[str, Any]:
    """What decides which crop of which image is where."""
    settings = {key: value for key, value in to_dict(config)["data"].items() if key in CROP_SETTINGS}
    if source.members:
        settings["members"] = list(source.members)
    if not image_type(config).is_photo:  # whose statistics training is to take over
        settings["pixels"] = json.loads(json.dumps(describe_pixels(config)))
    settings["teacher channels"] = config.teacher.channels and list(config.teacher.channels)
    names = "\n".join(os.path.abspath(path) for path in source.images or source.shards)
    return {**settings, "seed": config.seed, "files": hashlib.sha256(os.fsencode(names)).hexdigest()}


def _write_shard(
    out: Path,
    index: CacheIndex,
    number: int,
    loader: TrainingLoader,
    teacher: FeatureTeacher,
    precision: str,
    skipped: SkippedImages,
) -> None:
    """The crops of a shard and their features; the loader is moved there, if it is not there already."""
    begin = number * index.shard_size
    end = min(begin + index.shard_size, index.samples)
    epoch, batch = divmod(begin, len(loader))
    if loader.state_dict() != {"epoch": epoch, "batch": batch}:
        loader.load_state_dict({"epoch": epoch, "batch": batch})
    samples = itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), end - begin)
    dtype = torch.float16 if index.settings["half"] else torch.float32
    images, features, keys = [], [], []
    for views in iter(lambda: list(itertools.islice(samples, AT_A_TIME)), []):
        for message in skipped.update(item for sample in views for item in sample["corrupt"]):
            print_note(f"skipped {message}", Output())
        for sample in views:
            print_warnings(sample["warnings"], Output())
        view = "teacher_image" if "teacher_image" in views[0] else "image"
        shown = torch.cat([sample[view] for sample in views])
        features.append(_run(teacher, shown, precision).to(dtype).cpu())
        images.append(torch.cat([sample["image"] for sample in views]))
        keys += [key for sample in views for key in sample["key"]]
    with writing_to(out):
        write_shard(shard_path(out, number), torch.cat(images), torch.cat(features), keys)
    skipped.check(min(end, loader.images), epoch_ended=end >= loader.images)


def _count(out: Path, index: CacheIndex) -> int:
    """Shards that are there."""
    return sum(shard_path(out, number).exists() for number in range(index.shards))


def _open_folder(out: Path, index: CacheIndex) -> None:
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        if (out / CACHE_INDEX).exists():
            before, now = ({**dataclasses.asdict(i), **i.settings} for i in (read_index(out), index))
            other = {"complete", "settings"} | ({"sha256"} if before["sha256"] is None else set())
            check_settings(out, before, {k: v for k, v in now.items() if k not in other}, "features")
        write_index(out, index)


def _run(teacher: FeatureTeacher, images: Tensor, precision: str) -> Tensor:
    device = teacher.mean.device
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        return teacher(images.to(device)).float()
