"""The images of a classifier's run: finding, augmenting, loading."""

import numpy as np

from itpn.data.augment import ClassificationTransform
from itpn.data.class_names import join_names
from itpn.data.labelled import LabelledImages, draw_fraction, find_labelled
from itpn.data.loader import TrainingLoader
from itpn.errors import UserError
from itpn.tasks.classification.config import ClassificationConfig
from itpn.tasks.data import NO_IMAGES, RunData, make_training_loader
from itpn.tasks.pixels import augmentation
from itpn.training.config import describe_crops, image_size


def find_data(config: ClassificationConfig) -> RunData:
    """The images to train on, as many as ``label_fraction`` says, and those to evaluate on."""
    data = config.data
    train, val = find_labelled(data.root, data.val_root, data.val_fraction, config.seed, data.members, data.bands)
    if data.label_fraction < 1:
        train = train.take(draw_fraction(train, data.label_fraction, config.seed))
    return RunData(train, val, tuple(describe_missing(train, val)))


def describe_missing(train: LabelledImages, val: LabelledImages | None) -> list[str]:
    """What was left out of the images, and what the accuracies will not say, a line each."""
    notes = [*dict.fromkeys((*train.notes, *(() if val is None else val.notes)))]
    if val is None:
        return [*notes, NO_IMAGES]
    lost = sorted({train.classes[label] for label in np.setdiff1d(train.labels, val.labels)})
    return [*notes, f"there are no images of {join_names(lost)} to evaluate on"] if lost else notes


def describe_data(config: ClassificationConfig, data: RunData) -> dict[str, str]:
    return {"data": f"{len(data.train.classes)} classes", "size": describe_crops(image_size(config.data))}


def make_transform(config: ClassificationConfig) -> ClassificationTransform:
    """The augmentation; UserError if there is none of that name, or it is not for such images."""
    data = config.data
    return ClassificationTransform(
        image_size(data),
        crop_scale=data.crop_scale,
        crop_ratio=data.crop_ratio,
        interpolation=data.interpolation,
        hflip=data.hflip,
        color_jitter=data.color_jitter,
        auto_augment=data.auto_augment,
        **augmentation(config),
    )


def make_loader(
    config: ClassificationConfig,
    images: LabelledImages,
    transform: ClassificationTransform,
    rank: int,
    world_size: int,
) -> TrainingLoader:
    """The training loader of a process; where images are mixed in pairs, its batches are even.

    Raises:
        UserError: there are not two images to mix.
    """
    data = config.data
    batch_size = data.batch_size
    if data.mixup or data.cutmix:  # in pairs: of a set smaller than a batch, an even number
        batch_size = min(batch_size, len(images) // world_size // 2 * 2)
        if not batch_size:
            raise UserError(
                f"{len(images)} images are too few to be mixed in pairs by {world_size} processes: give --data.mixup 0 "
                "--data.cutmix 0"
            )
    return make_training_loader(config, images, transform, rank, world_size, batch_size=batch_size)
