"""Some channels of stored images, of any depth, as numbers from 0 to 1: what people and networks of photographs see."""

from collections.abc import Sequence

import torch
from torch import Tensor

from itpn.data.pixels import to_float
from itpn.errors import UserError

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
    images: Tensor, channels: Sequence[int], low: Sequence[float], high: Sequence[float], nodata: float | None = None
) -> Tensor:
    """Bring a range of values to [0, 1]; beyond it values are clipped, and pixels without data are 0.

    Args:
        images: [..., C, H, W] of any dtype.
        channels: those that are wanted, by index; one may come several times.
        low, high: one number for all C channels, or one for each.
        nodata: the value of pixels without data among integers; floats have NaN or infinity there.

    Returns:
        float32 [..., number of channels, H, W].
    """
    planes = []
    for channel in channels:
        values, least, most = images[..., channel, :, :], _pick(low, channel), _pick(high, channel)
        scaled = (to_float(values) - least) / max(most - least, TINY)
        planes.append(scaled.clamp(0, 1).float().masked_fill(~is_valid(values, nodata), 0.0))
    return torch.stack(planes, dim=-3)


def _pick(values: Sequence[float], channel: int) -> float:
    return values[0 if len(values) == 1 else channel]


def is_valid(values: Tensor, nodata: float | None) -> Tensor:
    """Where there are data: bool of the shape of the values.

    Args:
        values: as they are stored; ``nodata`` is among integers alone.
    """
    if values.is_floating_point():
        return values.isfinite()
    return torch.ones_like(values, dtype=torch.bool) if nodata is None else to_float(values) != nodata


def find_percentiles(
    images: Tensor, percents: tuple[float, float], nodata: float | None = None
) -> tuple[list[float], list[float]]:
    """Two percentiles of each channel of images [..., C, H, W], of all images together; 0 and 1 of one without data."""
    lows, highs = [], []
    for index in range(images.shape[-3]):
        values = images[..., index, :, :].flatten()
        values = values[:: max(1, values.numel() // SAMPLED)]
        values = to_float(values)[is_valid(values, nodata)]
        low, high = values.quantile(values.new_tensor(percents) / 100).tolist() if len(values) else (0.0, 1.0)
        lows.append(low)
        highs.append(high)
    return lows, highs
