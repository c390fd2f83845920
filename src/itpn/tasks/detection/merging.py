"""Objects that were found in overlapping tiles, put together: duplicates are left out, cut objects are joined.

The rule, class by class:

1. An object is *cut* if its box touches a border between tiles. If another tile has all of that box inside, only what
   that tile says counts, because it sees the surroundings as well: the cut object is dropped.
2. Two objects of different tiles are the same if their boxes, both clipped to what the tiles share, have an IoU of the
   network's NMS threshold or more. Of a whole and a cut one the whole one stays. Two cut ones are joined: the box
   around both, the union of the masks, the higher score. An object larger than a tile is so joined over many tiles.
3. What remains goes through the NMS of the network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from itpn.data.mask_pieces import Piece, encode_piece
from itpn.tasks.tiling import Grid, Tile

EDGE = 1 / 128  # of a tile's side: a box that ends so near to its border touches it, 4 px of 512


@dataclass(frozen=True)
class Objects:
    """Objects in an image.

    Attributes:
        boxes: float32 [n, 4], x0, y0, x1, y1 in pixels.
        labels: int64 [n], from 1.
        scores: float32 [n].
        masks: of each object; None from a network without masks.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: list[Piece] | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def take(self, rows: Tensor) -> "Objects":
        """Some of the objects, by bool [n] or by indices."""
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        masks = None if self.masks is None else [self.masks[row] for row in rows.tolist()]
        return Objects(self.boxes[rows], self.labels[rows], self.scores[rows], masks)

    def move(self, top: int, left: int) -> "Objects":
        """As they are in an image that a tile begins in at ``top`` and ``left``."""
        masks = self.masks and [Piece(one.top + top, one.left + left, one.pixels) for one in self.masks]
        boxes = self.boxes + self.boxes.new_tensor([left, top, left, top])
        return Objects(boxes, self.labels, self.scores, masks)


def to_objects(found: dict[str, Tensor]) -> Objects:
    """The objects of an image in the form of torchvision's detectors, on the CPU."""
    masks = None
    if "masks" in found:
        masks = [cut_piece(mask[0].numpy() > 0.5) for mask in found["masks"]]
    return Objects(found["boxes"], found["labels"], found["scores"], masks)


def cut_piece(mask: np.ndarray) -> Piece:
    """A mask, bool [H, W], without the empty rows and columns around it."""
    rows, cols = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return Piece(0, 0, mask[:0, :0])
    top, left = int(rows[0]), int(cols[0])
    return Piece(top, left, mask[top : rows[-1] + 1, left : cols[-1] + 1].copy())


def join_objects(parts: Sequence[Objects]) -> Objects:
    masks = None if any(one.masks is None for one in parts) else [mask for one in parts for mask in one.masks or ()]
    columns = ([getattr(one, name) for one in parts] for name in ("boxes", "labels", "scores"))
    boxes, labels, scores = (torch.cat(own) for own in columns)
    return Objects(boxes, labels, scores, masks)


