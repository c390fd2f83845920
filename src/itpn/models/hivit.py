"""HiViT, the hierarchical vision transformer of iTPN.

Zhang et al., "HiViT: A Simpler and More Efficient Design of Hierarchical Vision Transformer", ICLR 2023;
Tian et al., "Integrally Pre-Trained Transformer Pyramid Networks", CVPR 2023, section 3.

An image is cut into *units* of 16x16 pixels. A unit holds 4x4 tokens in stage 1, 2x2 in stage 2 and one in
stage 3. Stages 1 and 2 have no attention, so nothing crosses a unit before stage 3, and hidden units can be left
out from the very first layer without a change to the visible ones. Hence the layout of every tensor here:
``[batch, units, rows, cols, channels]``, rows and cols inside the unit.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from itpn.models.position import (
    Grid,
    Resample,
    relative_position_index,
    resample_position_table,
    resample_relative_table,
    sincos_position_table,
)
from itpn.models.variants import BACKBONES


def cut_units(images: Tensor, unit: int) -> Tensor:
    """View images as their units, row-major, without copying: [B, C, H, W] -> [B, H/unit, W/unit, C, unit, unit]."""
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // unit, unit, width // unit, unit)
    return x.permute(0, 2, 4, 1, 3, 5)


def pick_units(units: Tensor, picked: Tensor | None) -> Tensor:
    """[B, rows, cols, ...] -> all units [B, N, ...], or those of ``picked`` [B, V]: only these are copied."""
    if picked is None:
        return units.flatten(1, 2)
    batch = torch.arange(len(units), device=units.device).unsqueeze(1)
    cols = units.shape[2]
    return units[batch, picked // cols, picked % cols]


class PatchEmbed(nn.Module):
    """Pixels to stage 1 tokens: a convolution of stride unit/4 (as a matrix product on visible units), then a norm."""

    def __init__(self, unit: int, in_chans: int, dim: int, norm_eps: float) -> None:
        super().__init__()
        self.unit = unit
        # kept as a convolution's weight, so that timm adapts it to other in_chans
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=unit // 4, stride=unit // 4)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        x = pick_units(cut_units(images, self.unit), visible)  # [B, V, C, unit, unit]
        batch, count, channels = x.shape[:3]
        x = x.reshape(batch, count, channels, 4, self.unit // 4, 4, self.unit // 4)
        x = x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)  # [B, V, 4, 4, C * (unit/4)^2]
        return self.norm(F.linear(x, self.proj.weight.flatten(1), self.proj.bias))  # [B, V, 4, 4, dim]


class Attention(nn.Module):
    """Multi-head self-attention, with a relative position bias where one is given."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, rel_pos_grid: Grid | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.rel_pos_grid = rel_pos_grid
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if rel_pos_grid is not None:
            offsets = (2 * rel_pos_grid[0] - 1) * (2 * rel_pos_grid[1] - 1)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, num_heads))

    def forward(self, x: Tensor, grid: Grid | None = None, rel_pos_index: Tensor | None = None) -> Tensor:
        """x [B, N, C]; rel_pos_index int64 [N, N] or [B, N, N] for units on ``grid``."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, C / heads] each
        bias = None
        if self.rel_pos_grid is not None:
            assert grid is not None
            assert rel_pos_index is not None
            table = resample_relative_table(self.relative_position_bias_table, self.rel_pos_grid, grid)
            bias = table[rel_pos_index].movedim(-1, -3).to(q.dtype)  # [(B,) heads, N, N]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))


class MlpBlock(nn.Module):
    """A residual feed-forward block: all there is in stages 1 and 2 and in the pyramid."""

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        drop_path: float = 0.0,
        init_values: float | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class TransformerBlock(nn.Module):
    """A pre-norm transformer block on units that hold one token: [B, N, C] -> [B, N, C]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        rel_pos_grid: Grid | None = None,
        drop_path: float = 0.0,
        init_values: float | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias, rel_pos_grid)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Grid | None = None, rel_pos_index: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), grid, rel_pos_index)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class PatchMerge(nn.Module):
    """Four neighbouring tokens to one of twice the width: [B, N, 2r, 2c, C] -> [B, N, r, c, 2C]."""

    def __init__(self, dim: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=norm_eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, rows, cols, dim = x.shape
        x = x.reshape(batch, count, rows // 2, 2, cols // 2, 2, dim)
        # column by column, (0, 0) (1, 0) (0, 1) (1, 1), as the published weights were trained
        x = x.permute(0, 1, 2, 4, 5, 3, 6).flatten(4)
        return self.reduction(self.norm(x))


class HiViT(nn.Module):
    """Hierarchical vision transformer with three stages of strides 4, 8 and 16 (for patch size 16).

    Follows timm's conventions for models; images [B, in_chans, H, W] may have any height and width that are
    multiples of the patch size, whatever ``img_size`` the position tables were made for.

    Args:
        img_size: image size in pixels (or height and width) of the stored position tables.
        patch_size: pixels of a unit's side, divisible by 4.
        embed_dim: channels C of stage 3; stages 1 and 2 have C/4 and C/2.
        depths: blocks per stage.
        num_heads: attention heads of stage 3.
        mlp_ratios: hidden width of the feed-forward layers over their input width, per stage.
        pos_embed: ``"fixed"`` keeps the table as it is initialised or loaded, ``"learned"`` trains it.
        pos_resample: ``"exact"``, or ``"legacy"`` for the public code's resampling (see
            :func:`resample_position_table`), which with hidden units takes place at native size too.
        rel_pos_bias: one relative position table per stage 3 block.
        init_values: initial layer scale, None for no layer scale.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 over all blocks.
        norm_eps: 1e-6 in pre-training; the public plain HiViT has 1e-5.
        weight_init: ``"xavier"`` (Xavier uniform linears, sine-cosine positions; pixel pre-training) or
            ``"trunc_normal"`` (deviation 0.02, output projections of block i divided by sqrt(2 i)).

    Raises:
        ValueError: the sizes do not fit one another.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["avg", ""] = "avg",
        embed_dim: int = 512,
        depths: Sequence[int] = (4, 4, 24),
        num_heads: int = 8,
        mlp_ratios: Sequence[float] = (3.0, 3.0, 4.0),
        qkv_bias: bool = True,
        pos_embed: Literal["fixed", "learned"] = "learned",
        pos_resample: Resample = "exact",
        rel_pos_bias: bool = False,
        init_values: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        weight_init: Literal["xavier", "trunc_normal"] = "trunc_normal",
    ) -> None:
        super().__init__()
        if patch_size % 4:
            raise ValueError(f"patch_size must be divisible by 4 (a unit holds 4x4 tokens), not {patch_size}")
        if embed_dim % 8 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be divisible by 8 and by num_heads={num_heads}, not {embed_dim}")
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.depths = tuple(depths)
        self.pos_resample = pos_resample
        self.grad_checkpointing = False
        self.grid_size = self.grid_of(img_size if isinstance(img_size, tuple | list) else (img_size, img_size))

        dims = (embed_dim // 4, embed_dim // 2, embed_dim)
        self.patch_embed = PatchEmbed(patch_size, in_chans, dims[0], norm_eps)
        self.pos_embed = nn.Parameter(
            sincos_position_table(self.grid_size, embed_dim), requires_grad=pos_embed == "learned"
        )
        rates = [drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        common: dict[str, Any] = {"init_values": init_values, "norm_eps": norm_eps}
        grid = self.grid_size if rel_pos_bias else None
        self.stages: Any = nn.ModuleList(  # of ModuleLists, which type checkers do not look into
            [
                nn.ModuleList(MlpBlock(dims[0], mlp_ratios[0], rates.pop(0), **common) for _ in range(depths[0])),
                nn.ModuleList(MlpBlock(dims[1], mlp_ratios[1], rates.pop(0), **common) for _ in range(depths[1])),
                nn.ModuleList(
                    TransformerBlock(dims[2], num_heads, mlp_ratios[2], qkv_bias, grid, rates.pop(0), **common)
                    for _ in range(depths[2])
                ),
            ]
        )
        self.merges = nn.ModuleList([PatchMerge(dim, norm_eps) for dim in dims[:2]])
        self.rel_pos_index: Tensor
        self.register_buffer("rel_pos_index", relative_position_index(self.grid_size), persistent=False)
        self.feature_info = [
            {"num_chs": dim, "reduction": max(patch_size // 4, 1) * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(dims)
        ]
        # mean over tokens, then norm, as the fine-tuned weights were trained
        self.fc_norm = nn.LayerNorm(embed_dim, eps=norm_eps) if num_classes else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.norm_eps = norm_eps
        self.init_weights(weight_init)

    def init_weights(self, how: Literal["xavier", "trunc_normal"]) -> None:
        initialize_linears(self, how)
        # a convolution over disjoint patches is a linear layer
        fan = self.patch_embed.proj.weight.flatten(1)
        nn.init.xavier_uniform_(fan) if how == "xavier" else trunc_normal_(fan, std=0.02)
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]  # always made with a bias
        if how == "trunc_normal":
            if self.pos_embed.requires_grad:
                trunc_normal_(self.pos_embed, std=0.02)
            blocks = [block for stage in self.stages for block in stage]
            for i, block in enumerate(blocks, start=1):
                layers = [block.mlp.fc2] + ([block.attn.proj] if isinstance(block, TransformerBlock) else [])
                for layer in layers:
                    layer.weight.data /= (2 * i) ** 0.5
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)

    # --- timm's conventions

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        tables = {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}
        return {"pos_embed"} | tables

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates: stem, then block by block; a merge goes with what it feeds."""
        return {
            "stem": r"^pos_embed|^patch_embed",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [(r"^stages\.(\d+)\.(\d+)", None), (r"^merges\.(\d+)", (99998,)), (r"^fc_norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Literal["avg", ""] | None = None) -> None:
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        kwargs: dict[str, Any] = {"device": self.pos_embed.device, "dtype": self.pos_embed.dtype}
        if num_classes and isinstance(self.fc_norm, nn.Identity):
            self.fc_norm = nn.LayerNorm(self.num_features, eps=self.norm_eps, **kwargs)
        self.head = nn.Linear(self.num_features, num_classes, **kwargs) if num_classes else nn.Identity()
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    # --- forward

    def grid_of(self, size: Sequence[int]) -> Grid:
        """Rows and columns of units in an image of this height and width; ValueError if they do not divide."""
        height, width = size
        if height % self.patch_size or width % self.patch_size or not height or not width:
            raise ValueError(
                f"image size {height}x{width} is not a multiple of the patch size {self.patch_size}; "
                f"pad or resize it, for example to {max(1, round(height / self.patch_size)) * self.patch_size}"
                f"x{max(1, round(width / self.patch_size)) * self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    def forward_stages(
        self,
        images: Tensor,
        visible: Tensor | None = None,
        last: int = 2,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        tap: int | None = None,
    ) -> list[Tensor]:
        """Run the stages on all units, or on the visible ones alone.

        Args:
            images: [B, in_chans, H, W].
            visible: int64 [B, V], the units to compute, row-major; None for all.
            last: index of the last stage to run.
            mask: bool [B, N] with all units computed: those whose stage 3 input becomes ``mask_token`` [1, 1, C].
            tap: index of the stage 3 block whose output is wanted as well.

        Returns:
            The output of each stage, stages 1 and 2 as they are before their merge:
            [B, V, 4, 4, C/4], [B, V, 2, 2, C/2], [B, V, 1, 1, C]; then that of block ``tap``, [B, V, C].
        """
        grid = self.grid_of(images.shape[-2:])
        x = self.patch_embed(images, visible)  # [B, V, 4, 4, C/4]
        outputs = []
        for i, stage in enumerate(self.stages[:2]):
            for block in stage:
                x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            outputs.append(x)
            if i == last:
                return outputs
            x = self.merges[i](x)
        x = x.flatten(1, 3)  # [B, V, C]
        if mask is not None:
            assert mask_token is not None
            x = torch.where(mask.unsqueeze(-1), mask_token.to(x.dtype), x)
        x = x + self._positions(grid, visible)
        index = self.relative_positions(grid, visible)
        tapped = []
        for i, block in enumerate(self.stages[2]):
            x = checkpoint(block, x, grid, index) if self.grad_checkpointing else block(x, grid, index)
            if i == tap:
                tapped.append(x)
        return [*outputs, x[:, :, None, None], *tapped]

    def _positions(self, grid: Grid, visible: Tensor | None) -> Tensor:
        # the public code takes "fewer tokens than stored" for another grid, so it resamples whenever units are hidden
        legacy = self.pos_resample == "legacy" and (visible is not None or grid != self.grid_size)
        table = resample_position_table(self.pos_embed, self.grid_size, grid, "legacy" if legacy else "exact")
        return table if visible is None else table[0, visible]  # [1, N, C] or [B, V, C]

    def relative_positions(self, grid: Grid, visible: Tensor | None) -> Tensor | None:
        """Rows of the relative position tables: of all units [N, N], or picked ones [B, V, V]; None without tables."""
        if not len(self.stages[2]) or self.stages[2][0].attn.rel_pos_grid is None:
            return None
        index = self.rel_pos_index
        if grid != self.grid_size:
            index = relative_position_index(grid).to(self.pos_embed.device)
        if visible is None:
            return index  # [N, N]
        return index[visible.unsqueeze(2), visible.unsqueeze(1)]  # [B, V, V]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = True,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Feature maps of the stages, as timm's models give them.

        Returns:
            Maps [B, C/4, H/4, W/4], [B, C/2, H/8, W/8], [B, C, H/16, W/16] for ``indices`` (all three by default),
            before the merges and without a norm; preceded by the last stage's tokens [B, N, C] unless
            ``intermediates_only``.
        """
        if norm:
            raise ValueError("HiViT has no norm between its stages to apply to intermediate features")
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, not {output_fmt}")
        take, last = feature_take_indices(3, indices)
        end = len(self.stages) - 1  # fewer than three stages are left after pruning
        stages = self.forward_stages(x, last=last if intermediates_only and stop_early else end)
        grid = self.grid_of(x.shape[-2:])
        maps = [units_to_map(stages[i], grid) for i in take]
        if output_fmt == "NHWC":
            maps = [m.permute(0, 2, 3, 1) for m in maps]
        return maps if intermediates_only else (stages[-1].flatten(1, 3), maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of ``indices``, and the classifier."""
        take, last = feature_take_indices(3, indices)
        self.stages = self.stages[: last + 1]
        self.merges = self.merges[:last]
        if prune_norm or prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0)
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> stage 3 tokens [B, N, C], row-major, without a norm."""
        return self.forward_stages(x)[-1].flatten(1, 3)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, N, C] -> logits [B, num_classes] (mean, norm, linear), or what goes into the linear layer."""
        if self.global_pool == "avg":
            x = x.mean(dim=1)
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def units_to_map(x: Tensor, grid: Grid) -> Tensor:
    """All units of an image to a map: [B, N, r, c, C] -> [B, C, rows * r, cols * c]."""
    batch, _, rows, cols, dim = x.shape
    x = x.reshape(batch, *grid, rows, cols, dim).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(batch, dim, grid[0] * rows, grid[1] * cols)


def initialize_linears(module: nn.Module, how: Literal["xavier", "trunc_normal"]) -> None:
    """Initialise every linear layer: weights as said, biases zero. Norms are made as they should be."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight) if how == "xavier" else trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


# --- variants, registered with timm


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({name: _cfg() for name in BACKBONES})


def _register(name: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> HiViT:
        feature_cfg = {"out_indices": kwargs.pop("out_indices", (0, 1, 2)), "feature_cls": "getter"}
        return build_model_with_cfg(HiViT, name, pretrained, feature_cfg=feature_cfg, **{**BACKBONES[name], **kwargs})

    entrypoint.__name__ = entrypoint.__qualname__ = name
    register_model(entrypoint)


for _name in BACKBONES:
    _register(_name)
