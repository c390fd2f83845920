"""What the network is asked to predict, and how far it is from it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from itpn.models.layers import image_to_patches, pick_patches


def unit_pixels(images: Tensor, unit: int, picked: Tensor | None = None) -> Tensor:
    """Pixels of each unit, or of the ``picked`` ones [B, V], in the order (row, column, channel).

    Args:
        images: [B, C, H, W].
        unit: side of a unit in pixels.

    Returns:
        [B, N or V, unit * unit * C].
    """
    return pick_patches(image_to_patches(images, unit), picked).permute(0, 1, 3, 4, 2).flatten(2)


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


def normalize_features(features: Tensor) -> Tensor:
    """Normalise each feature vector [..., D] by its own mean and deviation, in float32: LayerNorm without weights."""
    return F.layer_norm(features.float(), features.shape[-1:])


def feature_error(prediction: Tensor, target: Tensor, kind: str) -> Tensor:
    """How far predictions [B, N, D] are from a teacher's features, [B, N].

    Args:
        kind: ``"smooth_l1"`` as in the authors' code, ``"cosine"`` as in mmpretrain (minus the cosine, -1 at best), or
            ``"cross_entropy"``, mmpretrain's other one: it takes raw features for probabilities, which they are not.
    """
    prediction, target = prediction.float(), target.float()
    if kind == "smooth_l1":
        return F.smooth_l1_loss(prediction, target, reduction="none").mean(dim=-1)
    if kind == "cosine":
        return -F.cosine_similarity(prediction, target, dim=-1)
    if kind != "cross_entropy":
        raise ValueError(f"no feature loss {kind!r}; there are smooth_l1, cosine and cross_entropy")
    return -(target * prediction.log_softmax(dim=-1)).sum(dim=-1)