def describe_objects(
    objects: Objects, height: int, width: int, image_id: int, class_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """The objects of an image in COCO's form, as of `itpn.metrics.detection.to_results`."""
    boxes = objects.boxes.clone()
    boxes[:, 2:] -= boxes[:, :2]
    columns = boxes.double().tolist(), objects.labels.tolist(), objects.scores.double().tolist()
    results = [
        {"image_id": image_id, "category_id": class_ids[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(*columns, strict=True)
    ]
    for result, mask in zip(results, objects.masks or (), strict=False):
        result["segmentation"] = encode_piece(mask, height, width)
    return results


# --- merging


def merge_objects(grid: Grid, found: Sequence[Objects], threshold: float) -> Objects:
    """Objects of an image from those of its tiles.

    Args:
        found: of each tile, in pixels of the image; that of a single tile is returned as it is.
        threshold: IoU of the network's NMS.
    """
    tiles = list(grid)
    if len(tiles) == 1:
        return found[0]
    sides = torch.tensor([(tile.left, tile.top, tile.left + tile.width, tile.top + tile.height) for tile in tiles])
    cut, kept = [], []
    for tile, own in zip(tiles, found, strict=True):
        cut.append(touches_border(grid, tile, own.boxes))
        kept.append(~(cut[-1] & seen_by_another(grid, tiles, sides, tile, own.boxes)))
    found = [own.take(rows) for own, rows in zip(found, kept, strict=True)]
    cut = [own[rows] for own, rows in zip(cut, kept, strict=True)]
    first = np.cumsum([0, *map(len, found)]).tolist()  # row of each tile's objects among all
    every = join_objects(found)
    groups, lost = Groups(), torch.zeros(len(every), dtype=torch.bool)
    for a, b in overlapping_pairs(sides):
        if not (len(found[a]) and len(found[b]) and (cut[a].any() or cut[b].any())):
            continue
        region = torch.cat([torch.maximum(sides[a, :2], sides[b, :2]), torch.minimum(sides[a, 2:], sides[b, 2:])])
        for row, col in find_same(found[a], found[b], region, threshold).tolist():
            if cut[a][row] and cut[b][col]:
                groups.join(first[a] + row, first[b] + col)
            elif cut[a][row] or cut[b][col]:
                lost[first[a] + row if cut[a][row] else first[b] + col] = True
    merged = join_groups(every, [[row for row in group if not lost[row]] for group in groups.find()], lost)
    return merged.take(batched_nms(merged.boxes, merged.scores, merged.labels, threshold))


def touches_border(grid: Grid, tile: Tile, boxes: Tensor) -> Tensor:
    """Which boxes touch a border of a tile or reach over it; borders of the image do not count."""
    edge = max(1.0, EDGE * max(tile.height, tile.width))
    (top, left, height, width), (x0, y0, x1, y1) = tile, boxes.unbind(1)
    touching = torch.zeros(len(boxes), dtype=torch.bool)
    if left:
        touching |= x0 < left + edge
    if top:
        touching |= y0 < top + edge
    if left + width < grid.width:
        touching |= x1 > left + width - edge
    if top + height < grid.height:
        touching |= y1 > top + height - edge
    return touching


def seen_by_another(grid: Grid, tiles: Sequence[Tile], sides: Tensor, tile: Tile, boxes: Tensor) -> Tensor:
    """Which boxes of a tile lie inside another one, away from its borders."""
    left, top, right, bottom = tile.left, tile.top, tile.left + tile.width, tile.top + tile.height
    near = (sides[:, 0] < right) & (sides[:, 2] > left) & (sides[:, 1] < bottom) & (sides[:, 3] > top)
    seen = torch.zeros(len(boxes), dtype=torch.bool)
    for other in near.nonzero()[:, 0].tolist() if len(boxes) else ():
        if tiles[other] != tile:
            seen |= ~touches_border(grid, tiles[other], boxes)
    return seen


def overlapping_pairs(sides: Tensor) -> list[list[int]]:
    """Pairs of tiles that share pixels, each once."""
    pairs: list[list[int]] = []
    for row, (left, top, right, bottom) in enumerate(sides.tolist()):
        rest = sides[row + 1 :]
        shared = (rest[:, 0] < right) & (rest[:, 2] > left) & (rest[:, 1] < bottom) & (rest[:, 3] > top)
        pairs += [[row, row + 1 + other] for other in shared.nonzero()[:, 0].tolist()]
    return pairs


def find_same(a: Objects, b: Objects, region: Tensor, threshold: float) -> Tensor:
    """Pairs of one class whose boxes agree in what both tiles see, int64 [pairs, 2]."""
    origin, size = region[:2].repeat(2), region[2:] - region[:2]
    parts = [clip_boxes_to_image(one.boxes - origin, (int(size[1]), int(size[0]))) for one in (a, b)]
    same = box_iou(*parts).nan_to_num() >= threshold
    return (same & (a.labels[:, None] == b.labels)).nonzero()


class Groups:
    """Rows that belong together, found pair by pair."""

    def __init__(self) -> None:
        self._above: dict[int, int] = {}

    def join(self, a: int, b: int) -> None:
        self._above[self._top(a)] = self._top(b)

    def find(self) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for row in sorted({*self._above, *self._above.values()}):
            groups.setdefault(self._top(row), []).append(row)
        return list(groups.values())

    def _top(self, row: int) -> int:
        while self._above.get(row, row) != row:
            row = self._above[row]
        return row


def join_groups(every: Objects, groups: list[list[int]], lost: Tensor) -> Objects:
    """Objects without those that are lost, and with one in place of each group."""
    rest = ~lost
    joined = []
    for group in groups:
        if not group:
            continue
        rest[group] = False
        own = every.take(torch.tensor(group))
        box = torch.cat([own.boxes[:, :2].amin(dim=0), own.boxes[:, 2:].amax(dim=0)])[None]
        masks = None if own.masks is None else [join_pieces(own.masks)]
        joined.append(Objects(box, own.labels[:1], own.scores.amax()[None], masks))
    return join_objects([every.take(rest), *joined])


def join_pieces(pieces: Sequence[Piece]) -> Piece:
    """The union of masks."""
    pieces = [piece for piece in pieces if piece.pixels.size] or pieces[:1]
    top, left = min(piece.top for piece in pieces), min(piece.left for piece in pieces)
    bottom = max(piece.top + piece.pixels.shape[0] for piece in pieces)
    right = max(piece.left + piece.pixels.shape[1] for piece in pieces)
    union = np.zeros((bottom - top, right - left), bool)
    for piece in pieces:
        rows, cols = piece.pixels.shape
        union[piece.top - top :, piece.left - left :][:rows, :cols] |= piece.pixels
    return Piece(top, left, union)
