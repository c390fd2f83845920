"""The feature pyramid that is pre-trained together with the backbone (Tian et al. 2023, section 3.2).

It works patch by patch, like stages 1 and 2 of the backbone, so masked patches can be dropped from it too.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from itpn.models.backbone import Backbone, check_intermediates
from itpn.models.layers import MlpBlock, WeightInit, initialize_linears, patches_to_map
from itpn.models.recompute import Recompute, run_block


class PatchSplit(nn.Module):
    """Split one token into 2x2: [B, N, r, c, C] -> [B, N, 2r, 2c, dim]."""

    def __init__(self, in_dim: int, dim: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_dim, eps=norm_eps)
        self.expansion = nn.Linear(in_dim, 4 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, rows, cols, _ = x.shape
        x = self.expansion(self.norm(x)).reshape(batch, count, rows, cols, 2, 2, -1)
        # row by row, unlike the merge, as in the published weights
        x = x.permute(0, 1, 2, 4, 3, 5, 6)  # [B, N, r, 2, c, 2, dim]
        return x.reshape(batch, count, 2 * rows, 2 * cols, -1)


class FeaturePyramid(nn.Module):
    """Top-down pyramid of strides 4, 8 and 16 over the stages of a backbone.

    Args:
        in_dims: channels of the three stages, finest first.
        width: channels of every level.
        depth: feed-forward blocks at strides 8 and 4 after the lateral sum.
    """

    def __init__(
        self,
        in_dims: tuple[int, int, int],
        width: int = 256,
        depth: int = 2,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        weight_init: WeightInit = "trunc_normal",
    ) -> None:
        super().__init__()
        self.width = width
        self.top = nn.Linear(in_dims[2], width) if in_dims[2] != width else nn.Identity()
        self.laterals = nn.ModuleList([nn.Linear(dim, width, bias=False) for dim in in_dims[:2]])
        self.splits = nn.ModuleList([PatchSplit(width, width, norm_eps), PatchSplit(in_dims[2], width, norm_eps)])
        blocks = [[MlpBlock(width, mlp_ratio, norm_eps=norm_eps) for _ in range(depth)] for _ in range(2)]
        self.blocks = nn.ModuleList([nn.Sequential(*level) for level in blocks])
        self.outputs = nn.ModuleList([MlpBlock(width, mlp_ratio, norm_eps=norm_eps) for _ in range(3)])
        self.grad_checkpointing: Recompute = False
        initialize_linears(self, weight_init)

    def forward(self, stages: list[Tensor]) -> list[Tensor]:
        """Backbone stages to pyramid levels, both with the finest first.

        Args:
            stages: [B, V, 4, 4, C/4], [B, V, 2, 2, C/2], [B, V, 1, 1, C].

        Returns:
            [B, V, 4, 4, width], [B, V, 2, 2, width], [B, V, 1, 1, width].
        """
        fine, middle, coarse = stages
        # stride 8 is split from the backbone's own output, not from the projected top level
        level8 = self.splits[1](coarse) + self.laterals[1](middle)  # [B, V, 2, 2, width]
        level8 = self._refine(self.blocks[1].children(), level8)
        level4 = self.splits[0](level8) + self.laterals[0](fine)  # [B, V, 4, 4, width]
        level4 = self._refine(self.blocks[0].children(), level4)
        levels = [level4, level8, self.top(coarse)]
        return [self._refine([output], level) for output, level in zip(self.outputs, levels, strict=True)]

    def _refine(self, blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
        for block in blocks:
            x = run_block(block, self.grad_checkpointing, x)
        return x


def nest_groups(groups: dict[str, Any]) -> dict[str, Any]:
    """The groups of timm's ``group_matcher`` for a network that has the matched one as its ``backbone``."""

    def inside(pattern: str) -> str:
        return "|".join(part.replace("^", r"^backbone\.", 1) for part in pattern.split("|"))

    blocks = groups["blocks"]
    nested = inside(blocks) if isinstance(blocks, str) else [(inside(pattern), order) for pattern, order in blocks]
    return {"stem": inside(groups["stem"]), "blocks": nested}


class TimmConventionsMixin:
    """timm's conventions for a network that has a backbone and heads: checkpointing, weight decay, layer groups."""

    backbone: Any

    def set_grad_checkpointing(self, enable: Recompute = True) -> None:
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The backbone's groups; everything else is one group after the last of them."""
        return nest_groups(self.backbone.group_matcher(coarse))


Levels = Literal["pyramid", "pooled", "joined"]
LEVELS = {"pyramid": 3, "pooled": 5, "joined": 4}  # number of maps for each choice of levels


