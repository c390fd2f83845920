"""Augmentation that fits the images of a run: what it knows of their pixels, and what stands in for colours."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from itpn.checkpoints.files import Checkpoint
from itpn.data.augment import check_photographs
from itpn.data.image_type import PHOTO, is_resolved, to_pairs
from itpn.data.pixels import PixelValues
from itpn.data.statistics import dtype_range
from itpn.tasks.pixels import image_type, imagenet_values, input_channels, stored_type
from itpn.training.config import AnyConfig

# Recipes' augmentation of colours, what it is off, and the channel jitter that takes its place: None for that of its
# own strength. RandAugment's is the colour jitter that timm uses without it; that of photometric distortion, which
# changes brightness by up to 0.125 and contrast by up to 0.5 in every other image, has the same root mean square.
COLOURS: dict[str, tuple[Any, float | None]] = {
    "color_jitter": (0.0, None),
    "auto_augment": (None, 0.4),
    "photometric": (False, 0.25),
}


def pixel_values(config: Any) -> PixelValues:
    """Of resolved settings."""
    data, kind = config.data, image_type(config)
    mean = data.mean or imagenet_values(input_channels(config))[0]
    if kind.is_photo:
        return PixelValues(mean=tuple(255 * value for value in mean))
    ranges = (
        to_pairs(data.value_range, kind.channels)
        if is_resolved(data.value_range)
        else (dtype_range(kind),) * kind.channels
    )
    means = mean * kind.channels if len(mean) == 1 else mean
    return PixelValues(
        photographs=False,
        channels=kind.channels,
        dtype=getattr(torch, kind.dtype),
        low=tuple(low for low, _ in ranges),
        high=tuple(high for _, high in ranges),
        mean=tuple(low + value * (high - low) for value, (low, high) in zip(means, ranges, strict=True)),
        nodata=data.nodata,
    )


def stored_values(checkpoint: Checkpoint, channels: int) -> PixelValues:
    """Of the images that a checkpoint's network is used on, as far as their evaluation has to know it.

    Args:
        channels: of the network.
    """
    kind = stored_type(checkpoint, channels)
    if kind.is_photo:
        return PixelValues()
    nodata = checkpoint.preprocessing.get("nodata")
    return PixelValues(False, kind.channels, getattr(torch, kind.dtype), nodata=nodata)


def replace_colours(config: AnyConfig, given: Collection[str] = ()) -> tuple[AnyConfig, list[str]]:
    """Resolved settings whose augmentation of colours is replaced by channel jitter where images are no photographs.

    Args:
        given: names of settings of data that are not the recipe's, but were asked for.

    Returns:
        The settings, and what was replaced, in a sentence.

    Raises:
        UserError: it was asked for.
    """
    data = config.data
    off = {name: value for name, (value, _) in COLOURS.items() if getattr(data, name, value) != value}
    if not off or getattr(data, "dtype", None) in (None, PHOTO):
        return config, []
    kind = image_type(config)
    for name in off:
        if name in given:
            check_photographs(pixel_values(config), _option(name), "--data.channel-jitter")
    strength = data.channel_jitter or max(COLOURS[name][1] or getattr(data, name) for name in off)
    note = (
        f"{' and '.join(map(_option, off))} of the recipe {'are' if len(off) > 1 else 'is'} for photographs: images of "
        f"{kind} are augmented by --data.channel-jitter {strength:g}"
    )
    return replace(config, data=replace(data, **off, channel_jitter=strength)), [note]


def _option(name: str) -> str:
    return f"--data.{name.replace('_', '-')}"
