"""HiViT, the hierarchical vision transformer of iTPN, and its faster relative, the backbone of Fast-iTPN.

Zhang et al., "HiViT: A Simpler and More Efficient Design of Hierarchical Vision Transformer", ICLR 2023;
Tian et al., "Integrally Pre-Trained Transformer Pyramid Networks", CVPR 2023, section 3;
Tian et al., "Fast-iTPN: Integrally Pre-Trained Transformer Pyramid Network with Token Migration", TPAMI 2024.

An image is cut into *units* of 16x16 pixels. A unit holds 4x4 tokens in stage 1, 2x2 in stage 2 and one in
stage 3. Stages 1 and 2 have no attention, so nothing crosses a unit before stage 3, and hidden units can be left
out from the very first layer without a change to the visible ones. Hence the layout of every tensor here:
``[batch, units, rows, cols, channels]``, rows and cols inside the unit.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp, to_2tuple, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import global_pool_nlc
from torch import Tensor, nn

from itpn.models.naming import detect_layout, to_ours
from itpn.models.position import (
    Grid,
    Resample,
    relative_position_index,
    resample_offsets,
    resample_position_table,
    resample_relative_table,
    same_grid,
    sincos_position_table,
    square,
)
from itpn.models.recompute import Recompute, recompute_cheap, run_block
from itpn.models.scripting import Traced
from itpn.models.windows import Windows, pick_distinct, put_back, take

QkvBias = bool | Literal["qv"]
GlobalPool = Literal["avg", "max", "avgmax", ""]
POSITIONS = ("pos_embed", "relative_position_bias_table", "rel_pos_h", "rel_pos_w")  # ends of names, never decayed
WeightInit = Literal["xavier", "trunc_normal"]


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

    def __init__(self, unit: int, in_chans: int, dim: int, norm_eps: float | None) -> None:
        super().__init__()
        self.unit = unit
        # kept as a convolution's weight, so that timm adapts it to other in_chans
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=unit // 4, stride=unit // 4)
        self.norm = nn.LayerNorm(dim, eps=norm_eps) if norm_eps is not None else nn.Identity()

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        x = pick_units(cut_units(images, self.unit), visible)  # [B, V, C, unit, unit]
        batch, count, channels = x.shape[:3]
        x = x.reshape(batch, count, channels, 4, self.unit // 4, 4, self.unit // 4)
        x = x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)  # [B, V, 4, 4, C * (unit/4)^2]
        return self.norm(F.linear(x, self.proj.weight.flatten(1), self.proj.bias))  # [B, V, 4, 4, dim]


class Attention(nn.Module):
    """Multi-head self-attention, with a relative position bias where one is given.

    Args:
        qkv_bias: ``"qv"`` leaves it out of the keys, which it cannot matter to (Fast-iTPN).
        rel_pos_grid: rows and columns of units that the relative position tables are made for; None for no bias.
        decomposed: instead of a bias for each offset, a vector for each offset of rows and one for each of columns,
            multiplied with the query (Li et al. 2022, "MViTv2", section 4.1; the published detectors).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: QkvBias = True,
        rel_pos_grid: Grid | None = None,
        decomposed: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.rel_pos_grid = rel_pos_grid
        self.decomposed = decomposed
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias is True)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "qv" else None
        self.proj = nn.Linear(dim, dim)
        if rel_pos_grid is not None:
            rows, cols = (2 * side - 1 for side in rel_pos_grid)
            if decomposed:
                self.rel_pos_h = nn.Parameter(torch.zeros(rows, dim // num_heads))
                self.rel_pos_w = nn.Parameter(torch.zeros(cols, dim // num_heads))
            else:
                self.relative_position_bias_table = nn.Parameter(torch.zeros(rows * cols, num_heads))

    def forward(
        self,
        x: Tensor,
        grid: Grid | None = None,
        rel_pos_index: Tensor | None = None,
        windows: Windows | None = None,
        skip: int = 0,
    ) -> Tensor:
        """What tokens see in one another.

        Args:
            x: [B, N, C].
            rel_pos_index: int64 [N, N] or [B, N, N] for units on ``grid``.
            windows: of gathering.
            skip: the first so many tokens are seen, but what they see is not asked for.

        Returns:
            [B, N - skip, C].
        """
        batch, tokens, dim = x.shape
        qkv_bias: Tensor | None = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        qkv = qkv.reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, C / heads] each
        q = q[:, :, skip:]
        bias = None
        if self.rel_pos_grid is not None:
            assert grid is not None
            assert rel_pos_index is not None
            bias = self._relative_bias(q, grid, rel_pos_index[..., skip:, :])
        if windows is not None:
            k, v, bias = windows.share(k), windows.share(v), windows.mask
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens - skip, dim))

    def _relative_bias(self, q: Tensor, grid: Grid, index: Tensor) -> Tensor:
        """What is added to the scores, queries by keys: [(B,) heads, N - skip, N]."""
        assert self.rel_pos_grid is not None
        if not self.decomposed:
            table = resample_relative_table(self.relative_position_bias_table, self.rel_pos_grid, grid)
            return table[index].movedim(-1, -3).to(q.dtype)
        stored = (self.rel_pos_h, self.rel_pos_w)
        tables = [resample_offsets(table, 2 * side - 1) for table, side in zip(stored, grid, strict=True)]
        cols = 2 * grid[1] - 1
        index = (index if index.dim() == 3 else index[None])[:, None]  # [1 or B, 1, N - skip, N]
        index = index.expand(*q.shape[:3], -1)
        row_offset = index // cols
        offsets = (row_offset, index - row_offset * cols)  # no %, which torch.onnx cannot write with open sizes
        # the query is not scaled here, as the published weights were trained
        parts = [(q @ t.to(q.dtype).T).gather(-1, offset) for t, offset in zip(tables, offsets, strict=True)]
        return parts[0] + parts[1]


class GatedMlp(nn.Module):
    """SwiGLU (Shazeer 2020) with both projections in one product, and a norm before the last: [..., C] -> [..., C]."""

    def __init__(self, dim: int, hidden: int, norm_eps: float | None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.norm = nn.LayerNorm(hidden, eps=norm_eps) if norm_eps is not None else nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.fc1(x))

    def finish(self, x: Tensor) -> Tensor:
        """What follows the first product: [..., 2 * hidden] -> [..., C]."""
        gate, x = x.chunk(2, dim=-1)
        gate = F.silu(gate)
        # in place where no gradient needs the gate: fresh memory costs as much as the product
        x = gate * x if torch.is_grad_enabled() else gate.mul_(x)
        return self.fc2(self.norm(x))


def make_mlp(dim: int, ratio: float, norm_eps: float, sub_norm: bool = False, swiglu: bool = False) -> nn.Module:
    """A feed-forward layer: GELU, or SwiGLU with both projections in one product; ``sub_norm``: a norm inside."""
    if swiglu:
        return GatedMlp(dim, int(dim * ratio), norm_eps if sub_norm else None)
    norm: Any = partial(nn.LayerNorm, eps=norm_eps) if sub_norm else None
    return Mlp(dim, int(dim * ratio), norm_layer=norm)


def feed_forward(norm: nn.Module, mlp: Any, x: Tensor, keep_products: bool) -> Tensor:
    """``mlp(norm(x))``; with ``keep_products``, norms and activations are computed again in the backward pass."""
    if not keep_products:
        return mlp(norm(x))

    def finish(hidden: Tensor) -> Tensor:
        return mlp.finish(hidden) if isinstance(mlp, GatedMlp) else mlp.fc2(mlp.norm(mlp.act(hidden)))

    hidden = recompute_cheap(lambda x: mlp.fc1(norm(x)), x)
    return recompute_cheap(finish, hidden)


class MlpBlock(nn.Module):
    """A residual feed-forward block: all there is in stages 1 and 2 and in the pyramid."""

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        drop_path: float = 0.0,
        init_values: float | None = None,
        norm_eps: float = 1e-6,
        sub_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = make_mlp(dim, mlp_ratio, norm_eps, sub_norm)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, keep_products: bool = False) -> Tensor:
        return x + self.drop_path(self.ls2(feed_forward(self.norm2, self.mlp, x, keep_products)))


