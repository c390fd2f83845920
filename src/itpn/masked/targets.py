"""Targets of the losses, and the error of predictions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from itpn.models.layers import image_to_patches, pick_patches


def patchify(images: Tensor, patch_size: int, picked: Tensor | None = None) -> Tensor:
    """Pixels of each patch, or of the ``picked`` ones [B, V], in the order (row, column, channel).

    Args:
        images: [B, C, H, W].
        patch_size: pixels of a patch's side, p.

    Returns:
        [B, N or V, p * p * C].
    """
    x = pick_patches(image_to_patches(images, patch_size), picked)  # [B, N or V, C, p, p]
    return x.permute(0, 1, 3, 4, 2).flatten(2)


# losses whose targets are made of the images, not of a teacher's features: by name a function of normalized images
# [B, C, H, W], the patch size and the picked patches (None for all) to targets [B, N or V, D]
IMAGE_TARGETS: dict[str, Callable[[Tensor, int, Tensor | None], Tensor]] = {"pixel": patchify}


def normalize_patches(
    pixels: Tensor, channels: int = 1, floor: float = 0.0, valid: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize each patch by its own mean and unbiased variance (He et al. 2022, section 3).

    Args:
        pixels: [B, N, D], the channels of a pixel side by side.
        channels: 1 for one mean and variance a patch, as published; the number of the images' channels for one of each.
        floor: added to the standard deviation in quadrature, so that noise in flat patches stays small.
        valid: bool [B, N, D], the pixels that mean and variance are of; None for all.

    Returns:
        The normalized pixels, mean and std, all float32 [B, N, D]; mean and std of all channels together are [B, N, 1].
    """
    x = pixels.float()
    groups = x if channels == 1 else x.unflatten(-1, (-1, channels)).transpose(-1, -2)  # [B, N, D] or [B, N, C, D / C]
    if valid is None:
        variance, mean = torch.var_mean(groups, dim=-1, keepdim=True)
    else:
        picked = valid if channels == 1 else valid.unflatten(-1, (-1, channels)).transpose(-1, -2)
        variance, mean = _masked_var_mean(groups, picked)
    std = (variance + (eps + floor**2)).sqrt()
    if channels > 1:  # [B, N, C, 1] -> [B, N, D]
        mean, std = (v.squeeze(-1).repeat(1, 1, pixels.shape[-1] // channels) for v in (mean, std))
    return (x - mean) / std, mean, std


def _masked_var_mean(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """As `torch.var_mean` over the last dimension, of the valid values alone; 0 where there are none, or too few."""
    count = valid.sum(dim=-1, keepdim=True)
    mean = x.masked_fill(~valid, 0.0).sum(dim=-1, keepdim=True) / count.clamp(min=1)
    squares = (x - mean).masked_fill(~valid, 0.0).square().sum(dim=-1, keepdim=True)
    return squares / (count - 1).clamp(min=1), mean


def unpatchify(pixels: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Undo :func:`patchify` for all patches: [B, N, p * p * C] -> [B, C, H, W]."""
    batch = len(pixels)
    x = pixels.reshape(batch, *grid, patch_size, patch_size, -1).permute(0, 5, 1, 3, 2, 4)  # [B, C, rows, p, cols, p]
    return x.reshape(batch, -1, grid[0] * patch_size, grid[1] * patch_size)


def normalize_features(features: Tensor) -> Tensor:
    """Normalize each feature vector [..., D] by its own mean and std, in float32: LayerNorm without weights."""
    return F.layer_norm(features.float(), features.shape[-1:])


def feature_error(prediction: Tensor, target: Tensor, kind: str) -> Tensor:
    """Error of predictions [B, N, D] against a teacher's features: [B, N].

    Args:
        kind: ``"smooth_l1"`` as in the authors' code; ``"cosine"`` as in mmpretrain (the negative cosine, at best -1);
            or ``"cross_entropy"``, mmpretrain's alternative, which treats raw features as if they were probabilities.

    Raises:
        ValueError: there is no such loss.
    """
    prediction, target = prediction.float(), target.float()
    if kind == "smooth_l1":
        return F.smooth_l1_loss(prediction, target, reduction="none").mean(dim=-1)
    if kind == "cosine":
        return -F.cosine_similarity(prediction, target, dim=-1)
    if kind != "cross_entropy":
        raise ValueError(f"no feature loss {kind!r}; feature losses are smooth_l1, cosine and cross_entropy")
    return -(target * prediction.log_softmax(dim=-1)).sum(dim=-1)
