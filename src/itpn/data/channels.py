"""Some channels of stored images, of any depth, as numbers from 0 to 1: what people and networks of photographs see."""

from collections.abc import Sequence

import torch
from torch import Tensor

from itpn.errors import UserError

Values = float | Sequence[float]  # one for all channels of an image, or one for each
WIDE = (torch.int32, torch.uint32, torch.int64, torch.uint64)
TINY = torch.finfo(torch.float32).tiny
SAMPLED = 2**20  # pixels of a channel whose percentiles stand for those of all


def check_channels(option: str, channels: Sequence[int], count: int) -> None:
    """Raise :class:`UserError` where images of ``count`` channels have none of a number that an option gives."""
    if outside := [index for index in channels if not 0 <= index < count]:
        has = "one channel, number 0" if count == 1 else f"{count} channels, 0 to {count - 1}"
        raise UserError(
            f"{option} {' '.join(map(str, channels))}: there is no channel {outside[0]}, the images have {has}"
        )


def scale_channels(
    images: Tensor, channels: Sequence[int], low: Values, high: Values, nodata: float | None = None
) -> Tensor:
    """Bring a range of values to [0, 1]; beyond it values are clipped, and pixels without data are 0.

    Args:
        images: [..., C, H, W] of any dtype.
        channels: those that are wanted, by index; one may come several times.
        low, high: of all C channels, or of each.
        nodata: the value of pixels without data, beside NaN and infinite ones.

    Returns:
        float32 [..., number of channels, H, W].
    """
    planes = []
    for channel in channels:
        values, least, most = images[..., channel, :, :], _pick(low, channel), _pick(high, channel)
        scaled = subtract(values, least) / max(most - least, TINY)
        planes.append(scaled.clamp(0, 1).masked_fill(~is_valid(values, nodata), 0.0))
    return torch.stack(planes, dim=-3)


def _pick(values: Values, channel: int) -> float:
    return values if isinstance(values, int | float) else values[channel]


def subtract(values: Tensor, low: float) -> Tensor:
    """``values - low`` in float32, which holds 24 of 32 bits: of such integers it is the difference that is rounded."""
    if values.dtype not in WIDE:
        return values.float() - low
    whole = round(low)
    return (values.long() - whole).float() - (low - whole)


def is_valid(values: Tensor, nodata: float | None) -> Tensor:
    """Where there are data: bool of the shape of the values, which are as they are stored."""
    if values.dtype in WIDE:
        return torch.ones_like(values, dtype=torch.bool) if nodata is None else values.long() != round(nodata)
    valid = values.float().isfinite()
    return valid if nodata is None else valid & (values.float() != nodata)


def find_percentiles(
    images: Tensor, percents: tuple[float, float], nodata: float | None = None
) -> tuple[list[float], list[float]]:
    """Two percentiles of each channel of images [..., C, H, W], of all images together; 0 and 1 of one without data."""
    lows, highs = [], []
    for index in range(images.shape[-3]):
        values = images[..., index, :, :].flatten()
        values = values[:: max(1, values.numel() // SAMPLED)]
        values = (values.long() if values.dtype in WIDE else values)[is_valid(values, nodata)]
        least = int(values.min()) if values.dtype in WIDE and len(values) else 0
        shifted = subtract(values, least)
        low, high = shifted.quantile(shifted.new_tensor(percents) / 100).tolist() if len(values) else (0.0, 1.0)
        lows.append(least + low)
        highs.append(least + high)
    return lows, highs
