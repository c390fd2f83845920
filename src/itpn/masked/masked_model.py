"""The masked image model: backbone, pyramid, heads and losses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from itpn.masked.decoder import AuxiliaryHead, Decoder, pick_tokens
from itpn.masked.masking import Split, count_masked, draw_block_mask, draw_random_mask, split_mask
from itpn.masked.targets import IMAGE_TARGETS, feature_error, normalize_patches, patchify, unpatchify
from itpn.models.backbone import Backbone
from itpn.models.layers import patches_to_map
from itpn.models.modes import eval_mode
from itpn.models.position import POSITIONS, Grid
from itpn.models.pyramid import FeaturePyramid
from itpn.models.recompute import Recompute

PYRAMID_LOSSES = ("pyramid_1", "pyramid_2", "pyramid_3")  # finest level first
Decoded = tuple[str, Tensor, Decoder | AuxiliaryHead]  # name of a loss, tokens, and the head that predicts from them


class MaskedOutput(NamedTuple):
    """What a masked model returns.

    Attributes:
        loss: scalar, the weighted sum of ``losses``; None where no target was given for any of them.
        losses: each part of the loss by name, not weighted: pixel, feature, auxiliary, pyramid_1 (finest) to 3.
        prediction, target: of the first of these that the model has, [B, N, D], row-major. In training mode, if its
            loss is of masked patches only, just those, [B, M, D]. For an image with fewer than M masked patches, they
            begin with visible ones, which do not count.
        mask: bool [B, N], True where masked.
    """

    loss: Tensor | None
    losses: dict[str, Tensor]
    prediction: Tensor
    target: Tensor | None
    mask: Tensor


@dataclass(frozen=True)
class Objective:
    """How patches are masked and what is predicted; see the settings of pre-training.

    Attributes:
        weights: of the losses by name, all above zero.
        masked_patches: drop masked patches from the backbone, or compute all with a mask token in their place from
            stage 3 on.
        masked_laterals: with mask tokens, let stages 1 and 2 of masked patches, which see their pixels, into the
            pyramid.
        norm_pix_loss: predict pixels normalized by mean and std of their patch.
        norm_pix_per: of all channels of a patch together, or of each channel.
        norm_pix_floor: of that std, see :func:`itpn.masked.targets.normalize_patches`.
        feature_patches: the patches that losses on features are computed on.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: {"pixel": 1.0})
    mask: Literal["random", "block"] = "random"
    mask_ratio: float = 0.75
    masked_patches: Literal["dropped", "mask_token"] = "dropped"
    masked_laterals: bool = False
    norm_pix_loss: bool = True
    norm_pix_per: Literal["patch", "channel"] = "patch"
    norm_pix_floor: float = 0.0
    feature_loss: str = "smooth_l1"
    feature_patches: Literal["all", "masked"] = "masked"

    @property
    def drops_patches(self) -> bool:
        return self.masked_patches == "dropped"

    def masked_only(self, *names: str) -> bool:
        """Whether all of these losses are of masked patches only."""
        return self.feature_patches == "masked" or all(name in IMAGE_TARGETS for name in names)


