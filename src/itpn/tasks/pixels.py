"""What the pixels of a run's images are, and how they become the network's input: resolved from settings, a checkpoint
and the images, for every task alike."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from itpn.checkpoints.files import Checkpoint
from itpn.data.files import ImageSource
from itpn.data.image_type import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PHOTO,
    PHOTOGRAPH,
    ImageType,
    Pixels,
    check_nodata,
    dtype_range,
    is_resolved,
    to_option,
    to_pairs,
    to_percents,
)
from itpn.data.normalize import Normalize
from itpn.data.readers import FileReader, Reader
from itpn.data.samples import TRAINED, find_type
from itpn.data.statistics import DEFAULT_RANGE
from itpn.data.statistics_file import find_statistics
from itpn.data.stored import ReadSettings
from itpn.errors import UserError
from itpn.system.text import one_line
from itpn.tasks.statistics import reading_progress
from itpn.training.config import AnyConfig, check_images

STRETCHED = "float32"  # type of images that are stretched each by itself
# settings of data that images or a checkpoint fill in
RESOLVED = ("dtype", "axes", "value_range", "value_range_per_image", "nodata", "mean", "std")


def image_type(config: Any) -> ImageType:
    """Of resolved settings; photographs where they leave it open."""
    dtype = config.data.dtype or PHOTO
    return PHOTOGRAPH if dtype == PHOTO else ImageType(input_channels(config), dtype)


def input_channels(config: Any) -> int:
    """Of the network's input."""
    return config.model.in_chans or 3


def make_read_settings(config: Any, images: ImageSource | Reader | None = None) -> ReadSettings:
    """How images are read.

    Args:
        images: of the training set, of which the first is named in messages; None for others.
    """
    data = config.data
    kind = None if data.dtype is None else image_type(config)
    example = TRAINED if images is None else f"{example_of(images)} has"
    return ReadSettings(data.max_pixels, data.axes, data.nodata, find_stretch(data), kind, example)


def example_of(images: ImageSource | Reader) -> str:
    """What is called in messages the first image."""
    if isinstance(images, ImageSource) and not images.images:
        return f"the first image of {images.shards[0]}" if images.shards else "the first image"
    if not isinstance(images, ImageSource) and not len(images):
        return "the first image"
    files = FileReader(images.images[:1]) if isinstance(images, ImageSource) else images
    return files.name(0)


def find_stretch(data: Any) -> tuple[float, float] | None:
    """The percentiles of each image that settings of data ask for; None where they do not."""
    if not data.value_range_per_image:
        return None
    return to_percents(data.value_range or DEFAULT_RANGE)


def make_normalize(config: Any) -> Normalize:
    """From stored pixels to the network's input."""
    return Normalize(pixels_of(config), input_channels(config))


def pixels_of(config: Any) -> Pixels:
    """What the images of resolved settings are once they are read; ImageNet's mean and std where they leave it open."""
    settings = {name: getattr(config.data, name) for name in RESOLVED}
    return _make_pixels(image_type(config), input_channels(config), settings)


def _make_pixels(kind: ImageType, channels: int, settings: Mapping[str, Any]) -> Pixels:
    """Of the settings of `RESOLVED`.

    Args:
        channels: of the network, which may see photographs in grey.
    """
    channels = channels if kind.is_photo else kind.channels
    mean, std = imagenet_values(channels)
    mean, std = tuple(settings.get("mean") or mean), tuple(settings.get("std") or std)
    if settings.get("value_range_per_image"):  # the images are stretched when they are read
        return Pixels(ImageType(channels, STRETCHED), (0.0,), (1.0,), mean, std)
    value_range = settings.get("value_range") or ()
    resolved = is_resolved(value_range) and not kind.is_photo
    ranges = to_pairs(value_range, channels) if resolved else (dtype_range(kind),)
    low, high = zip(*ranges, strict=True)
    return Pixels(kind, low, high, mean, std, settings.get("nodata"))


def augmentation(config: Any) -> dict[str, Any]:
    """Arguments that the transforms of all tasks have for images of any channels."""
    data = config.data
    own = {name: getattr(data, name) for name in ("rotate90", "channel_jitter", "channel_drop")}
    return {**own, "pixels": pixels_of(config)}


