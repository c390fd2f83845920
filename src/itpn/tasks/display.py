"""Images of any channels and depth as a person looks at them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from itpn.checkpoints.files import Checkpoint
from itpn.data.channels import check_channels, find_percentiles, is_valid, scale_channels
from itpn.data.image_type import PHOTOGRAPHS, Pixels
from itpn.tasks.pixels import pixels_of, stored_pixels

PERCENTS = (1.0, 99.0)  # of the values that become black and white


@dataclass(frozen=True)
class Display:
    """How images are shown; photographs as they are.

    Attributes:
        pixels: of the images; those without data are black.
        channels: that are red, green and blue, by index, or one in the colours of matplotlib's viridis. None for the
            first three; two are red and green, and one is grey.
        value_range: the values that become black and those that become white, one of each channel of the images; None
            for 1 % and 99 % of the values of the images that are shown.
    """

    pixels: Pixels = PHOTOGRAPHS
    channels: Sequence[int] | None = None
    value_range: tuple[Sequence[float], Sequence[float]] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """[..., C, H, W] as they are stored -> uint8 [..., 3, H, W].

        Raises:
            UserError: there is no such channel.
        """
        count = images.shape[-3]
        if self.channels is not None:
            check_channels("--data.show-channels", self.channels, count)
        shown = tuple(range(min(count, 3))) if self.channels is None else tuple(self.channels)
        if self.pixels.type.is_photo and len(shown) == 3:
            return images if shown == (0, 1, 2) else images[..., shown, :, :]
        low, high = self.value_range or self._find_range(images)
        scaled = scale_channels(images, shown, low, high, self.pixels.nodata)
        pixels = (scaled * 255).round().to(torch.uint8)
        if len(shown) == 1 and self.channels is not None:
            return _paint(pixels, images[..., shown[0], :, :], self.pixels.nodata)
        if len(shown) == 2:
            return torch.cat([pixels, torch.zeros_like(pixels[..., :1, :, :])], dim=-3)
        return pixels.expand(*pixels.shape[:-3], 3, -1, -1)

    def fit(self, images: Tensor) -> "Display":
        """The same for all images that are shown beside these, as what a network makes of them."""
        return self if self.pixels.type.is_photo else replace(self, value_range=self._find_range(images))

    def _find_range(self, images: Tensor) -> tuple[Sequence[float], Sequence[float]]:
        return find_percentiles(images, PERCENTS, self.pixels.nodata)


def make_display(config: Any) -> Display:
    """Of the images of resolved settings.

    Raises:
        UserError: these have no such channels.
    """
    pixels, channels = pixels_of(config), config.data.show_channels
    if channels is not None:
        check_channels("--data.show-channels", channels, pixels.type.channels)
    return Display(pixels, channels)


def stored_display(checkpoint: Checkpoint) -> Display:
    """As in the run that a checkpoint is of."""
    channels = (checkpoint.settings.get("data") or {}).get("show_channels")
    known = isinstance(channels, list) and len(channels) in (1, 3) and {*map(type, channels)} == {int}
    return Display(stored_pixels(checkpoint), channels if known else None)


def _paint(pixels: Tensor, values: Tensor, nodata: float | None) -> Tensor:
    """A channel uint8 [..., 1, H, W] in the colours of viridis, black without data."""
    from matplotlib import colormaps

    table = torch.from_numpy(colormaps["viridis"](np.arange(256), bytes=True)[:, :3].copy())  # [256, 3]
    painted = table.to(pixels.device)[pixels.squeeze(-3).long()].movedim(-1, -3)
    return painted * is_valid(values, nodata).unsqueeze(-3)