class MaskedImageModel(nn.Module):
    """iTPN's pre-training model (Tian et al. 2023, section 3) with any combination of its losses.

    Args:
        backbone: without a classifier (``num_classes=0``), which would not be used.
        decoder: predicts "pixel" and "feature" from all pyramid levels; None if there is neither loss.
        auxiliary: predicts "auxiliary" from the stage 3 block at three quarters of the depth.
        pyramid_heads: predict "pyramid_1" to "pyramid_3", each from its level.

    Raises:
        ValueError: losses and heads differ, or the mask ratio masks all patches or none.
    """

    def __init__(
        self,
        backbone: Backbone,
        pyramid: FeaturePyramid,
        decoder: Decoder | None,
        objective: Objective | None = None,
        auxiliary: AuxiliaryHead | None = None,
        pyramid_heads: Mapping[str, Decoder] | None = None,
    ) -> None:
        super().__init__()
        self.objective = objective = objective or Objective()
        count_masked(backbone.grid_size[0] * backbone.grid_size[1], objective.mask_ratio)
        self.backbone = backbone
        self.pyramid = pyramid
        self.decoder = decoder
        self.auxiliary = auxiliary
        self.pyramid_heads = nn.ModuleDict(dict(pyramid_heads or {}))
        self.pyramid_losses = tuple(self.pyramid_heads)  # torch.compile does not unpack a ModuleDict in every version
        predicted = [*(decoder.names if decoder else ()), *(["auxiliary"] if auxiliary else ()), *self.pyramid_heads]
        if set(predicted) != set(objective.weights):
            raise ValueError(f"losses {sorted(objective.weights)} do not fit heads {sorted(predicted)}")
        self.mask_token = None if objective.drops_patches else nn.Parameter(torch.zeros(1, 1, backbone.embed_dim))
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        self.tap = int(0.75 * backbone.depths[2]) if auxiliary else None
        heads = [*([decoder] if decoder else ()), *self.pyramid_heads.values()]
        # Without blocks in these heads, no information crosses a patch border after stage 3: losses of masked patches
        # need the pyramid of masked patches only.
        self.patch_wise = all(len(head.blocks) == 0 for head in heads) and objective.masked_only(
            *(name for name in objective.weights if name != "auxiliary")
        )

    def set_grad_checkpointing(self, enable: Recompute = True) -> None:
        self.backbone.set_grad_checkpointing(enable)
        for module in self.modules():
            if isinstance(module, FeaturePyramid | Decoder | AuxiliaryHead):
                module.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        own = {name for name, _ in self.named_parameters() if name.endswith((*POSITIONS, "mask_token"))}
        return own | {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    @property
    def feature_losses(self) -> list[str]:
        """The losses that need a teacher."""
        return [name for name in self.objective.weights if name not in IMAGE_TARGETS]

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        target: Tensor | Mapping[str, Tensor] | None = None,
        valid: Tensor | None = None,
    ) -> MaskedOutput:
        """Mask patches, predict them, and compute the losses.

        Args:
            images: normalized, [B, C, H, W].
            mask: bool [B, N], True = masked; if masked patches are dropped, the same number in every row. Drawn when
                None.
            target: [B, N, D], row-major, for every loss on features, or for the pixels if there is no other loss; or a
                dict of targets by the name of the loss. The model computes the target "pixel" itself; losses on
                features without a target are left out.
            valid: bool [B, 1, H, W] or [B, C, H, W], False where the images hold no data (and a number all the same,
                which the network sees). Such pixels enter neither a target's mean and std nor a loss, in which all
                others count alike; patches without any valid pixel enter no loss. None for all valid.

        Raises:
            ValueError: a mask, a target or the map of valid pixels has the wrong shape; the mask masks all patches or
                none; or masked patches are dropped and rows of the mask have different numbers of them.
        """
        grid = self.backbone.grid_of(images.shape[-2:])
        valid = None if valid is None else _check_valid(valid, images)
        mask, split = self._make_mask(images, mask, grid)
        given = self._name_targets(target)
        losses: dict[str, Tensor] = {}
        compared: list[tuple[Tensor, Tensor | None]] = []
        for name, tokens, head in self._decode(images, mask, split, grid):
            picked = self._pick(split, name)
            prediction = head.predict(name, tokens)
            known = None if valid is None else patchify(valid, self.backbone.patch_size, picked)  # [B, N or M, D]
            wanted = self._target(name, images, given, picked, known)
            compared.append((prediction, wanted))
            if wanted is None:
                continue
            if wanted.shape != prediction.shape:
                raise ValueError(f"target of {name!r} is {list(wanted.shape)}, not {list(prediction.shape)}")
            error = self._error(name, prediction, wanted, known)  # [B, N] or [B, M]
            counted = self._count(name, mask, picked, known)
            if counted is None:
                losses[name] = error.mean()
            else:
                losses[name] = (error * counted).sum() / counted.sum().clamp(min=1)
        weighted = [self.objective.weights[name] * part for name, part in losses.items()]
        return MaskedOutput(torch.stack(weighted).sum() if weighted else None, losses, *compared[0], mask)

    def _make_mask(self, images: Tensor, mask: Tensor | None, grid: Grid) -> tuple[Tensor, Split]:
        """The given mask or a drawn one, and its split into visible and masked patches."""
        patches = grid[0] * grid[1]
        if mask is None:
            mask = self.draw_mask(len(images), grid, images.device)
            masked = count_masked(patches, self.objective.mask_ratio)
        else:
            masked = _check_mask(mask, (len(images), patches), self.objective.drops_patches)
        return mask, split_mask(mask, patches - masked)

    def draw_mask(
        self, batch: int, grid: Grid, device: torch.device | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """A mask, bool [batch, N]; if masked patches are dropped, with the same number of them in every row."""
        objective, patches = self.objective, grid[0] * grid[1]
        if objective.mask == "random":
            return draw_random_mask(batch, patches, objective.mask_ratio, device, generator)
        masked = count_masked(patches, objective.mask_ratio)
        return draw_block_mask(batch, grid, masked, exact=objective.drops_patches, device=device, generator=generator)

    def _decode(self, images: Tensor, mask: Tensor, split: Split, grid: Grid) -> list[Decoded]:
        """For each loss its name, its tokens [B, N or M, width] (see :meth:`_pick`) and its head."""
        dropped = split if self.objective.drops_patches else None
        if dropped is not None:
            stages = self.backbone.forward_stages(images, split.visible, tap=self.tap)
        else:
            stages = self.backbone.forward_stages(images, mask=mask, mask_token=self.mask_token, tap=self.tap)
        levels, tapped = stages[:3], stages[3:]
        if dropped is None:
            picked = self._pick(split)
            if picked is not None:
                batch = torch.arange(len(picked), device=picked.device)[:, None]
                levels = [x[batch, picked] for x in levels]
                mask = mask.gather(1, picked)
            if not self.objective.masked_laterals:
                # stages 1 and 2 of a masked patch see the patch's pixels, which are the target
                levels[:2] = [x.masked_fill(mask[:, :, None, None, None], 0.0) for x in levels[:2]]
        levels = self.pyramid(levels)  # [B, P, 4, 4, F], [B, P, 2, 2, F], [B, P, 1, 1, F]; P patches: V, N or picked M
        decoded = []
        if self.decoder is not None:
            decoded += self._run_head(self.decoder, self.decoder.names, split, levels, grid)
        if self.auxiliary is not None:
            index = self.backbone.relative_positions(grid, None if dropped is None else split.order)
            decoded += self._run_head(self.auxiliary, ("auxiliary",), split, *tapped, grid, index)
        for name in self.pyramid_losses:
            head: Any = self.pyramid_heads[name]
            decoded += self._run_head(head, (name,), split, levels, grid)
        return decoded

    def _run_head(
        self, head: Decoder | AuxiliaryHead, names: tuple[str, ...], split: Split, *args: Any
    ) -> list[Decoded]:
        """As :meth:`_decode`, for the losses of one head."""
        dropped = split if self.objective.drops_patches else None
        masked_only = self._pick(split, *names) is not None
        tokens = head(*args, dropped, masked_only)
        return [
            (name, tokens if masked_only else pick_tokens(tokens, dropped, self._pick(split, name) is not None), head)
            for name in names
        ]

    def _pick(self, split: Split, *names: str) -> Tensor | None:
        """The patches [B, M] that losses are predicted for; None for all. Training predicts only those it compares."""
        possible = self.objective.drops_patches or (self.patch_wise and "auxiliary" not in names)
        if not self.training or not possible or not self.objective.masked_only(*names):
            return None
        return split.masked

    def _name_targets(self, given: Tensor | Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        weights = self.objective.weights
        if isinstance(given, Tensor):
            return dict.fromkeys(self.feature_losses or weights, given)
        if given is not None and any(name not in weights for name in given):
            raise ValueError(f"targets for {sorted(given)}, but the losses are {sorted(weights)}")
        return given or {}

    def _target(
        self, name: str, images: Tensor, given: Mapping[str, Tensor], picked: Tensor | None, valid: Tensor | None
    ) -> Tensor | None:
        """Target of a loss, of all patches [B, N, D] or of the picked ones [B, M, D]; None if none was given."""
        if name in given:
            target = given[name]
            return target if picked is None else target.gather(1, picked.unsqueeze(-1).expand(-1, -1, target.shape[-1]))
        if name not in IMAGE_TARGETS:
            return None
        target = IMAGE_TARGETS[name](images, self.backbone.patch_size, picked)
        if name != "pixel" or not self.objective.norm_pix_loss:
            return target.float()
        return self._normalize(target, valid)[0]

    def _normalize(self, pixels: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """:func:`normalize_patches` as the objective has it."""
        channels = self.backbone.in_chans if self.objective.norm_pix_per == "channel" else 1
        return normalize_patches(pixels, channels, self.objective.norm_pix_floor, valid)

    def _error(self, name: str, prediction: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
        """Error of each patch, [B, N] or [B, M]: the mean over its values, of pixels over the valid ones."""
        if name not in IMAGE_TARGETS:
            return feature_error(prediction, target, self.objective.feature_loss)
        difference = prediction.float() - target
        if name != "pixel" or valid is None:
            return difference.square().mean(dim=-1)
        return difference.masked_fill(~valid, 0.0).square().sum(dim=-1) / valid.sum(dim=-1).clamp(min=1)

    def _count(self, name: str, mask: Tensor, picked: Tensor | None, valid: Tensor | None) -> Tensor | None:
        """How much the error of each patch counts, [B, N] or [B, M]; None where all count alike.

        Args:
            valid: bool [B, N or M, D]. A patch counts by its number of valid values in the loss on pixels, and if it
                has any in other losses.
        """
        counted = None
        if self.objective.masked_only(name):
            counted = mask if picked is None else mask.gather(1, picked)
        if valid is None:
            return counted
        shown = valid.sum(dim=-1) if name == "pixel" else valid.any(dim=-1)
        return shown if counted is None else shown * counted

    @torch.no_grad()
    def reconstruct(
        self, images: Tensor, mask: Tensor | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct masked patches, in the range of ``images``.

        Args:
            images, mask, valid: as of :meth:`forward`.

        Returns:
            The images with masked patches set to zero (grey), the images with masked patches replaced by their
            predictions where they are valid, both [B, C, H, W], and the mask as a map, bool [B, 1, H, W]. Predictions
            of normalized pixels are scaled by mean and std of their patch, or of its channels.

        Raises:
            ValueError: the model predicts no pixels.
        """
        if "pixel" not in self.objective.weights:
            raise ValueError("this model predicts features, not pixels")
        output = self.forward_eval(images, mask, valid=valid)
        patch_size, grid = self.backbone.patch_size, self.backbone.grid_of(images.shape[-2:])
        pixels = output.prediction.float()
        if self.objective.norm_pix_loss:
            known = None if valid is None else patchify(_check_valid(valid, images), patch_size)
            _, mean, std = self._normalize(patchify(images, patch_size), known)
            pixels = pixels * std + mean
        predicted = unpatchify(pixels, grid, patch_size)  # [B, C, H, W]
        masked = self.mask_map(output.mask, grid)
        replaced = masked if valid is None else masked & valid
        return images.masked_fill(masked, 0.0), torch.where(replaced, predicted, images), masked

    @torch.no_grad()
    def forward_eval(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        target: Mapping[str, Tensor] | None = None,
        valid: Tensor | None = None,
    ) -> MaskedOutput:
        """:meth:`forward` in eval mode, whatever the model's mode; not compiled, for occasional visualizations."""
        with eval_mode(self):
            return self.forward(images, mask, target, valid)

    def mask_map(self, mask: Tensor, grid: Grid) -> Tensor:
        """bool [B, N] -> [B, 1, H, W]."""
        patch_size = self.backbone.patch_size
        masked = patches_to_map(mask[:, :, None, None, None], grid)  # [B, 1, rows, cols]
        return masked.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)

    def extract_feat(self, images: Tensor) -> tuple[Tensor]:
        """The last backbone stage as a map: images [B, C, H, W] -> ([B, C', H/16, W/16],)."""
        grid = self.backbone.grid_of(images.shape[-2:])
        return (patches_to_map(self.backbone.forward_stages(images)[2], grid),)

    def extract_pyramid(self, images: Tensor) -> tuple[Tensor, ...]:
        """The pyramid's maps, finest first: [B, width, H/4, W/4], [B, width, H/8, W/8], [B, width, H/16, W/16]."""
        grid = self.backbone.grid_of(images.shape[-2:])
        return tuple(patches_to_map(level, grid) for level in self.pyramid(self.backbone.forward_stages(images)))


def _check_mask(mask: Tensor, shape: tuple[int, int], equal: bool) -> int:
    """Masked patches per row (at most) of a mask given by the caller; reading it waits for the device."""
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise ValueError(f"mask must be bool {list(shape)} (image, patch), not {mask.dtype} {list(mask.shape)}")
    counts = mask.sum(dim=1)
    low, high = int(counts.min()), int(counts.max())
    if (equal and low != high) or low == 0 or high == shape[1]:
        same = "mask the same number of patches in every image, and " if equal else ""
        raise ValueError(f"a mask must {same}mask some patches, not all: found {low} to {high} of {shape[1]} masked")
    return high


def _check_valid(valid: Tensor, images: Tensor) -> Tensor:
    """The map of valid pixels of images [B, C, H, W], for each channel."""
    batch, channels, *size = images.shape
    if valid.dtype != torch.bool or valid.shape not in ((batch, 1, *size), (batch, channels, *size)):
        wanted = f"bool [{batch}, 1 or {channels}, {size[0]}, {size[1]}]"
        raise ValueError(f"valid must be {wanted}, not {valid.dtype} {list(valid.shape)}")
    return valid.expand(-1, channels, -1, -1)