class PyramidBackbone(TimmConventionsMixin, nn.Module):
    """A backbone and its pyramid, images to maps, for detectors and segmenters; tensor names are those of pre-training.

    It follows timm's conventions (``features_only=True``) and torchvision's: it returns an ``OrderedDict`` of maps and
    has ``out_channels``.

    Args:
        backbone: without a classifier (``num_classes=0``).
        levels: ``"pyramid"``: the pre-trained maps, strides 4, 8 and 16 for patch size 16. ``"pooled"``: also
            strides 32 and 64 by average pooling (Tian et al. 2023, section 4.2). ``"joined"``: the three
            concatenated with the backbone's own maps, and stride 32 by max pooling, as in the authors' code.
        width, depth, mlp_ratio, weight_init: see :class:`FeaturePyramid`.

    Raises:
        ValueError: there are no such levels.
    """

    pretrained_cfg: dict[str, Any]  # as in Backbone
    model_args: dict[str, Any]

    def __init__(
        self,
        backbone: Backbone,
        levels: Levels = "pyramid",
        width: int = 256,
        depth: int = 2,
        mlp_ratio: float = 4.0,
        weight_init: WeightInit = "trunc_normal",
    ) -> None:
        super().__init__()
        if levels not in LEVELS:
            raise ValueError(f"levels must be one of {', '.join(LEVELS)}, not {levels}")
        self.num_classes = 0
        self.global_pool = ""
        self.levels = levels
        self.backbone = backbone
        self.in_chans = backbone.in_chans
        dims = tuple(info["num_chs"] for info in backbone.feature_info)
        self.pyramid = FeaturePyramid(dims, width, depth, mlp_ratio, backbone.norm_eps, weight_init)
        self.num_features = self.head_hidden_size = width
        concatenated = levels == "joined"
        widths = [width + (dim if concatenated else 0) for dim in dims]
        widths += [widths[-1]] * (LEVELS[levels] - len(dims))
        first = backbone.feature_info[0]["reduction"]
        self.feature_info = [
            {"num_chs": channels, "reduction": first * 2**i, "module": f"pyramid.outputs.{min(i, 2)}"}
            for i, channels in enumerate(widths)
        ]
        # torchvision's heads take one number of channels; the concatenated maps differ in theirs
        self.out_channels: int | list[int] = widths if concatenated else width

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """Images [B, in_chans, H, W] -> maps of all levels, finest first."""
        grid = self.backbone.grid_of(x.shape[-2:])
        stages = self.backbone.forward_stages(x)
        maps = [patches_to_map(level, grid) for level in self.pyramid(stages)]  # [B, width, H/s, W/s] each
        if self.levels == "joined":
            own = [patches_to_map(stage, grid) for stage in stages]  # [B, C/4, H/4, W/4] to [B, C, H/16, W/16]
            maps = [torch.cat(pair, dim=1) for pair in zip(maps, own, strict=True)]
            return [*maps, F.max_pool2d(maps[-1], 2)]
        if self.levels == "pooled":
            for _ in range(2):
                maps.append(F.avg_pool2d(maps[-1], 2))
        return maps

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Maps by name, "0" the finest, as torchvision's detectors take them."""
        return OrderedDict((str(i), m) for i, m in enumerate(self.forward_maps(x)))

    # --- timm's conventions

    def forward_features(self, x: Tensor) -> list[Tensor]:
        return self.forward_maps(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of ``indices``; unless ``intermediates_only``, the list of all maps comes first."""
        check_intermediates(norm, output_fmt)
        maps = self.forward_maps(x)
        take, _ = feature_take_indices(len(maps), indices)
        taken = [maps[i].permute(0, 2, 3, 1) if output_fmt == "NHWC" else maps[i] for i in take]
        return taken if intermediates_only else (maps, taken)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop nothing: the finest level needs all coarser ones."""
        return feature_take_indices(len(self.feature_info), indices)[0]

    def set_grad_checkpointing(self, enable: Recompute = True) -> None:
        super().set_grad_checkpointing(enable)
        self.pyramid.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The backbone's groups, then the pyramid as a whole."""
        return super().group_matcher(coarse) | {"pyramid": r"^pyramid"}

    def get_classifier(self) -> nn.Module:
        return nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        check_no_classifier(num_classes, global_pool)


def check_no_classifier(num_classes: int, global_pool: str | None) -> None:
    if num_classes:
        raise ValueError(f"a pyramid has no classifier: num_classes must be 0, not {num_classes}")
    if global_pool:
        raise ValueError(f"a pyramid returns maps, which are not pooled: global_pool must be '', not {global_pool!r}")


def find_pyramid(model: nn.Module) -> FeaturePyramid | None:
    """The pyramid that a model has, or its backbone; None for none."""
    return next((module for module in model.modules() if isinstance(module, FeaturePyramid)), None)
