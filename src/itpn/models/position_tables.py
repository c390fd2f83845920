"""Fit position tables of a file to a network for images of another size."""

from collections.abc import Mapping

from torch import Tensor

from itpn.models.backbone import Backbone
from itpn.models.position import Grid, resample_offsets, resample_position_table, resample_relative_table, square


def fit_tables(
    tensors: dict[str, Tensor], own: Mapping[str, Tensor], backbone: Backbone, stored_grid: Grid | None = None
) -> list[str]:
    """Resample position tables to the grids of a backbone, in place.

    Args:
        tensors: of the file, by our names.
        own: the network's tensors, by the same names: of the backbone and of its pyramid and heads.
        stored_grid: rows and columns of the file's tables; None for square tables, whose sizes follow from their
            lengths.

    Returns:
        The names of the resampled tables.
    """
    changed = []
    for name in own.keys() & tensors.keys():
        stored, wanted = tensors[name], own[name]
        if stored.dim() < 2 or stored.shape[-1] != wanted.shape[-1]:
            continue
        fitted = _fit_table(name, stored, wanted, backbone, stored_grid)
        if fitted is not stored:
            tensors[name] = fitted
            changed.append(name)
    return changed


def _fit_table(name: str, stored: Tensor, wanted: Tensor, backbone: Backbone, stored_grid: Grid | None) -> Tensor:
    """The stored tensor, resampled if it is a position table of another grid."""
    if name.endswith("pos_embed"):
        grid = stored_grid or (backbone.grid_size if stored.shape == wanted.shape else square(stored.shape[1]))
        if grid == backbone.grid_size:
            return stored
        # the backbone's own table is resampled as the backbone itself would for an image of that size
        how = backbone.pos_resample if name in ("pos_embed", "backbone.pos_embed") else "exact"
        return resample_position_table(stored, grid, backbone.grid_size, how)
    if name.endswith("relative_position_bias_table"):
        assert backbone.rel_pos_grid is not None
        grid = stored_grid or backbone.rel_pos_grid
        if (2 * grid[0] - 1) * (2 * grid[1] - 1) != len(stored):  # unknown, or made for a rel_pos_size
            side = (square(len(stored))[0] + 1) // 2
            grid = (side, side)
        return resample_relative_table(stored, grid, backbone.rel_pos_grid)
    if name.endswith(("rel_pos_h", "rel_pos_w")):
        return resample_offsets(stored, len(wanted))
    return stored
