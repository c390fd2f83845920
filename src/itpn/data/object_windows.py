"""Objects in windows of large images: their boxes, masks and areas there."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle

from itpn.data.formats.image_file import Window
from itpn.data.mask_pieces import Piece, encode_piece
from itpn.data.objects import DetectionImages
from itpn.data.readers import PackedStrings
from itpn.data.windows import Windows

STEPS = 5  # in which COCO's API rounds the points of polygons, of a pixel


def cut_objects(images: DetectionImages, windows: Windows, min_visible: float) -> DetectionImages:
    """The windows of images as images, with the objects that are visible in them; ids are new.

    Boxes are clipped. Objects are left out of which less than a fraction is visible: of the area of the mask, or of
    the box where there is none. Crowds stay, however little is visible. Masks become run lengths.

    Args:
        windows: in the order of the images.
    """
    packed = []
    numbers = windows.places[:, 0]
    for index in range(len(images)):
        height, width = images.sizes[index].tolist()
        objects = _Objects(images.objects_of(index), height, width)
        for place in windows.places[slice(*np.searchsorted(numbers, (index, index + 1)))].tolist():
            packed.append(json.dumps(objects.cut(tuple(place[1:]), min_visible)))
    return replace(
        images,
        files=windows,
        objects=PackedStrings(packed),
        sizes=windows.places[:, 3:],
        ids=np.arange(1, len(windows) + 1),
    )


class _Objects:
    """The objects of an image of a height and a width."""

    def __init__(self, objects: list[dict[str, Any]], height: int, width: int) -> None:
        self._objects, self._height, self._width = objects, height, width
        self._corners = np.array([one["bbox"] for one in objects], dtype=np.float64).reshape(-1, 4)  # x0, y0, x1, y1
        self._corners[:, 2:] += self._corners[:, :2]
        self._masks: dict[int, Piece] = {}  # of those that some window needed

    def cut(self, window: Window, min_visible: float) -> list[dict[str, Any]]:
        """Those that are visible in a window."""
        top, left, height, width = window
        corners = (self._corners - (left, top, left, top)).clip(0, (width, height, width, height))
        x0, y0, x1, y1 = corners.T
        seen = []
        for index in np.flatnonzero((x1 > x0) & (y1 > y0)).tolist():
            one, (left0, top0, right, bottom) = self._objects[index], corners[index].tolist()
            cut = {**one, "bbox": [left0, top0, right - left0, bottom - top0]}
            if "segmentation" in one:
                mask = self._mask(index)
                part = cut_mask(mask, window)
                visible = int(part.pixels.sum()) / max(1, int(mask.pixels.sum()))
                cut["segmentation"] = encode_piece(part, height, width)
            else:
                visible = (right - left0) * (bottom - top0) / (one["bbox"][2] * one["bbox"][3])
            if visible > 0 and (visible >= min_visible or one["iscrowd"]):
                seen.append(cut | {"area": one["area"] * visible})
        return seen

    def _mask(self, index: int) -> Piece:
        if index not in self._masks:
            self._masks[index] = draw_local(self._objects[index]["segmentation"], self._height, self._width)
        return self._masks[index]


def draw_local(segmentation: Any, height: int, width: int) -> Piece:
    """COCO's polygons or run lengths as the part of the image that they are in; nothing else is drawn."""
    if not isinstance(segmentation, dict):
        return _draw_polygons(segmentation, height, width)
    counts = segmentation["counts"]
    return _draw_runs(decode_counts(counts) if isinstance(counts, str | bytes) else counts, height)


def decode_counts(text: str | bytes) -> list[int]:
    """Run lengths from COCO's compressed form: 5 bits a character, a sign, differences to the last but one."""
    counts: list[int] = []
    value = shift = 0
    for character in text.encode() if isinstance(text, str) else text:
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) * bool(bits & 16)
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def _draw_runs(counts: list[int], height: int) -> Piece:
    """Of run lengths in the order of columns, background first."""
    ends = np.cumsum(counts)
    begins, ends = ends[0:-1:2], ends[1::2]
    begins, ends = begins[ends > begins], ends[ends > begins]
    left, right = int(begins[0]) // height, (int(ends[-1]) - 1) // height + 1
    steps = np.zeros((right - left) * height + 1, dtype=np.int8)
    steps[begins - left * height] += 1
    steps[ends - left * height] -= 1
    columns = steps[:-1].cumsum(dtype=np.int8).astype(bool).reshape(right - left, height)
    rows = np.flatnonzero(columns.any(axis=0))
    return Piece(int(rows[0]), left, columns[:, rows[0] : rows[-1] + 1].T)


def _draw_polygons(polygons: list[list[float]], height: int, width: int) -> Piece:
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in polygons])
    low, high = np.floor(points.min(axis=0)) - 1, np.ceil(points.max(axis=0)) + 2
    left, top = (int(min(max(value, 0), side - 1)) for value, side in zip(low, (width, height), strict=True))
    moved = [_move(np.reshape(polygon, (-1, 2)), (left, top)).ravel().tolist() for polygon in polygons]
    sides = max(1, min(height, int(high[1])) - top), max(1, min(width, int(high[0])) - left)
    return Piece(top, left, rle.decode(rle.merge(rle.frPyObjects(moved, *sides))).astype(bool))


def _move(points: np.ndarray, offset: tuple[int, int]) -> np.ndarray:
    """Points [n, 2] beside an offset, rounded as they are where they come from: drawn, they are the same pixels."""
    rounded = (np.floor(STEPS * points + 0.5) - STEPS * np.array(offset)) / STEPS
    return np.where(np.array(offset) > 0, rounded, points)


def cut_mask(mask: Piece, window: Window) -> Piece:
    """What a window has of a mask, counted from the window's corner; an array of no pixels where it has nothing."""
    (top, left, pixels), (y, x, height, width) = mask, window
    rows = slice(max(0, y - top), max(0, y + height - top))
    cols = slice(max(0, x - left), max(0, x + width - left))
    return Piece(max(0, top - y), max(0, left - x), pixels[rows, cols])
