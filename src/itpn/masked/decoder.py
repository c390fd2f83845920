"""From what the network made of the visible units to predictions for every unit."""

from typing import Any

import torch
from torch import Tensor, nn

from itpn.masked.masking import Split
from itpn.models.hivit import HiViT
from itpn.models.layers import TransformerBlock, WeightInit, initialize_linears
from itpn.models.position import Grid, resample_position_table, sincos_position_table
from itpn.models.recompute import Recompute, run_block


def pick_tokens(x: Tensor, split: Split | None, hidden_only: bool) -> Tensor:
    """Tokens [B, N, D] as a decoder returns them -> hidden units [B, M, D], or all in unit order [B, N, D]."""
    if split is None:
        return x
    if hidden_only:
        return x[:, split.visible.shape[1] :]
    return torch.empty_like(x).scatter(1, split.order.unsqueeze(-1).expand_as(x), x)


def run_blocks(
    blocks: nn.ModuleList, how: Recompute, x: Tensor, *args: Any, split: Split | None, hidden_only: bool
) -> Tensor:
    """Transformer blocks on tokens [B, N, D], in the order of ``split`` where there is one.

    Returns:
        [B, N, D], or with ``hidden_only`` hidden units alone, [B, M, D]: the last block computes no others.
    """
    skip = split.visible.shape[1] if split is not None and hidden_only else 0
    for number, block in enumerate(blocks, start=1):
        x = run_block(block, how, x, *args, skip if number == len(blocks) else 0)
    return x if len(blocks) else x[:, skip:]


class Decoder(nn.Module):
    """Pyramid levels to predictions (Tian et al. 2023, section 3.2; He et al. 2022, section 3).

    Each level is normalised and projected so that a unit yields ``width`` numbers whatever its number of tokens; the
    levels are summed. Where the network has dropped hidden units, a mask token fills them. Fixed positions are added,
    transformer blocks follow, then a norm and one linear layer for each thing predicted. Without blocks this is the
    plain head of CLIP supervision; with a single level it is a head of masked feature modelling.

    Args:
        grid: rows and columns of units.
        heads: what is predicted, and how many numbers a unit.
        pyramid_width: channels of the pyramid levels.
        width: channels of the decoder, divisible by 16 and by ``num_heads``.
        levels: the pyramid levels that are read, 0 the finest.
        fill_hidden: the network drops hidden units.
        embed_norm_eps: eps of the norms before the projections (1e-5 in mmpretrain, 1e-6 elsewhere).

    Raises:
        ValueError: ``width`` does not divide.
    """

    def __init__(
        self,
        grid: Grid,
        heads: dict[str, int],
        pyramid_width: int = 256,
        width: int = 512,
        depth: int = 6,
        num_heads: int = 16,
        levels: tuple[int, ...] = (0, 1, 2),
        fill_hidden: bool = True,
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
        # a unit has 16, 4 and 1 tokens, finest level first
        self.embeds = nn.ModuleList([nn.Linear(pyramid_width, width // (16, 4, 1)[level]) for level in levels])
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if fill_hidden else None
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
        self, levels: list[Tensor], grid: Grid, split: Split | None = None, hidden_only: bool = False
    ) -> Tensor:
        """Tokens of all units, for :meth:`predict`.

        Args:
            levels: all three of the pyramid, finest first: [B, V, 4, 4, F], [B, V, 2, 2, F], [B, V, 1, 1, F].
            grid: rows and columns of units of these images.
            split: which units the levels hold, where hidden ones were dropped.
            hidden_only: with ``split``, leave out the others as soon as nothing needs them any more.

        Returns:
            [B, N, width], in the order of ``split``, else in unit order; with ``hidden_only`` [B, M, width].
        """
        picked = [levels[level] for level in self.levels]
        parts = zip(self.embeds, self.embed_norms, picked, strict=True)
        x = sum([embed(norm(level)).flatten(2) for embed, norm, level in parts])  # [B, V, width]
        if split is not None:
            assert self.mask_token is not None
            # a hidden unit gets the mask token from each level, as in the published weights
            x = fill_hidden(x, len(picked) * self.mask_token, split)
        if self.pos_embed is not None:
            positions = resample_position_table(self.pos_embed, self.grid, grid)
            x = x + (positions if split is None else positions[0][split.order])
        unused = None, None, None  # grid, relative positions and windows
        return run_blocks(self.blocks, self.grad_checkpointing, x, *unused, split=split, hidden_only=hidden_only)

    def predict(self, name: str, x: Tensor) -> Tensor:
        """Picked tokens [B, M or N, width] to the numbers of one head."""
        return self.heads[name](self.norm(x))


class AuxiliaryHead(nn.Module):
    """A second head on the tokens of an earlier block, as in the authors' CLIP supervision: blocks, norm, linear.

    Args:
        backbone: gives width, heads, layer scale and relative positions.
        out_dim: numbers predicted for a unit.
        fill_hidden: the network drops hidden units.
        block_norm_eps: eps of the norms in the blocks (1e-5 in the public code).
    """

    def __init__(
        self,
        backbone: HiViT,
        out_dim: int,
        depth: int = 2,
        fill_hidden: bool = False,
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
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim)) if fill_hidden else None
        self.pos_embed = nn.Parameter(sincos_position_table(grid, dim), requires_grad=False) if fill_hidden else None
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
        hidden_only: bool = False,
    ) -> Tensor:
        """Tokens [B, V, C] of a stage 3 block to tokens of all units [B, N, C], or hidden ones, as :class:`Decoder`."""
        if split is not None:
            assert self.pos_embed is not None
            assert self.mask_token is not None
            positions = resample_position_table(self.pos_embed, self.grid, grid)[0]
            x = fill_hidden(x, self.mask_token, split) + positions[split.order]
        args = grid, rel_pos_index, None  # no windows
        return run_blocks(self.blocks, self.grad_checkpointing, x, *args, split=split, hidden_only=hidden_only)

    def predict(self, name: str, x: Tensor) -> Tensor:
        """Picked tokens [B, M or N, C] -> [B, M or N, out_dim]."""
        return self.head(self.norm(x))


def fill_hidden(x: Tensor, mask_token: Tensor, split: Split) -> Tensor:
    """Visible tokens [B, V, C] -> visible ones, then a mask token for each hidden unit, [B, N, C]."""
    return torch.cat([x, mask_token.to(x.dtype).expand(len(x), split.hidden.shape[1], -1)], dim=1)
