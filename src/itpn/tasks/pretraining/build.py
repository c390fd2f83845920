"""From settings, images and a checkpoint to the parts of a pre-training run."""

from collections.abc import Sequence
from dataclasses import replace

from itpn.checkpoints.files import Checkpoint
from itpn.data.cache import read_index
from itpn.masked.masked_model import MaskedImageModel
from itpn.tasks.pretraining.config import PretrainingConfig
from itpn.tasks.pretraining.data import PretrainingData, make_loader
from itpn.tasks.pretraining.module import PretrainingTask
from itpn.tasks.pretraining.network import build_recipe
from itpn.tasks.pretraining.probe import ProbeEvaluator
from itpn.teachers.ema import EMATeacher
from itpn.training.config import describe_crops, image_size


def resolve(
    config: PretrainingConfig, found: Checkpoint | None, data: PretrainingData
) -> tuple[PretrainingConfig, Sequence[str]]:
    """The width of the teacher's features goes into the settings, for when the teacher is not there."""
    width = config.teacher.width
    if data.teacher is not None:
        width = data.teacher.width
    elif data.train.cache and config.teacher.name not in (None, "ema"):
        width = read_index(data.train.cache).width
    return replace(config, teacher=replace(config.teacher, width=width)), ()


def build_model(
    config: PretrainingConfig, data: PretrainingData, found: Checkpoint | None
) -> tuple[MaskedImageModel, list[str]]:
    return build_recipe(config, None, found)


def build_module(
    model: MaskedImageModel, config: PretrainingConfig, recipe: str, data: PretrainingData
) -> PretrainingTask:
    ema = EMATeacher(model, config.teacher.normalize) if config.teacher.name == "ema" else None
    size = None if data.teacher is None else data.teacher.img_size
    return PretrainingTask(
        model,
        config,
        recipe,
        lambda rank, world: make_loader(config, data.train, rank, world, size),
        ema or data.teacher,
    )


def build_evaluator(config: PretrainingConfig, data: PretrainingData) -> ProbeEvaluator | None:
    return None if data.val is None else ProbeEvaluator(config, *data.val)


def describe_data(config: PretrainingConfig, data: PretrainingData) -> dict[str, str]:
    kind = "cached features" if data.train.cache else "shards" if data.train.shards else "files"
    rows = {"data": kind, "size": describe_crops(image_size(config.data))}
    return rows if config.teacher.name is None else {"teacher": describe_teacher(config, data), **rows}


def describe_teacher(config: PretrainingConfig, data: PretrainingData) -> str:
    if config.teacher.name == "ema":
        return f"EMA of the network, momentum {config.teacher.momentum} to {config.teacher.momentum_end}"
    cache = data.train.cache
    where = f"features in {cache}" if cache else config.teacher.checkpoint or "weights of timm's hub"
    return f"{config.teacher.name}, {where}"
