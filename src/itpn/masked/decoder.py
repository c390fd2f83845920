"""Decoders: from features of the visible patches to predictions for every patch."""

from typing import Any

import torch
from torch import Tensor, nn

from itpn.masked.masking import Split
from itpn.models.backbone import Backbone
from itpn.models.layers import TransformerBlock, WeightInit, initialize_linears
from itpn.models.position import Grid, resample_position_table, sincos_position_table
from itpn.models.recompute import Recompute, run_block


def pick_tokens(x: Tensor, split: Split | None, masked_only: bool) -> Tensor:
    """Tokens of a decoder [B, N, D] -> those of masked patches [B, M, D], or all of them row-major [B, N, D]."""
    if split is None:
        return x
    if masked_only:
        return x[:, split.visible.shape[1] :]
    return torch.empty_like(x).scatter(1, split.order.unsqueeze(-1).expand_as(x), x)


def run_blocks(
    blocks: nn.ModuleList, how: Recompute, x: Tensor, *args: Any, split: Split | None, masked_only: bool
) -> Tensor:
    """Run transformer blocks on tokens [B, N, D], which are in the order of ``split`` if one is given.

    Returns:
        [B, N, D]; with ``masked_only`` only masked patches [B, M, D]: the last block computes no others.
    """
    skip = split.visible.shape[1] if split is not None and masked_only else 0
    for number, block in enumerate(blocks, start=1):
        x = run_block(block, how, x, *args, skip if number == len(blocks) else 0)
    return x if len(blocks) else x[:, skip:]


