"""Position embeddings: sine-cosine tables, resampling to other grids, relative position indices."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]  # rows, columns of patches
Resample = Literal["exact", "legacy"]
POSITIONS = ("pos_embed", "relative_position_bias_table", "rel_pos_h", "rel_pos_w")  # ends of names, never decayed


def square(entries: int) -> Grid:
    """The square grid of a table with so many entries.

    Raises:
        ValueError: the number of entries is not a square.
    """
    side = math.isqrt(entries)
    if side**2 != entries:
        raise ValueError(f"a position table of {entries} entries is not of a square image")
    return side, side


def is_open(grid: Grid) -> bool:
    """Whether the grid is dynamic in ``torch.export``: a comparison with its size would specialize the graph."""
    return isinstance(grid[0], torch.SymInt) or isinstance(grid[1], torch.SymInt)


def same_grid(stored: Grid, wanted: Grid) -> bool:
    """Whether there is nothing to resample.

    Always False for dynamic grids: their graph resamples every time. On equal grids that changes nothing, because all
    samples fall on entries of the table.
    """
    return not is_open(wanted) and stored == wanted


def sincos_position_table(grid: Grid, dim: int) -> Tensor:
    """Fixed 2-D sine-cosine position embedding (He et al. 2022, appendix A.1).

    The first half of the channels encodes the column, the second the row; in each half all sines come first.

    Returns:
        float32 [1, rows * cols, dim].

    Raises:
        ValueError: ``dim`` is not divisible by 4.
    """
    if dim % 4:
        raise ValueError(f"a sine-cosine position table needs a width divisible by 4, not {dim}")
    # float64 until the end: on large grids, float32 angles lose the digits in which adjacent positions differ
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, cols = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    halves = [position.reshape(-1, 1) * frequency for position in (cols, rows)]  # [N, dim/4] each
    return torch.cat([f(half) for half in halves for f in (torch.sin, torch.cos)], dim=1).float().unsqueeze(0)


def resample_position_table(table: Tensor, stored: Grid, wanted: Grid, how: Resample = "exact") -> Tensor:
    """Resample a position table bicubically to another grid.

    Args:
        table: [1, stored rows * stored cols, C].
        how: ``"exact"`` samples by the true ratio of the grids. ``"legacy"`` is what both public code bases of
            iTPN do: the scale factor is (wanted + 0.1) / stored and also sets where the table is sampled.

    Returns:
        [1, wanted rows * wanted cols, C]; the table itself if ``"exact"`` and the grids are equal.
    """
    if how == "exact" and same_grid(stored, wanted):
        return table
    maps = table.reshape(1, *stored, -1).permute(0, 3, 1, 2)  # [1, C, rows, cols]
    if how == "exact":
        maps = F.interpolate(maps, size=wanted, mode="bicubic", align_corners=False)
    elif is_open(wanted):
        maps = _resample_open_legacy(maps, stored, wanted)
    else:
        factor = ((wanted[0] + 0.1) / stored[0], (wanted[1] + 0.1) / stored[1])
        maps = F.interpolate(maps, scale_factor=factor, mode="bicubic", align_corners=False)
    return maps.flatten(2).transpose(1, 2)  # [1, wanted rows * wanted cols, C]


def _resample_open_legacy(maps: Tensor, stored: Grid, wanted: Grid) -> Tensor:
    """``"legacy"`` for a dynamic grid, on maps [1, C, rows, cols]: ``scale_factor`` would be a constant of the graph.

    Like the public code, it does not change a table whose grid is the wanted one.
    """
    own, sizes = torch.tensor(stored).float(), torch.stack([torch.scalar_tensor(side) for side in wanted])
    scale = torch.where((sizes == own).all(), 1.0, own / (sizes + 0.1))
    # sampling positions, from -1 to 1 over the table
    rows, cols = [(2 * torch.arange(w) + 1) * k / s - 1 for w, k, s in zip(wanted, scale, stored, strict=True)]
    row, col = torch.meshgrid(rows, cols, indexing="ij")
    samples = torch.stack([col, row], dim=-1).unsqueeze(0).to(maps)  # [1, wanted rows, wanted cols, 2]
    return F.grid_sample(maps, samples, mode="bicubic", padding_mode="border", align_corners=False)


def relative_position_index(grid: Grid) -> Tensor:
    """Which row of a relative position table belongs to each pair of patches.

    Returns:
        int64 [N, N] (query, key) into a table of (2 * rows - 1) * (2 * cols - 1) offsets, row-major.
    """
    rows, cols = grid
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    row, col = row.flatten(), col.flatten()
    row_offset = row[:, None] - row[None, :] + rows - 1
    col_offset = col[:, None] - col[None, :] + cols - 1
    return row_offset * (2 * cols - 1) + col_offset


def resample_offsets(table: Tensor, wanted: int) -> Tensor:
    """Resample vectors of offsets along one axis, [2R-1, D] -> [wanted, D], as the published detectors do."""
    if same_grid((1, len(table)), (1, wanted)):
        return table
    return F.interpolate(table.T[None], size=wanted, mode="linear").squeeze(0).T


def resample_relative_table(table: Tensor, stored: Grid, wanted: Grid) -> Tensor:
    """Resample a relative position table [(2R-1)(2C-1), heads] bicubically to the offsets of another grid."""
    if same_grid(stored, wanted):
        return table
    stored_offsets, wanted_offsets = ((2 * r - 1, 2 * c - 1) for r, c in (stored, wanted))
    maps = table.reshape(1, *stored_offsets, -1).permute(0, 3, 1, 2)  # [1, heads, 2R-1, 2C-1]
    # only with aligned corners is the middle entry offset zero on both grids
    maps = F.interpolate(maps, size=wanted_offsets, mode="bicubic", align_corners=True)
    return maps.flatten(2).squeeze(0).transpose(0, 1)
