"""Tiles: they cover an image exactly, and maps of them join to that of the whole image, with bounded memory."""

import gc
import itertools

import pytest
import torch
from torch import nn

from itpn.tasks.tiling import Grid, Tile, blend, find_starts, find_weights


def cut(image, tile: Tile):
    return image[..., tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]


def join(grid: Grid, maps):
    """The blended map of the whole image; every pixel must come exactly once."""
    whole, count = None, torch.zeros(grid.height, grid.width)
    for part, values in blend(grid, maps):
        whole = torch.full((len(values), grid.height, grid.width), torch.nan) if whole is None else whole
        assert values.shape[1:] == (part.height, part.width)
        cut(whole, part).copy_(values)
        cut(count, part).add_(1)
    assert bool((count == 1).all())
    return whole


@pytest.mark.parametrize("overlap", [0, 1, 5, 16])
@pytest.mark.parametrize("whole", [1, 31, 32, 33, 48, 50, 100, 333])
def test_tiles_cover_a_side_exactly(whole, overlap):
    starts = find_starts(whole, 32, overlap)
    side = min(32, whole)
    assert starts[0] == 0
    assert starts[-1] + side == whole
    assert starts == sorted({*starts})
    assert all(after - before <= 32 - overlap for before, after in itertools.pairwise(starts))
    fewer = len(starts) - 1
    assert not fewer or fewer * 32 - (fewer - 1) * overlap < whole  # one tile less would not do
    total = torch.zeros(whole)
    for start, weight in zip(starts, find_weights(starts, whole, 32, overlap), strict=True):
        assert bool((weight >= 0).all())
        total[start : start + side] += weight
    assert torch.allclose(total, torch.ones(whole), atol=1e-6)


@pytest.mark.parametrize("size", [(24, 24), (100, 77), (24, 130), (65, 23), (7, 5)])
@pytest.mark.parametrize("channels", [1, 4])
def test_a_convolution_in_tiles_equals_that_of_the_whole_image(size, channels):
    """Tiles overlap by more than the convolution sees, and pixels beside a border between tiles do not count."""
    torch.manual_seed(0)
    network = nn.Conv2d(channels, 6, 3, padding=1)
    image, grid = torch.rand(channels, *size), Grid(*size, size=24, overlap=8)
    with torch.no_grad():
        tiled = join(grid, (network(cut(image, tile)) for tile in grid))
        assert (tiled - network(image)).abs().max() < 1e-5
        wrong = join(Grid(*size, 24, 0), (network(cut(image, tile)) for tile in Grid(*size, 24, 0)))
    if len(grid) > 1:
        assert (wrong - network(image)).abs().max() > 1e-2  # without an overlap borders show


def test_one_tile_is_not_changed_at_all():
    values = torch.randn(3, 20, 30)
    assert torch.equal(join(Grid(20, 30, 32, 8), [values]), values)


def test_memory_is_what_two_rows_of_tiles_share():
    """Of an image of 15 rows of tiles: two overlaps and a few tiles, a tenth of the map of the whole image."""
    grid, before, peak = Grid(1220, 900, 100, 20), live_bytes(), 0
    for part, _ in blend(grid, (torch.zeros(5, 100, 100) for _ in grid)):
        if part.left + part.width == 900:
            peak = max(peak, live_bytes() - before)
    overlap, tile = 5 * 20 * 900 * 4, 5 * 100 * 100 * 4
    assert overlap <= peak <= 2 * overlap + 4 * tile


def live_bytes() -> int:
    """Bytes of all float tensors of some size that exist."""
    tensors = (one for one in gc.get_objects() if type(one) is torch.Tensor and one.is_floating_point())
    storages = {one.data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(size for size in storages.values() if size > 10_000)
