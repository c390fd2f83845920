"""Objects of overlapping tiles: each is found once and whole, however tiles cut it; masks stay small."""

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as rle

from itpn.data.mask_pieces import Piece, encode_piece
from itpn.tasks.detection.merging import (
    Objects,
    cut_piece,
    join_pieces,
    merge_objects,
    to_objects,
)
from itpn.tasks.tiling import Grid, Tile

SIZE, OVERLAP = 128, 32


def see(tile: Tile, boxes: np.ndarray, labels: np.ndarray, noise: np.random.Generator | None = None) -> Objects:
    """What a perfect detector sees of some rectangles in a tile: their visible parts, in pixels of the image."""
    low, high = np.array([tile.left, tile.top] * 2), np.array([tile.left + tile.width, tile.top + tile.height] * 2)
    parts = boxes.clip(low, high)
    sides = parts[:, 2:] - parts[:, :2]
    seen = (sides >= 3).all(axis=1)
    parts, visible = parts[seen], (sides.prod(axis=1) / (boxes[:, 2:] - boxes[:, :2]).prod(axis=1))[seen]
    masks = [Piece(int(y0), int(x0), np.ones((int(y1 - y0), int(x1 - x0)), bool)) for x0, y0, x1, y1 in parts.tolist()]
    if noise is not None:
        parts = (parts + noise.uniform(-0.7, 0.7, parts.shape)).clip(low, high)
    found = torch.from_numpy(parts).float()
    return Objects(found, torch.from_numpy(labels[seen]), torch.from_numpy(0.5 + 0.5 * visible).float(), masks)


def scatter(height: int, width: int, seed: int) -> np.ndarray:
    """Rectangles of all sizes, up to three tiles long, that are apart from each other."""
    rng, free, boxes = np.random.default_rng(seed), np.ones((height, width), bool), []
    for longest in (3 * SIZE, SIZE, *[SIZE // 2] * 6, *[24] * 400):
        h, w = rng.integers(5, longest + 1), rng.integers(5, min(longest, 100) + 1)
        h, w = (h, w) if rng.random() < 0.5 else (w, h)
        if h >= height or w >= width:
            continue
        y, x = rng.integers(0, height - h), rng.integers(0, width - w)
        if free[max(y - 4, 0) : y + h + 4, max(x - 4, 0) : x + w + 4].all():
            free[y : y + h, x : x + w] = False
            boxes.append((x, y, x + w, y + h))
    return np.array(boxes, float)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [(500, 700), (129, 900), (128, 128), (300, 131)])
def test_every_object_is_found_once_and_whole(size, seed, noisy):
    boxes, grid = scatter(*size, seed), Grid(*size, SIZE, OVERLAP)
    labels = np.arange(len(boxes)) % 3 + 1
    noise = np.random.default_rng(seed) if noisy else None
    merged = merge_objects(grid, [see(tile, boxes, labels, noise) for tile in grid], 0.5)
    order, expected = np.lexsort(merged.boxes.numpy().round().T[:2]), np.lexsort(boxes.T[:2])
    if noisy:
        assert len(merged) == len(boxes)
        distance = np.abs(merged.boxes.numpy()[:, None] - boxes[None]).max(axis=-1)
        assert distance.min(axis=0).max() < 1.5
        return
    assert merged.boxes.numpy()[order].tolist() == boxes[expected].tolist()
    assert merged.labels.numpy()[order].tolist() == labels[expected].tolist()
    assert merged.masks is not None
    for row, box in zip(order, boxes[expected], strict=True):
        top, left, pixels = merged.masks[row]
        assert pixels.all()
        assert [left, top, left + pixels.shape[1], top + pixels.shape[0]] == box.tolist()


def test_without_merging_objects_would_be_found_twice():
    """The rectangles above are cut by tiles, and lie in several of them."""
    boxes, grid = scatter(500, 700, 0), Grid(500, 700, SIZE, OVERLAP)
    assert sum(len(see(tile, boxes, np.ones(len(boxes), int))) for tile in grid) > 1.3 * len(boxes)


def test_what_a_tile_sees_with_its_surroundings_counts():
    """The left tile sees the whole object and calls it 2; the right one sees a part, is surer, and calls it 1."""
    grid = Grid(128, 224, SIZE, OVERLAP)
    left, right = list(grid)
    assert (left.left, right.left) == (0, 96)
    whole = Objects(torch.tensor([[80.0, 20, 120, 60]]), torch.tensor([2]), torch.tensor([0.6]))
    part = Objects(torch.tensor([[96.0, 20, 120, 60]]), torch.tensor([1]), torch.tensor([0.9]))
    merged = merge_objects(grid, [whole, part], 0.5)
    assert merged.labels.tolist() == [2]
    nothing = whole.take(torch.tensor([False]))
    assert len(merge_objects(grid, [nothing, part], 0.5)) == 0
    assert len(merge_objects(grid, [nothing, nothing], 0.5)) == 0


def test_of_one_tile_nothing_changes():
    """Boxes that NMS would drop stay, and their order."""
    boxes = torch.tensor([[0.0, 0, 50, 50], [1, 1, 50, 50]])
    own = Objects(boxes, torch.tensor([1, 1]), torch.tensor([0.4, 0.9]))
    assert merge_objects(Grid(128, 100, SIZE, OVERLAP), [own], 0.5) is own


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_of_a_piece_are_those_of_the_whole_mask(seed):
    """Full columns run on into the next; empty masks; pieces at every border."""
    rng = np.random.default_rng(seed)
    for shape in [(1, 1), (7, 9), (30, 20)]:
        mask = rng.random(shape) < rng.choice([0.0, 0.1, 0.5, 0.95, 1.0])
        wanted = rle.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        assert encode_piece(cut_piece(mask), *shape) == {"size": list(shape), "counts": wanted}


def test_pieces_are_joined_where_they_are():
    rng = np.random.default_rng(0)
    masks = [np.zeros((40, 50), bool) for _ in range(3)]
    for mask in masks:
        y, x = rng.integers(0, 30, 2)
        mask[y : y + 9, x : x + 11] = rng.random((9, 11)) < 0.7
    joined = join_pieces([cut_piece(mask) for mask in [*masks, masks[0] & False]])
    drawn = np.zeros((40, 50), bool)
    drawn[joined.top :, joined.left :][: joined.pixels.shape[0], : joined.pixels.shape[1]] = joined.pixels
    assert np.array_equal(drawn, masks[0] | masks[1] | masks[2])


def test_masks_take_memory_by_their_objects():
    """A mask of 5x8 px in a tile of 512 px keeps 40 bytes, and no tile."""
    masks = torch.zeros(3, 1, 512, 512)
    masks[:, 0, 100:105, 200:208] = 0.9
    found = {"boxes": torch.zeros(3, 4), "labels": torch.ones(3), "scores": torch.ones(3), "masks": masks}
    pieces = to_objects(found).move(1000, 2000).masks
    assert pieces is not None
    assert [(one.top, one.left, one.pixels.shape) for one in pieces] == [(1100, 2200, (5, 8))] * 3
    assert all(one.pixels.base is None and one.pixels.nbytes == 40 for one in pieces)