def imagenet_values(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of ImageNet, for colour or grey."""
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return (sum(IMAGENET_MEAN) / 3,), (sum(IMAGENET_STD) / 3,)


def describe_pixels(config: Any) -> dict[str, Any]:
    """How pixels are prepared, for files of weights."""
    data = config.data
    kind, (mean, std) = image_type(config), imagenet_values(input_channels(config))
    own: dict[str, Any] = {"mean": data.mean or mean, "std": data.std or std}
    if kind.is_photo:
        return own
    more = {
        "axes": data.axes,
        "dtype": kind.dtype,
        "channels": kind.channels,
        "value_range": data.value_range,
        "nodata": data.nodata,
    }
    return own | more | ({"value_range_per_image": True} if data.value_range_per_image else {})


def stored_type(checkpoint: Checkpoint, channels: int = 3) -> ImageType:
    """Of the images that a checkpoint is of; photographs where its file does not say it.

    Args:
        channels: of its network.

    Raises:
        UserError: photographs do not have so many.
    """
    own = checkpoint.preprocessing
    if own.get("dtype", PHOTO) != PHOTO:
        return ImageType(int(own["channels"]), str(own["dtype"]))
    if channels not in (1, 3):
        raise UserError(
            f"checkpoint {checkpoint.source} is of images with {channels} channels, not of photographs, and does not "
            "say how they were normalized"
        )
    return PHOTOGRAPH


def stored_read_settings(checkpoint: Checkpoint, max_pixels: int) -> ReadSettings:
    """How the images are read that a checkpoint's network is used on."""
    own = checkpoint.preprocessing
    stretch = to_percents(own["value_range"]) if own.get("value_range_per_image") else None
    return ReadSettings(
        max_pixels,
        own.get("axes"),
        own.get("nodata"),
        stretch,
        stored_type(checkpoint),
        f"checkpoint {checkpoint.source} takes",
        "",
    )


def stored_normalize(checkpoint: Checkpoint, channels: int = 3) -> Normalize:
    """From stored pixels to the input of a checkpoint's network.

    Args:
        channels: of the network.

    Raises:
        UserError: as of :func:`stored_type`.
    """
    return Normalize(stored_pixels(checkpoint, channels), channels)


def stored_pixels(checkpoint: Checkpoint, channels: int = 3) -> Pixels:
    """What the images that a checkpoint is of are once they are read; args as of :func:`stored_normalize`."""
    return _make_pixels(stored_type(checkpoint, channels), channels, checkpoint.preprocessing)


def resolve_pixels(
    config: AnyConfig, images: ImageSource | Reader, stored: Mapping[str, Any] | None = None
) -> tuple[AnyConfig, list[str]]:
    """Settings with the type of the images, the channels of the network and, but for photographs, the images' own mean,
    std and value range, where they leave them open.

    Args:
        stored: how the pixels of a checkpoint were prepared: kept for images of the same type.

    Returns:
        The settings, and what is remarkable, a sentence each.

    Raises:
        UserError: images of another type than the settings say, that differ, or of which none can be read.
    """
    data, model = config.data, config.model
    kind, nodata, example = image_type(config), data.nodata, ""
    if not (data.dtype and model.in_chans):
        first, example = find_type(images, replace(make_read_settings(config), type=None))
        kind, nodata = first.type or kind, first.nodata
    if data.dtype not in (None, kind.dtype):
        settings = "photographs" if data.dtype == PHOTO else f"images of {data.dtype}"
        raise UserError(f"the settings are for {settings}, and {one_line(example)} has {kind}")
    check_nodata(data.nodata, kind)
    if kind.is_photo:
        config = replace(config, data=replace(data, dtype=PHOTO))
        check_images(config.data, input_channels(config))
        return config, []
    if model.in_chans not in (None, kind.channels):
        raise UserError(f"--model.in-chans is {model.in_chans}, and {one_line(example)} has {kind}: leave it out")
    data = replace(data, dtype=kind.dtype, nodata=nodata)
    config = replace(config, model=replace(model, in_chans=kind.channels), data=data)
    same = stored is not None and (stored.get("dtype"), stored.get("channels")) == (kind.dtype, kind.channels)
    if same and stored is not None and not data.value_range:
        config = replace(config, data=replace(config.data, **{**_stored_settings(stored), **_given_settings(data)}))
    notes: list[str] = []
    data = config.data
    if data.value_range_per_image and not data.value_range:
        data = replace(data, value_range=DEFAULT_RANGE)
    if data.mean is None or data.std is None or not (is_resolved(data.value_range) or data.value_range_per_image):
        with reading_progress() as progress:
            reading = make_read_settings(config, images)
            statistics, where, notes = find_statistics(images, reading, config.data.value_range, data, progress)
        notes += [*statistics.notes, statistics.describe(where, find_stretch(data))]
        values = {
            "mean": data.mean or round_all(statistics.scaled_mean),
            "std": data.std or round_all(statistics.scaled_std),
        }
        if not data.value_range_per_image:
            values |= {"value_range": to_option(statistics.value_range)}
        if data.nodata is None:
            values |= {"nodata": statistics.nodata}
        config = replace(config, data=replace(data, **values))
    if not config.data.value_range_per_image:
        to_pairs(config.data.value_range, kind.channels)
    check_images(config.data, kind.channels)
    return config, notes


def adopt_pixels(config: AnyConfig, stored: Mapping[str, Any], grey: bool = False) -> AnyConfig:
    """Settings with a checkpoint's preparation of pixels, where they leave it open; else ImageNet's mean and std.

    Args:
        stored: by the checkpoint; empty where there is none.
        grey: whether its network takes one channel.
    """
    data, model = config.data, config.model
    dtype = data.dtype or stored.get("dtype", PHOTO)
    own = _stored_settings(stored) if stored.get("dtype", PHOTO) == dtype else {}  # of images of the same depth
    channels = model.in_chans or (int(stored["channels"]) if own.get("dtype", PHOTO) != PHOTO else 1 if grey else 3)
    mean, std = imagenet_values(channels)
    for name, usual in {"mean": mean, "std": std}.items():
        own[name] = own[name] if len(own.get(name) or ()) in (1, channels) else usual
    model = replace(model, in_chans=model.in_chans or channels)
    return replace(config, model=model, data=replace(data, **{**own, "dtype": dtype, **_given_settings(data)}))


def _given_settings(data: Any) -> dict[str, Any]:
    return {name: getattr(data, name) for name in RESOLVED if getattr(data, name) not in (None, (), False)}


def _stored_settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain(stored[name]) for name in RESOLVED if name in stored}


def round_all(values: Sequence[float]) -> tuple[float, ...]:
    """To the digits that a config.yaml shows."""
    return tuple(float(f"{value:.6g}") for value in values)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
