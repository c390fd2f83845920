"""Layers of HiViT and of the feature pyramid, in the order in which an image meets them.

An image is divided into *patches* of 16x16 pixels. A patch holds 4x4 tokens in stage 1, 2x2 in stage 2 and one token
in stage 3. Tensors have the layout ``[batch, patches, rows, cols, channels]``; rows and cols count the tokens inside
a patch. Shapes below name the batch B, all patches N, the visible ones V, and channels C.
"""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp, trunc_normal_
from torch import Tensor, nn

from itpn.models.position import Grid, resample_offsets, resample_relative_table
from itpn.models.recompute import recompute_cheap
from itpn.models.windows import Windows

QkvBias = bool | Literal["qv"]
WeightInit = Literal["xavier", "trunc_normal"]


def image_to_patches(images: Tensor, patch_size: int) -> Tensor:
    """View images as patches, row-major, without a copy: [B, C, H, W] -> [B, H/p, W/p, C, p, p]."""
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return x.permute(0, 2, 4, 1, 3, 5)  # [B, H/p, W/p, C, p, p]


def pick_patches(patches: Tensor, picked: Tensor | None) -> Tensor:
    """[B, rows, cols, ...] -> all patches [B, N, ...], or those of ``picked`` [B, V]: only these are copied."""
    if picked is None:
        return patches.flatten(1, 2)
    batch = torch.arange(len(patches), device=patches.device).unsqueeze(1)
    cols = patches.shape[2]
    return patches[batch, picked // cols, picked % cols]


def patches_to_map(x: Tensor, grid: Grid) -> Tensor:
    """The tokens of all patches of an image to a map: [B, N, r, c, C] -> [B, C, rows * r, cols * c]."""
    batch, _, rows, cols, dim = x.shape
    x = x.reshape(batch, *grid, rows, cols, dim).permute(0, 5, 1, 3, 2, 4)  # [B, C, rows, r, cols, c]
    return x.reshape(batch, dim, grid[0] * rows, grid[1] * cols)


class PatchEmbed(nn.Module):
    """Pixels to stage 1 tokens: a convolution of stride patch_size/4, then a norm.

    The convolution is computed as a matrix product, so that it can skip masked patches.

    Args:
        patch_size: pixels of a patch's side.
        norm_eps: None for no norm.
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int, norm_eps: float | None) -> None:
        super().__init__()
        self.patch_size = patch_size
        # a Conv2d, because timm adapts its weight to other in_chans
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size // 4, stride=patch_size // 4)
        self.norm = nn.LayerNorm(dim, eps=norm_eps) if norm_eps is not None else nn.Identity()

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """Images [B, in_chans, H, W], visible patches int64 [B, V] or None for all -> [B, V, 4, 4, dim]."""
        x = pick_patches(image_to_patches(images, self.patch_size), visible)  # [B, V, in_chans, p, p]
        batch, count, channels = x.shape[:3]
        x = x.reshape(batch, count, channels, 4, self.patch_size // 4, 4, self.patch_size // 4)
        x = x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)  # [B, V, 4, 4, in_chans * (p/4)^2]
        x = F.linear(x, self.proj.weight.flatten(1), self.proj.bias)  # [B, V, 4, 4, dim]
        return self.norm(x)


class GatedMlp(nn.Module):
    """SwiGLU (Shazeer 2020): [..., C] -> [..., C]. One matrix product computes gate and value.

    Args:
        norm_eps: of a norm before the last layer; None for no norm.
    """

    def __init__(self, dim: int, hidden: int, norm_eps: float | None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.norm = nn.LayerNorm(hidden, eps=norm_eps) if norm_eps is not None else nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.fc1(x))

    def finish(self, x: Tensor) -> Tensor:
        """Everything after the first product: [..., 2 * hidden] -> [..., C]."""
        gate, x = x.chunk(2, dim=-1)  # [..., hidden] each
        gate = F.silu(gate)
        # in place where no gradient needs the gate: allocating memory costs as much time as the product
        x = gate * x if torch.is_grad_enabled() else gate.mul_(x)
        return self.fc2(self.norm(x))


def make_mlp(dim: int, ratio: float, norm_eps: float, sub_norm: bool = False, swiglu: bool = False) -> nn.Module:
    """A feed-forward layer with GELU, or with SwiGLU; ``sub_norm`` puts a norm before its last linear layer."""
    if swiglu:
        return GatedMlp(dim, int(dim * ratio), norm_eps if sub_norm else None)
    norm: Any = partial(nn.LayerNorm, eps=norm_eps) if sub_norm else None
    return Mlp(dim, int(dim * ratio), norm_layer=norm)


def feed_forward(norm: nn.Module, mlp: Any, x: Tensor, keep_products: bool) -> Tensor:
    """``mlp(norm(x))``; with ``keep_products``, the backward pass recomputes norms and activation functions."""
    if not keep_products:
        return mlp(norm(x))

    def finish(hidden: Tensor) -> Tensor:
        return mlp.finish(hidden) if isinstance(mlp, GatedMlp) else mlp.fc2(mlp.norm(mlp.act(hidden)))

    hidden = recompute_cheap(lambda x: mlp.fc1(norm(x)), x)
    return recompute_cheap(finish, hidden)


class MlpBlock(nn.Module):
    """A residual feed-forward block: stages 1 and 2 and the pyramid have no others."""

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


class PatchMerge(nn.Module):
    """Merge 2x2 adjacent tokens into one of twice the width: [B, N, 2r, 2c, C] -> [B, N, r, c, 2C].

    Args:
        how: ``"linear"``: one norm of all four tokens, then a linear layer without bias. ``"conv"``: a norm of each
            token, then a linear layer with bias; together a convolution of kernel size and stride 2 (Fast-iTPN).
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
        # column by column, (0, 0) (1, 0) (0, 1) (1, 1), as in the published weights
        x = x.permute(0, 1, 2, 4, 5, 3, 6).flatten(4)  # [B, N, r, c, 4C]
        return self.reduction(x if self.norm_first else self.norm(x))


class Attention(nn.Module):
    """Multi-head self-attention, optionally with a relative position bias.

    Args:
        qkv_bias: ``"qv"`` leaves it out of the keys, where it has no effect (Fast-iTPN).
        rel_pos_grid: rows and columns of patches that the relative position tables are made for; None for no bias.
        decomposed: instead of a bias for each offset, learn a vector for each row offset and one for each column
            offset, and multiply both with the query (Li et al. 2022, "MViTv2", section 4.1; the published detectors).
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
        """Attend from all tokens but the first ``skip`` to all tokens.

        Args:
            x: [B, N, C].
            rel_pos_index: int64 [N, N] or [B, N, N] for patches on ``grid``.
            windows: of token gathering.
            skip: the first so many tokens are keys but not queries.

        Returns:
            [B, N - skip, C].
        """
        batch, tokens, dim = x.shape
        qkv_bias: Tensor | None = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias)  # [B, N, 3 * C]
        qkv = qkv.reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, C / heads] each
        q = q[:, :, skip:]  # [B, heads, N - skip, C / heads]
        bias = None
        if self.rel_pos_grid is not None:
            assert grid is not None
            assert rel_pos_index is not None
            bias = self._relative_bias(q, grid, rel_pos_index[..., skip:, :])  # [(B,) heads, N - skip, N]
        if windows is not None:
            k, v, bias = windows.add_gathering_tokens(k), windows.add_gathering_tokens(v), windows.mask
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # [B, heads, N - skip, C / heads]
        return self.proj(x.transpose(1, 2).reshape(batch, tokens - skip, dim))

    def _relative_bias(self, q: Tensor, grid: Grid, index: Tensor) -> Tensor:
        """The bias of the attention scores, queries by keys: [(B,) heads, N - skip, N]."""
        assert self.rel_pos_grid is not None
        if not self.decomposed:
            table = resample_relative_table(self.relative_position_bias_table, self.rel_pos_grid, grid)
            return table[index].movedim(-1, -3).to(q.dtype)
        stored = (self.rel_pos_h, self.rel_pos_w)
        tables = [resample_offsets(table, 2 * side - 1) for table, side in zip(stored, grid, strict=True)]
        cols = 2 * grid[1] - 1
        index = (index if index.dim() == 3 else index[None])[:, None]  # [1 or B, 1, N - skip, N]
        index = index.expand(*q.shape[:3], -1)  # [B, heads, N - skip, N]
        row_offset = index // cols
        offsets = (row_offset, index - row_offset * cols)  # no %, which torch.onnx cannot export with dynamic sizes
        # the query is not scaled here, as in the published weights
        parts = [(q @ t.to(q.dtype).T).gather(-1, offset) for t, offset in zip(tables, offsets, strict=True)]
        return parts[0] + parts[1]


class TransformerBlock(nn.Module):
    """A pre-norm transformer block on patches of one token: [B, N, C] -> [B, N, C].

    With ``skip`` it returns no output for the first so many tokens, [B, N - skip, C]; the others still attend to them.
    """

    gathered_alone = True  # where parameters are sharded, those of a block are gathered when it is its turn

    def __init__(  # many parameters: the options of attention and of the feed-forward layer
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
        attended = self.attn(self.norm1(x), grid, rel_pos_index, windows, skip)  # [B, N - skip, C]
        x = x[:, skip:] + self._drop(self.ls1(attended), windows)
        return x + self._drop(self.ls2(feed_forward(self.norm2, self.mlp, x, keep_products)), windows)

    def _drop(self, x: Tensor, windows: Windows | None) -> Tensor:
        """Stochastic depth; all windows of an image are dropped together."""
        if windows is None:
            return self.drop_path(x)
        return self.drop_path(x.unflatten(0, (-1, windows.count))).flatten(0, 1)


def initialize_linears(module: nn.Module, how: WeightInit) -> None:
    """Initialize every linear layer: weights by ``how``, biases zero. Norms keep torch's initialization."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight) if how == "xavier" else trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
