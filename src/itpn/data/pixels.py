"""Pixels [C, H, W] of any number of channels and any depth: resizing, turning, and changes of single channels.

Photographs are uint8, and torchvision resizes them. Deeper pixels are computed with as floating-point numbers, float64
where float32 does not hold all values of their type, and returned in their own type. Pixels without data are NaN (or
infinite) in floats, and one value, `nodata`, in integers; they never enter the values of others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from itpn.data.image_type import Pixels

SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}  # which torch can move
NARROW = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.float16, torch.bfloat16, torch.float32)
PLANE = (-2, -1)


def resize_pixels(
    image: Tensor, size: Sequence[int], interpolation: str = "bicubic", nodata: float | None = None
) -> Tensor:
    """Resize an image with antialiasing.

    Bicubic overshoot is clamped to the smallest and largest value of each channel: it would make reflectances
    negative, raise a saturated sensor's ceiling, and let integers wrap. uint8 is left to torchvision, which clamps it
    to 0 and 255. Weights of pixels without data are left out; where they are more than half, the result has no data.

    Args:
        image: [C, H, W] of any type.
        size: height and width.
        interpolation: "bicubic" or "bilinear".
        nodata: the value of pixels without data among integers; NaN always is without.
    """
    if image.dtype == torch.uint8 and nodata is None:
        return resize(image, list(size), InterpolationMode(interpolation), antialias=True)
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    values = to_float(image)
    empty = find_empty(image, values, nodata)
    if empty is None:
        resized = _resize(values, size, interpolation)
        # in place, here and below: memory that is new costs more than the arithmetic
        for plane, low, high in zip(resized, values.amin(PLANE).tolist(), values.amax(PLANE).tolist(), strict=True):
            plane.clamp_(low, high)
        return to_stored(resized, None, image.dtype, nodata, clamped=True)
    inf = float("inf")
    low, high = values.masked_fill(empty, inf).amin(PLANE, True), values.masked_fill(empty, -inf).amax(PLANE, True)
    if (empty == empty[:1]).all():  # as a rule: a channel stands for all
        empty = empty[:1]
    weight = _resize((~empty).to(values.dtype), size, interpolation)
    resized = _resize(values.masked_fill(empty, 0), size, interpolation).div_(weight)
    return to_stored(resized.clamp_(low, high), weight < 0.5, image.dtype, nodata)


def _resize(values: Tensor, size: Sequence[int], interpolation: str) -> Tensor:
    """Resize floats [C, H, W]; torchvision does the same, in more steps."""
    return interpolate(values[None], tuple(size), mode=interpolation, align_corners=False, antialias=True)[0]


def turn(image: Tensor, quarters: int) -> Tensor:
    """Rotate [..., H, W] counterclockwise by a number of quarters of a circle."""
    return torch.rot90(_movable(image), quarters, PLANE).view(image.dtype) if quarters % 4 else image


def mirror(image: Tensor) -> Tensor:
    """Flip [..., H, W] horizontally."""
    return _movable(image).flip(-1).view(image.dtype)


def _movable(image: Tensor) -> Tensor:
    """The same bytes in a type that every version of torch can move about."""
    return image.view(SIGNED.get(image.dtype, image.dtype))


def adjust_channels(image: Tensor, brightness: Sequence[float], contrast: Sequence[float], pixels: Pixels) -> Tensor:
    """Change the brightness and contrast of each channel by its own factors, as torchvision does for grey images.

    Brightness scales the distance to the lower end of the value range, contrast that to the mean of the channel. Their
    order does not matter, for nothing is cut off in between.
    """
    values = to_float(image)
    empty = find_empty(image, values, pixels.nodata)
    low, bright, contrasted = (_column(part, values) for part in (pixels.low, brightness, contrast))
    if empty is None:
        mean = values.mean(PLANE, keepdim=True)
    else:
        mean = values.masked_fill(empty, 0).sum(PLANE, keepdim=True) / (~empty).sum(PLANE, keepdim=True).clamp(min=1)
    changed = low + bright * (mean + contrasted * (values - mean) - low)
    return to_stored(changed, empty, image.dtype, pixels.nodata)


def drop_channels(image: Tensor, channels: Sequence[int], pixels: Pixels) -> Tensor:
    """Fill whole channels with their mean, except where there is no data."""
    values = to_float(image).clone()
    empty = find_empty(image, values, pixels.nodata)
    values[list(channels)] = _column(pixels.stored_mean, values).expand(len(image), 1, 1)[list(channels)]
    return to_stored(values, empty, image.dtype, pixels.nodata)


def pad_pixels(image: Tensor, right: int, below: int, fill: Sequence[float], nodata: float | None = None) -> Tensor:
    """Pad [C, H, W] with one value for all channels, or one for each, rounded where the type is whole."""
    height, width = image.shape[-2:]
    colour = to_stored(_column(fill, to_float(image)), None, image.dtype, nodata)
    padded = colour.expand(len(image), height + below, width + right).contiguous()
    padded[:, :height, :width] = image
    return padded


def to_float(image: Tensor) -> Tensor:
    """The values in a type to compute in, which holds them exactly."""
    # reductions over channels that lie last in memory take twenty times as long
    dtype = torch.float32 if image.dtype in NARROW else torch.float64
    return image.to(dtype, memory_format=torch.contiguous_format).contiguous()


def find_empty(image: Tensor, values: Tensor, nodata: float | None) -> Tensor | None:
    """Which pixels are without data, bool [C, H, W]; None where all have some.

    Args:
        values: of :func:`to_float`.
    """
    if nodata is None and (not image.dtype.is_floating_point or values.sum().isfinite()):
        return None  # a sum is sixteen times as fast as looking at each
    empty = ~values.isfinite()
    if nodata is not None:
        empty |= values == nodata
    return empty if empty.any() else None


def to_stored(
    values: Tensor, empty: Tensor | None, dtype: torch.dtype, nodata: float | None, clamped: bool = False
) -> Tensor:
    """Undo :func:`to_float`, rounded and clamped to the type's range.

    Args:
        values: are changed.
        empty: pixels that get no data. No other gets the value that says so, but the one beside it.
        clamped: the values are within the type's range.
    """
    if dtype.is_floating_point:
        return (values if empty is None else values.masked_fill(empty, float("nan"))).to(dtype)
    limits = torch.iinfo(dtype)
    values = values.round_()
    if not clamped:
        values.clamp_(limits.min, limits.max)
    if nodata is not None:
        values = torch.where(values == nodata, nodata + (1 if nodata < limits.max else -1), values)
        if empty is not None:
            values = values.masked_fill_(empty, nodata)
    return values.to(dtype)


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    """Numbers of channels as [C, 1, 1], or one for all as [1, 1, 1]."""
    return torch.tensor(list(numbers), dtype=like.dtype, device=like.device).reshape(-1, 1, 1)
