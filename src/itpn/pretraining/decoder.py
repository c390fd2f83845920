"""The pixel decoder: pyramid levels of the visible units to the pixels of every unit."""

from typing import Literal

import torch
from torch import Tensor, nn

from itpn.models.hivit import TransformerBlock, checkpoint, initialize_linears
from itpn.models.position import Grid, resample_position_table, sincos_position_table


class PixelDecoder(nn.Module):
    """A light transformer over all units (Tian et al. 2023, section 3.2; He et al. 2022, section 3).

    Each pyramid level is normalised and projected so that a unit yields ``width`` numbers whatever its number of
    tokens; the levels are summed, hidden units are filled with a mask token, fixed positions are added.

    Args:
        grid: rows and columns of units.
        out_dim: numbers predicted for a unit, unit * unit * channels for pixels.
        pyramid_width: channels of the pyramid levels.
        width: channels of the decoder, divisible by 16 and by ``num_heads``.
        embed_norm_eps: eps of the norms before the projections (1e-5 in mmpretrain, 1e-6 elsewhere).

    Raises:
        ValueError: ``width`` does not divide.
    """

    def __init__(
        self,
        grid: Grid,
        out_dim: int,
        pyramid_width: int = 256,
        width: int = 512,
        depth: int = 6,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        embed_norm_eps: float = 1e-6,
        weight_init: Literal["xavier", "trunc_normal"] = "xavier",
    ) -> None:
        super().__init__()
        if width % 16 or width % num_heads:
            raise ValueError(f"decoder width must be divisible by 16 and by num_heads={num_heads}, not {width}")
        self.grid = grid
        self.num_heads = num_heads
        self.embed_norms = nn.ModuleList([nn.LayerNorm(pyramid_width, eps=embed_norm_eps) for _ in range(3)])
        # 16, 4 and 1 tokens a unit, finest level first
        self.embeds = nn.ModuleList([nn.Linear(pyramid_width, width // tokens) for tokens in (16, 4, 1)])
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_position_table(grid, width), requires_grad=False)
        self.blocks = nn.ModuleList(
            [TransformerBlock(width, num_heads, mlp_ratio, norm_eps=norm_eps) for _ in range(depth)]
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.head = nn.Linear(width, out_dim)
        self.grad_checkpointing = False
        initialize_linears(self, weight_init)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, levels: list[Tensor], visible: Tensor, hidden: Tensor, grid: Grid, hidden_only: bool = False
    ) -> Tensor:
        """Predict hidden units, or all of them.

        Args:
            levels: pyramid of the visible units, finest first: [B, V, 4, 4, F], [B, V, 2, 2, F], [B, V, 1, 1, F].
            visible, hidden: int64 [B, V] and [B, M], together all units.
            grid: rows and columns of units of these images.
            hidden_only: run the prediction layer on hidden units only.

        Returns:
            [B, M, out_dim] in the order of ``hidden``, or [B, N, out_dim] in unit order.
        """
        x = sum(
            embed(norm(level)).flatten(2)
            for embed, norm, level in zip(self.embeds, self.embed_norms, levels, strict=True)
        )  # [B, V, width]
        # a hidden unit gets the mask token from each level, as in the published weights
        tokens = (len(levels) * self.mask_token).to(x.dtype).expand(len(x), hidden.shape[1], -1)
        # attention does not care for order: visible units first, so that no unit has to be moved back before the head
        order = torch.cat([visible, hidden], dim=1)
        positions = resample_position_table(self.pos_embed, self.grid, grid)[0]
        x = torch.cat([x, tokens], dim=1) + positions[order]  # [B, N, width]
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        if hidden_only:
            return self.head(self.norm(x[:, visible.shape[1] :]))
        x = self.head(self.norm(x))
        return torch.empty_like(x).scatter(1, order.unsqueeze(-1).expand_as(x), x)
