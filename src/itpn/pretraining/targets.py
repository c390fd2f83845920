"""What the decoder is asked to predict."""

import torch
from torch import Tensor

from itpn.models.hivit import cut_units, pick_units


def unit_pixels(images: Tensor, unit: int, picked: Tensor | None = None) -> Tensor:
    """Pixels of each unit, or of the ``picked`` ones [B, V], in the order (row, column, channel).

    Args:
        images: [B, C, H, W].
        unit: side of a unit in pixels.

    Returns:
        [B, N or V, unit * unit * C].
    """
    return pick_units(cut_units(images, unit), picked).permute(0, 1, 3, 4, 2).flatten(2)


def normalize_units(pixels: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each unit by its own mean and unbiased variance (He et al. 2022, section 3).

    Args:
        pixels: [B, N, D].

    Returns:
        The normalised pixels [B, N, D], the mean and the standard deviation [B, N, 1], all float32.
    """
    pixels = pixels.float()
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    std = (variance + eps).sqrt()
    return (pixels - mean) / std, mean, std


def pixels_to_images(pixels: Tensor, grid: tuple[int, int], unit: int) -> Tensor:
    """Undo :func:`unit_pixels` for all units: [B, N, unit * unit * C] -> [B, C, H, W]."""
    batch = len(pixels)
    x = pixels.reshape(batch, *grid, unit, unit, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(batch, -1, grid[0] * unit, grid[1] * unit)