class Decoder(nn.Module):
    """Pyramid levels to predictions (Tian et al. 2023, section 3.2; He et al. 2022, section 3).

    Each level is normalized and projected to ``width`` numbers per patch, whatever its number of tokens, and the levels
    are summed. If the network has dropped masked patches, mask tokens are added for them. Then come fixed positions,
    transformer blocks, a norm, and one linear layer for each target. Without blocks this is the plain head of CLIP
    supervision; with a single level it is a head of masked feature modelling.

    Args:
        grid: rows and columns of patches.
        heads: names of the targets, each with its number of values per patch.
        pyramid_width: channels of the pyramid levels.
        width: channels of the decoder, divisible by 16 and by ``num_heads``.
        levels: the pyramid levels that are read, 0 the finest.
        add_mask_tokens: add a mask token for each masked patch: the network drops them.
        embed_norm_eps: eps of the norms before the projections (1e-5 in mmpretrain, 1e-6 elsewhere).

    Raises:
        ValueError: ``width`` is not divisible by 16 and ``num_heads``.
    """

    def __init__(  # many parameters: where the published decoders differ
        self,
        grid: Grid,
        heads: dict[str, int],
        pyramid_width: int = 256,
        width: int = 512,
        depth: int = 6,
        num_heads: int = 16,
        levels: tuple[int, ...] = (0, 1, 2),
        add_mask_tokens: bool = True,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        embed_norm_eps: float = 1e-6,
        weight_init: WeightInit = "xavier",
    ) -> None:
        super().__init__()
        if width % 16 or (depth and width % num_heads):
            raise ValueError(f"decoder width must be divisible by 16 and by num_heads={num_heads}, not {width}")
        self.grid = grid
        self.num_heads = num_heads
        self.levels = levels
        self.embed_norms = nn.ModuleList([nn.LayerNorm(pyramid_width, eps=embed_norm_eps) for _ in levels])
        # a patch has 16, 4 and 1 tokens, finest level first
        self.embeds = nn.ModuleList([nn.Linear(pyramid_width, width // (16, 4, 1)[level]) for level in levels])
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if add_mask_tokens else None
        self.pos_embed = nn.Parameter(sincos_position_table(grid, width), requires_grad=False) if depth else None
        self.blocks = nn.ModuleList(
            [TransformerBlock(width, num_heads, mlp_ratio, norm_eps=norm_eps) for _ in range(depth)]
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.heads = nn.ModuleDict({name: nn.Linear(width, out_dim) for name, out_dim in heads.items()})
        self.names = tuple(heads)  # torch.compile does not unpack a ModuleDict in every version
        self.grad_checkpointing: Recompute = False
        initialize_linears(self, weight_init)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, levels: list[Tensor], grid: Grid, split: Split | None = None, masked_only: bool = False
    ) -> Tensor:
        """Tokens of all patches, for :meth:`predict`.

        Args:
            levels: all three of the pyramid, finest first: [B, V, 4, 4, F], [B, V, 2, 2, F], [B, V, 1, 1, F].
            grid: rows and columns of patches of these images.
            split: visible and masked patches, if masked ones were dropped from ``levels``.
            masked_only: return only masked patches; the last block does not compute the others.

        Returns:
            [B, N, width], in the order of ``split`` or else row-major; with ``masked_only`` [B, M, width].
        """
        picked = [levels[level] for level in self.levels]
        parts = zip(self.embeds, self.embed_norms, picked, strict=True)
        x = sum([embed(norm(level)).flatten(2) for embed, norm, level in parts])  # [B, V, width]
        if split is not None:
            assert self.mask_token is not None
            # a masked patch gets the mask token once for each level, as in the published weights
            x = append_mask_tokens(x, len(picked) * self.mask_token, split)
        if self.pos_embed is not None:
            positions = resample_position_table(self.pos_embed, self.grid, grid)
            x = x + (positions if split is None else positions[0][split.order])
        unused = None, None, None  # grid, relative positions and windows
        return run_blocks(self.blocks, self.grad_checkpointing, x, *unused, split=split, masked_only=masked_only)

    def predict(self, name: str, x: Tensor) -> Tensor:
        """Tokens [B, M or N, width] -> the predictions of one head [B, M or N, out_dim]."""
        return self.heads[name](self.norm(x))


class AuxiliaryHead(nn.Module):
    """A second head on the tokens of an earlier block, as in the authors' CLIP supervision: blocks, norm, linear.

    Args:
        backbone: sets width, heads and relative positions.
        out_dim: values predicted per patch.
        add_mask_tokens: add a mask token for each masked patch: the network drops them.
        block_norm_eps: eps of the norms in the blocks (1e-5 in the public code).
    """

    def __init__(
        self,
        backbone: Backbone,
        out_dim: int,
        depth: int = 2,
        add_mask_tokens: bool = False,
        init_values: float | None = None,
        norm_eps: float = 1e-6,
        block_norm_eps: float = 1e-6,
        weight_init: WeightInit = "trunc_normal",
    ) -> None:
        super().__init__()
        grid, dim = backbone.grid_size, backbone.embed_dim
        self.grid = grid
        block: dict[str, Any] = {
            "rel_pos_grid": backbone.rel_pos_grid,
            "init_values": init_values,
            "norm_eps": block_norm_eps,
        }
        self.blocks = nn.ModuleList([TransformerBlock(dim, backbone.num_heads, **block) for _ in range(depth)])
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim)) if add_mask_tokens else None
        self.pos_embed = (
            nn.Parameter(sincos_position_table(grid, dim), requires_grad=False) if add_mask_tokens else None
        )
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.head = nn.Linear(dim, out_dim)
        self.grad_checkpointing: Recompute = False
        initialize_linears(self, weight_init)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        x: Tensor,
        grid: Grid,
        rel_pos_index: Tensor | None,
        split: Split | None = None,
        masked_only: bool = False,
    ) -> Tensor:
        """Tokens [B, V, C] of a stage 3 block -> of all patches [B, N, C] or masked ones [B, M, C]."""
        if split is not None:
            assert self.pos_embed is not None
            assert self.mask_token is not None
            positions = resample_position_table(self.pos_embed, self.grid, grid)[0]
            x = append_mask_tokens(x, self.mask_token, split) + positions[split.order]
        args = grid, rel_pos_index, None  # no windows
        return run_blocks(self.blocks, self.grad_checkpointing, x, *args, split=split, masked_only=masked_only)

    def predict(self, name: str, x: Tensor) -> Tensor:
        """Tokens [B, M or N, C] -> [B, M or N, out_dim]."""
        return self.head(self.norm(x))


def append_mask_tokens(x: Tensor, mask_token: Tensor, split: Split) -> Tensor:
    """Visible tokens [B, V, C] -> the same, followed by a mask token for each masked patch, [B, N, C]."""
    return torch.cat([x, mask_token.to(x.dtype).expand(len(x), split.masked.shape[1], -1)], dim=1)
