"""The masked model: backbone and pyramid on visible units, a decoder, a loss on hidden ones."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from itpn.models.hivit import HiViT, units_to_map
from itpn.models.pyramid import FeaturePyramid
from itpn.pretraining.decoder import PixelDecoder
from itpn.pretraining.masking import draw_random_mask, split_mask
from itpn.pretraining.targets import normalize_units, pixels_to_images, unit_pixels


class MaskedOutput(NamedTuple):
    """What a masked model returns.

    Attributes:
        loss: scalar, the weighted sum of ``losses``.
        losses: each part of the loss by name.
        prediction, target: [B, N, D] in unit order; in training mode the hidden units only, [B, M, D].
        mask: bool [B, N], True where hidden.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    prediction: Tensor
    target: Tensor
    mask: Tensor


class MaskedImageModel(nn.Module):
    """iTPN's pre-training model with pixel supervision (Tian et al. 2023, section 3).

    Args:
        backbone: its classifier is not used and should be left out (``num_classes=0``).
        mask_ratio: share of units hidden in each image.
        normalize_target: predict each unit normalised by its own mean and deviation.
    """

    def __init__(
        self,
        backbone: HiViT,
        pyramid: FeaturePyramid,
        decoder: PixelDecoder,
        mask_ratio: float = 0.75,
        normalize_target: bool = True,
    ) -> None:
        super().__init__()
        units = backbone.grid_size[0] * backbone.grid_size[1]
        if not 0 < int(units * (1 - mask_ratio)) < units:
            raise ValueError(f"mask_ratio {mask_ratio} leaves no visible or no hidden unit of {units}")
        self.backbone = backbone
        self.pyramid = pyramid
        self.decoder = decoder
        self.mask_ratio = mask_ratio
        self.normalize_target = normalize_target

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        names = {f"backbone.{name}" for name in self.backbone.no_weight_decay()}
        return names | {"decoder.pos_embed", "decoder.mask_token"}

    def forward(self, images: Tensor, mask: Tensor | None = None, target: Tensor | None = None) -> MaskedOutput:
        """Hide units, predict them, and measure the error.

        Args:
            images: normalised, [B, C, H, W].
            mask: bool [B, N], True = hidden, as many in every row; drawn by the model when None.
            target: [B, N, D] in unit order; the pixels of the units when None.

        Raises:
            ValueError: the mask has another shape, rows that hide different numbers of units, or hides all or none.
        """
        grid = self.backbone.grid_of(images.shape[-2:])
        units = grid[0] * grid[1]
        if mask is None:
            mask = draw_random_mask(len(images), units, self.mask_ratio, images.device)
            visible_count = int(units * (1 - self.mask_ratio))
        else:
            visible_count = _count_visible(mask, (len(images), units))
        visible, hidden = split_mask(mask, visible_count)

        levels = self.pyramid(self.backbone.forward_stages(images, visible))
        prediction = self.decoder(levels, visible, hidden, grid, hidden_only=self.training)

        picked = hidden if self.training else None
        if target is None:
            target = unit_pixels(images, self.backbone.patch_size, picked)
            target = normalize_units(target)[0] if self.normalize_target else target.float()
        elif self.training:
            target = target.gather(1, hidden.unsqueeze(-1).expand(-1, -1, target.shape[-1]))
        error = (prediction.float() - target).square().mean(dim=-1)  # [B, M] or [B, N]
        loss = error.mean() if self.training else (error * mask).sum() / mask.sum()
        return MaskedOutput(loss, {"pixel": loss}, prediction, target, mask)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures of a reconstruction, in the range of ``images``.

        Returns:
            The images with hidden units grey (zero), the prediction in place of hidden units, both [B, C, H, W], and
            the mask as a map, bool [B, 1, H, W]. Normalised predictions get their unit's own mean and deviation back.
        """
        training = self.training
        self.eval()
        try:
            output = self.forward(images, mask)  # not compiled: once in a while and for few images
        finally:
            self.train(training)
        unit, grid = self.backbone.patch_size, self.backbone.grid_of(images.shape[-2:])
        pixels = output.prediction.float()
        if self.normalize_target:
            _, mean, std = normalize_units(unit_pixels(images, unit))
            pixels = pixels * std + mean
        filled = pixels_to_images(pixels, grid, unit)
        hidden = units_to_map(output.mask[:, :, None, None, None], grid)
        hidden = hidden.repeat_interleave(unit, 2).repeat_interleave(unit, 3)
        return images.masked_fill(hidden, 0.0), torch.where(hidden, filled, images), hidden

    def extract_feat(self, images: Tensor) -> tuple[Tensor]:
        """The last backbone stage as a map: images [B, C, H, W] -> ([B, C', H/16, W/16],)."""
        return tuple(self.backbone.forward_intermediates(images, indices=[2], intermediates_only=True))

    def extract_pyramid(self, images: Tensor) -> tuple[Tensor, ...]:
        """The pyramid's maps, finest first: [B, width, H/4, W/4], [B, width, H/8, W/8], [B, width, H/16, W/16]."""
        grid = self.backbone.grid_of(images.shape[-2:])
        return tuple(units_to_map(level, grid) for level in self.pyramid(self.backbone.forward_stages(images)))


def _count_visible(mask: Tensor, shape: tuple[int, int]) -> int:
    """Visible units per row of a mask that somebody else drew; reading it waits for the device."""
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise ValueError(f"mask must be bool {list(shape)} (image, unit), not {mask.dtype} {list(mask.shape)}")
    counts = (~mask).sum(dim=1)
    low, high = int(counts.min()), int(counts.max())
    if low != high or low in (0, shape[1]):
        raise ValueError(
            f"a mask must leave the same number of units visible in every image, and hide some: found {low} to {high} "
            f"of {shape[1]}"
        )
    return low
