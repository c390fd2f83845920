"""The feature pyramid that is pre-trained together with the backbone (Tian et al. 2023, section 3.2).

It works unit by unit like stages 1 and 2 of the backbone, so hidden units never enter it either.
"""

from typing import Literal

from torch import Tensor, nn

from itpn.models.hivit import MlpBlock, initialize_linears


class PatchSplit(nn.Module):
    """One token to four neighbours: [B, N, r, c, C] -> [B, N, 2r, 2c, dim]."""

    def __init__(self, in_dim: int, dim: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_dim, eps=norm_eps)
        self.expansion = nn.Linear(in_dim, 4 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, rows, cols, _ = x.shape
        x = self.expansion(self.norm(x)).reshape(batch, count, rows, cols, 2, 2, -1)
        # row by row, unlike the merge, as the published weights were trained
        return x.permute(0, 1, 2, 4, 3, 5, 6).reshape(batch, count, 2 * rows, 2 * cols, -1)


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
        weight_init: Literal["xavier", "trunc_normal"] = "trunc_normal",
    ) -> None:
        super().__init__()
        self.width = width
        self.top = nn.Linear(in_dims[2], width) if in_dims[2] != width else nn.Identity()
        self.laterals = nn.ModuleList([nn.Linear(dim, width, bias=False) for dim in in_dims[:2]])
        self.splits = nn.ModuleList([PatchSplit(width, width, norm_eps), PatchSplit(in_dims[2], width, norm_eps)])
        blocks = [[MlpBlock(width, mlp_ratio, norm_eps=norm_eps) for _ in range(depth)] for _ in range(2)]
        self.blocks = nn.ModuleList([nn.Sequential(*level) for level in blocks])
        self.outputs = nn.ModuleList([MlpBlock(width, mlp_ratio, norm_eps=norm_eps) for _ in range(3)])
        initialize_linears(self, weight_init)

    def forward(self, stages: list[Tensor]) -> list[Tensor]:
        """Backbone stages, finest first, to pyramid levels, finest first (all lists here are).

        Args:
            stages: [B, V, 4, 4, C/4], [B, V, 2, 2, C/2], [B, V, 1, 1, C].

        Returns:
            [B, V, 4, 4, width], [B, V, 2, 2, width], [B, V, 1, 1, width].
        """
        fine, middle, coarse = stages
        # stride 8 is split from the backbone's own output, not from the projected top level
        level8 = self.blocks[1](self.splits[1](coarse) + self.laterals[1](middle))
        level4 = self.blocks[0](self.splits[0](level8) + self.laterals[0](fine))
        levels = [level4, level8, self.top(coarse)]
        return [output(level) for output, level in zip(self.outputs, levels, strict=True)]