class TransformerBlock(nn.Module):
    """A pre-norm transformer block on units that hold one token: [B, N, C] -> [B, N, C].

    Of a last block fewer tokens may be wanted: with ``skip`` the first so many are left out, [B, N - skip, C].
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: QkvBias = True,
        rel_pos_grid: Grid | None = None,
        decomposed: bool = False,
        drop_path: float = 0.0,
        init_values: float | None = None,
        norm_eps: float = 1e-6,
        sub_norm: bool = False,
        swiglu: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias, rel_pos_grid, decomposed)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = make_mlp(dim, mlp_ratio, norm_eps, sub_norm, swiglu)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self,
        x: Tensor,
        grid: Grid | None = None,
        rel_pos_index: Tensor | None = None,
        windows: Windows | None = None,
        skip: int = 0,
        keep_products: bool = False,
    ) -> Tensor:
        seen = self.attn(self.norm1(x), grid, rel_pos_index, windows, skip)
        x = x[:, skip:] + self._drop(self.ls1(seen), windows)
        return x + self._drop(self.ls2(feed_forward(self.norm2, self.mlp, x, keep_products)), windows)

    def _drop(self, x: Tensor, windows: Windows | None) -> Tensor:
        """Stochastic depth, of all windows of an image together."""
        if windows is None:
            return self.drop_path(x)
        return self.drop_path(x.unflatten(0, (-1, windows.count))).flatten(0, 1)


class PatchMerge(nn.Module):
    """Four neighbouring tokens to one of twice the width: [B, N, 2r, 2c, C] -> [B, N, r, c, 2C].

    Args:
        how: ``"linear"``: a norm of all four together, a linear layer without bias. ``"conv"``: a norm of each token
            and a bias, which makes it a convolution of size and stride 2 (Fast-iTPN).
    """

    def __init__(self, dim: int, norm_eps: float, how: Literal["linear", "conv"] = "linear") -> None:
        super().__init__()
        self.norm_first = how == "conv"
        self.norm = nn.LayerNorm(dim if self.norm_first else 4 * dim, eps=norm_eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=self.norm_first)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, rows, cols, dim = x.shape
        if self.norm_first:
            x = self.norm(x)
        x = x.reshape(batch, count, rows // 2, 2, cols // 2, 2, dim)
        # column by column, (0, 0) (1, 0) (0, 1) (1, 1), as the published weights were trained
        x = x.permute(0, 1, 2, 4, 5, 3, 6).flatten(4)
        return self.reduction(x if self.norm_first else self.norm(x))


class HiViT(nn.Module):
    """Hierarchical vision transformer with three stages of strides 4, 8 and 16 (for patch size 16).

    Follows timm's conventions for models; images [B, in_chans, H, W] may have any height and width that are
    multiples of the patch size, whatever ``img_size`` the position tables were made for.

    Args:
        img_size: image size in pixels (or height and width) of the stored position table.
        patch_size: pixels of a unit's side, divisible by 4.
        global_pool: how the classifier pools tokens, as timm's: mean, maximum, half the sum of both, or none
            (``""``: logits of each token).
        embed_dim: channels C of stage 3; stages 1 and 2 have C/4 and C/2.
        depths: blocks per stage.
        num_heads: attention heads of stage 3.
        mlp_ratios: hidden width of the feed-forward layers over their input width, per stage.
        qkv_bias: in stage 3; ``"qv"`` leaves it out of the keys (Fast-iTPN).
        patch_norm: a norm after the patch embedding (not in Fast-iTPN).
        merge: how stages are joined, see :class:`PatchMerge` (``"conv"`` in Fast-iTPN).
        sub_norm: a norm inside each feed-forward layer (Fast-iTPN).
        swiglu: gated feed-forward layers in stage 3 (Fast-iTPN).
        pos_embed: ``"fixed"`` keeps the table as it is initialised or loaded, ``"learned"`` trains it.
        pos_resample: ``"exact"``, or ``"legacy"`` for the public code's resampling (see
            :func:`resample_position_table`), which with hidden units takes place at native size too.
        rel_pos_bias: a relative position bias in each stage 3 block: a table, or ``"decomposed"`` into rows and
            columns (see :class:`Attention`).
        rel_pos_size: image size that the relative tables are made for; None for ``img_size``.
        init_values: initial layer scale, None for no layer scale.
        layer_scale_stages: the stages that have it (3 alone in Fast-iTPN).
        migrate_ratio: share of the tokens that skip the last blocks of stage 3 (token migration).
        migrate_from: the first block that they skip; None for the middle of the stage.
        gather_window: attention inside windows of this many units a side, with gathering tokens between them; 0 for
            global attention, which is also what images of a single window and hidden units left out get.
        gather_side: its square is the number of gathering tokens in a window.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 over all blocks.
        norm_eps: 1e-6 in pre-training; the public plain HiViT has 1e-5.
        fc_norm: a norm between mean and classifier; mmpretrain's HiViT has none.
        weight_init: ``"xavier"`` (Xavier uniform linears, sine-cosine positions; pixel pre-training) or
            ``"trunc_normal"`` (deviation 0.02, output projections of block i divided by sqrt(2 i)).

    Raises:
        ValueError: the sizes do not fit one another.
    """

    pretrained_cfg: dict[str, Any]  # both of a model by name: timm's settings of its weights,
    model_args: dict[str, Any]  # and what was given beside its name (see itpn.models.registry)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: GlobalPool = "avg",
        embed_dim: int = 512,
        depths: Sequence[int] = (4, 4, 24),
        num_heads: int = 8,
        mlp_ratios: Sequence[float] = (3.0, 3.0, 4.0),
        qkv_bias: QkvBias = True,
        patch_norm: bool = True,
        merge: Literal["linear", "conv"] = "linear",
        sub_norm: bool = False,
        swiglu: bool = False,
        pos_embed: Literal["fixed", "learned"] = "learned",
        pos_resample: Resample = "exact",
        rel_pos_bias: bool | Literal["decomposed"] = False,
        rel_pos_size: int | tuple[int, int] | None = None,
        init_values: float | None = None,
        layer_scale_stages: Sequence[int] = (1, 2, 3),
        migrate_ratio: float = 0.0,
        migrate_from: int | None = None,
        gather_window: int = 0,
        gather_side: int = 1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        fc_norm: bool = True,
        weight_init: WeightInit = "trunc_normal",
    ) -> None:
        super().__init__()
        if patch_size % 4:
            raise ValueError(f"patch_size must be divisible by 4 (a unit holds 4x4 tokens), not {patch_size}")
        if num_heads < 1 or embed_dim % 8 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be divisible by 8 and by num_heads={num_heads}, not {embed_dim}")
        if in_chans < 1 or num_classes < 0:
            raise ValueError(f"in_chans={in_chans} must be above 0 and num_classes={num_classes} at least 0")
        if not 0 <= migrate_ratio < 1:
            raise ValueError(f"migrate_ratio must be at least 0 and below 1, not {migrate_ratio}")
        if migrate_from is not None and not 0 <= migrate_from < depths[2]:
            raise ValueError(f"migrate_from must be one of the {depths[2]} blocks of stage 3, not {migrate_from}")
        if gather_window < 0 or gather_side < 1 or gather_window % gather_side:
            raise ValueError(
                f"gather_window must be at least 0 and divisible by gather_side, which is at least 1, not "
                f"{gather_window} and {gather_side}"
            )
        if gather_window and rel_pos_bias:
            raise ValueError("gathering tokens have no relative position: use gather_window without rel_pos_bias")
        check_pooling(global_pool)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool: GlobalPool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.depths = tuple(depths)
        self.pos_resample = pos_resample
        self.migrate_ratio = migrate_ratio
        self.migrate_from = depths[2] // 2 if migrate_from is None else migrate_from
        self.gather_window = gather_window
        self.gather_side = gather_side
        self.grad_checkpointing: Recompute = False
        self.grid_size = self.grid_of(to_2tuple(img_size))
        self.rel_pos_grid = self.grid_of(to_2tuple(rel_pos_size or img_size)) if rel_pos_bias else None

        dims = (embed_dim // 4, embed_dim // 2, embed_dim)
        self.patch_embed = PatchEmbed(patch_size, in_chans, dims[0], norm_eps if patch_norm else None)
        self.pos_embed = nn.Parameter(
            sincos_position_table(self.grid_size, embed_dim), requires_grad=pos_embed == "learned"
        )
        rates = [drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]

        def stage(number: int, block: type[nn.Module], *args: Any, **kwargs: Any) -> nn.ModuleList:
            scale = init_values if number in layer_scale_stages else None
            kwargs |= {"init_values": scale, "norm_eps": norm_eps, "sub_norm": sub_norm}
            first = sum(depths[: number - 1])
            dim, ratio, own_rates = dims[number - 1], mlp_ratios[number - 1], rates[first : first + depths[number - 1]]
            return nn.ModuleList(block(dim, *args, mlp_ratio=ratio, drop_path=rate, **kwargs) for rate in own_rates)

        attention = {
            "qkv_bias": qkv_bias,
            "rel_pos_grid": self.rel_pos_grid,
            "decomposed": rel_pos_bias == "decomposed",
            "swiglu": swiglu,
        }
        self.stages: Any = nn.ModuleList(  # of ModuleLists, which type checkers do not look into
            [stage(1, MlpBlock), stage(2, MlpBlock), stage(3, TransformerBlock, num_heads, **attention)]
        )
        self.merges = nn.ModuleList([PatchMerge(dim, norm_eps, merge) for dim in dims[:2]])
        self.rel_pos_index: Tensor
        self.register_buffer(
            "rel_pos_index", relative_position_index(self.rel_pos_grid or self.grid_size), persistent=False
        )
        self.feature_info = [
            {"num_chs": dim, "reduction": max(patch_size // 4, 1) * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(dims)
        ]
        # mean over tokens, then norm, as the fine-tuned weights were trained
        self.has_fc_norm = fc_norm
        self.fc_norm = nn.LayerNorm(embed_dim, eps=norm_eps) if num_classes and fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.norm_eps = norm_eps
        self.init_weights(weight_init)

    def init_weights(self, how: WeightInit) -> None:
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

    def __prepare_scriptable__(self) -> nn.Module:
        return Traced(self, self.image_shape)

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Fill what no file holds, for loaders that build on the meta device (timm's name; transformers calls it)."""
        self.rel_pos_index.copy_(relative_position_index(self.rel_pos_grid or self.grid_size))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(POSITIONS)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers of layer-wise learning rates: stem, block by block, classifier; merges go with the block before."""
        return {
            "stem": r"^pos_embed|^patch_embed",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [(r"^stages\.(\d+)\.(\d+)", None), (r"^merges\.(\d+)", (99999,)), (r"^fc_norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: Recompute = True) -> None:
        """As timm's; ``"selective"`` recomputes norms and activation functions alone (:func:`run_block`)."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """A new classifier, or none; ValueError if there is no such pooling."""
        if global_pool is not None:
            check_pooling(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        kwargs: dict[str, Any] = {"device": self.pos_embed.device, "dtype": self.pos_embed.dtype}
        if num_classes and self.has_fc_norm and isinstance(self.fc_norm, nn.Identity):
            self.fc_norm = nn.LayerNorm(self.num_features, eps=self.norm_eps, **kwargs)
        self.head = nn.Linear(self.num_features, num_classes, **kwargs) if num_classes else nn.Identity()
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        for part in (self.fc_norm, self.head):  # new ones would be in training
            part.train(self.training)

    # --- forward

    def grid_of(self, size: Sequence[int]) -> Grid:
        """Rows and columns of units in an image of this height and width; ValueError if they do not divide."""
        height, width = size
        if height % self.patch_size or width % self.patch_size or height < 1 or width < 1:
            raise ValueError(
                f"image size {height}x{width} is not a multiple of the patch size {self.patch_size}; "
                f"pad or resize it, for example to {max(1, round(height / self.patch_size)) * self.patch_size}"
                f"x{max(1, round(width / self.patch_size)) * self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(in_chans, H, W) of the images that the position tables are made for."""
        return self.in_chans, self.grid_size[0] * self.patch_size, self.grid_size[1] * self.patch_size

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
                x = run_block(block, self.grad_checkpointing, x)
            outputs.append(x)
            if i == last:
                return outputs
            x = self.merges[i](x)
        x = x.flatten(1, 3)  # [B, V, C]
        if mask is not None:
            assert mask_token is not None
            x = torch.where(mask.unsqueeze(-1), mask_token.to(x.dtype), x)
        x = x + self._positions(grid, visible)
        whole, *tapped = self._attend(x, grid, visible, tap)
        return [*outputs, whole[:, :, None, None], *tapped]

    def _attend(self, x: Tensor, grid: Grid, visible: Tensor | None, tap: int | None) -> list[Tensor]:
        """Stage 3 on tokens [B, V, C]; returns its output and that of block ``tap``, if any, [B, V, C] each."""
        index = self.relative_positions(grid, visible)
        windows, gathering = None, 0
        if self.gather_window and visible is None and max(grid) > self.gather_window:
            x, windows = Windows(grid, self.gather_window, self.gather_side).cut(x)
            gathering = windows.gathering  # x is [B * W, T + G, C]; without windows T = V and G = 0
        left, picked = x, None  # tokens as some of them leave, and which do not

        def restore(x: Tensor) -> Tensor:
            x = x[:, : x.shape[1] - gathering]
            if picked is not None:
                x = put_back(left, picked, x)
            return x if windows is None else windows.join(x)

        tapped = []
        for i, block in enumerate(self.stages[2]):
            if self.migrate_ratio and i == self.migrate_from:
                left, gathered = x.tensor_split([x.shape[1] - gathering], dim=1)
                # a trace has tensors for sizes, which do not round
                tokens = int(left.shape[1]) if torch.jit.is_tracing() else left.shape[1]
                keep = max(1, round(tokens * (1 - self.migrate_ratio)))
                picked = pick_distinct(left, keep, None if windows is None else windows.real)
                x = torch.cat([take(left, picked), gathered], dim=1)
                if windows is not None:
                    windows = windows.pick(picked)
                if index is not None:
                    index = self.relative_positions(grid, picked if visible is None else visible.gather(1, picked))
            x = run_block(block, self.grad_checkpointing, x, grid, index, windows)
            if i == tap:
                tapped.append(restore(x))
        return [restore(x), *tapped]

    def _positions(self, grid: Grid, visible: Tensor | None) -> Tensor:
        # the public code takes "fewer tokens than stored" for another grid, so it resamples whenever units are hidden
        legacy = self.pos_resample == "legacy" and (visible is not None or not same_grid(self.grid_size, grid))
        table = resample_position_table(self.pos_embed, self.grid_size, grid, "legacy" if legacy else "exact")
        return table if visible is None else table[0, visible]  # [1, N, C] or [B, V, C]

    def relative_positions(self, grid: Grid, visible: Tensor | None) -> Tensor | None:
        """Rows of the relative position tables: of all units [N, N], or picked ones [B, V, V]; None without tables."""
        if self.rel_pos_grid is None:
            return None
        index = self.rel_pos_index
        if not same_grid(self.rel_pos_grid, grid):
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
        check_intermediates(norm, output_fmt)
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
        """Tokens [B, N, C] -> logits [B, num_classes] (pooling, norm, linear), or what goes into the linear layer.

        Without a pooling, of each token: [B, N, num_classes].
        """
        x = self.head_drop(self.fc_norm(global_pool_nlc(x, self.global_pool, num_prefix_tokens=0)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def check_pooling(global_pool: Any) -> None:
    """Raise ValueError for a pooling that a classifier does not have."""
    known = get_args(GlobalPool)
    if global_pool not in known:
        raise ValueError(f"global_pool must be one of {', '.join(map(repr, known))}, not {global_pool!r}")


def find_backbone(model: nn.Module) -> HiViT:
    """The backbone that a model is, or has as ``backbone``; a detector's own has one."""
    while not isinstance(model, HiViT):
        model = model.backbone  # type: ignore[assignment]  # a module, or an AttributeError
    return model


def nest_groups(groups: dict[str, Any]) -> dict[str, Any]:
    """Layers (see timm's ``group_matcher``) of a network that has the one with these layers as ``backbone``."""

    def inside(pattern: str) -> str:
        return "|".join(part.replace("^", r"^backbone\.", 1) for part in pattern.split("|"))

    blocks = groups["blocks"]
    nested = inside(blocks) if isinstance(blocks, str) else [(inside(pattern), order) for pattern, order in blocks]
    return {"stem": inside(groups["stem"]), "blocks": nested}


def check_intermediates(norm: bool, output_fmt: str) -> None:
    if norm:
        raise ValueError("there is no norm between the stages to apply to intermediate features")
    if output_fmt not in ("NCHW", "NHWC"):
        raise ValueError(f"output_fmt must be NCHW or NHWC, not {output_fmt}")


def units_to_map(x: Tensor, grid: Grid) -> Tensor:
    """All units of an image to a map: [B, N, r, c, C] -> [B, C, rows * r, cols * c]."""
    batch, _, rows, cols, dim = x.shape
    x = x.reshape(batch, *grid, rows, cols, dim).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(batch, dim, grid[0] * rows, grid[1] * cols)


def initialize_linears(module: nn.Module, how: WeightInit) -> None:
    """Initialise every linear layer: weights as said, biases zero. Norms are made as they should be."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight) if how == "xavier" else trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def fit_tables(
    tensors: dict[str, Tensor], own: Mapping[str, Tensor], backbone: HiViT, stored_grid: Grid | None = None
) -> list[str]:
    """Resample position tables to the grids of a backbone, in place.

    Args:
        own: the tensors that they are for, by the same names: of the backbone and of what goes with it.
        stored_grid: that of all stored tables; None for square ones, whose sizes tell.

    Returns:
        The names of those changed.
    """
    changed = []
    for name in own.keys() & tensors.keys():
        stored, wanted = tensors[name], own[name]
        if stored.dim() < 2 or stored.shape[-1] != wanted.shape[-1]:
            continue
        if name.endswith("pos_embed"):
            grid = stored_grid or (backbone.grid_size if stored.shape == wanted.shape else square(stored.shape[1]))
            # the backbone's own as it would be for an image of that size
            how = backbone.pos_resample if name in ("pos_embed", "backbone.pos_embed") else "exact"
            fitted = stored
            if grid != backbone.grid_size:
                fitted = resample_position_table(stored, grid, backbone.grid_size, how)
        elif name.endswith("relative_position_bias_table"):
            assert backbone.rel_pos_grid is not None
            grid = stored_grid or backbone.rel_pos_grid
            if (2 * grid[0] - 1) * (2 * grid[1] - 1) != len(stored):  # unknown, or made for a rel_pos_size
                side = (square(len(stored))[0] + 1) // 2
                grid = (side, side)
            fitted = resample_relative_table(stored, grid, backbone.rel_pos_grid)
        elif name.endswith(("rel_pos_h", "rel_pos_w")):
            fitted = resample_offsets(stored, len(wanted))
        else:
            continue
        if fitted is not stored:
            tensors[name] = fitted
            changed.append(name)
    return changed


def read_stored_grid(pretrained_cfg: dict[str, Any], tensors: dict[str, Tensor], prefix: str = "") -> Grid | None:
    """The grid of a file's position tables, by the image size that timm's settings of the file name.

    Returns:
        None where that size is another's: of a file given by hand, timm knows the variant's default alone.
    """
    table, patch = tensors.get(f"{prefix}pos_embed"), tensors.get(f"{prefix}patch_embed.proj.weight")
    if table is None or patch is None:
        return None
    height, width = pretrained_cfg["input_size"][-2:]
    grid = (height // (4 * patch.shape[2]), width // (4 * patch.shape[3]))
    return grid if grid[0] * grid[1] == table.shape[1] else None


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: HiViT) -> dict[str, Tensor]:
    """What timm puts a file's tensors through: any public names to ours, tables to the model's grid, the rest away."""
    layout = detect_layout(state_dict)
    if layout is None:
        return state_dict  # not ours: loading it will say so
    named, _ = to_ours(state_dict, layout)
    tensors = {name.removeprefix("backbone."): tensor for name, tensor in named.items() if name.startswith("backbone.")}
    fit_tables(tensors, model.state_dict(), model, read_stored_grid(model.pretrained_cfg, tensors))
    return tensors
