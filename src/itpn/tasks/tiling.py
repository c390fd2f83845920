"""Large images in overlapping tiles: where the tiles are, and how maps of them are joined."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from itpn.geometry import find_starts


class Tile(NamedTuple):
    """A rectangle of an image in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Its rows and columns, as an index of an image."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    def cut(self, pixels: Tensor) -> Tensor:
        """Its part of an image [..., H, W]."""
        rows, cols = self.slices
        return pixels[..., rows, cols]


@dataclass(frozen=True)
class Grid:
    """Tiles that cover an image exactly. They are evenly spaced, so that neighbours overlap by about the same.

    Args:
        height, width: of the image.
        size: side of the tiles; where the image is smaller, its side.
        overlap: the least that neighbours share, at most half of ``size``.
    """

    height: int
    width: int
    size: int
    overlap: int

    @cached_property
    def rows(self) -> list[int]:
        """The first row of the tiles in each row of them."""
        return find_starts(self.height, self.size, self.overlap)

    @cached_property
    def cols(self) -> list[int]:
        """The first column of the tiles in each column of them."""
        return find_starts(self.width, self.size, self.overlap)

    def __len__(self) -> int:
        return len(self.rows) * len(self.cols)

    def __iter__(self) -> Iterator[Tile]:
        """The tiles, row by row."""
        height, width = min(self.size, self.height), min(self.size, self.width)
        return (Tile(top, left, height, width) for top in self.rows for left in self.cols)


def find_weights(starts: list[int], whole: int, size: int, overlap: int) -> list[Tensor]:
    """Weights of the pixels of tiles along a side, float32 [size] each, that sum to one for every pixel of the image.

    At a border between tiles the outer quarter of the overlap has no weight, because a network sees it without its
    surroundings; then the weight rises to one as a cosine.
    """
    side, margin = min(whole, size), overlap // 4
    places = torch.arange(side, dtype=torch.float64) + 0.5
    ramp = ((places - margin) / max(overlap - 2 * margin, 1)).clamp(0, 1)
    ramp = 0.5 - 0.5 * torch.cos(math.pi * ramp)
    if not overlap:
        ramp = torch.ones_like(ramp)
    own, total = [], torch.zeros(whole, dtype=torch.float64)
    for start in starts:
        weight = torch.ones_like(ramp)
        weight *= ramp if start else 1
        weight *= ramp.flip(0) if start + side < whole else 1
        own.append(weight)
        total[start : start + side] += weight
    return [(weight / total[start : start + side]).float() for start, weight in zip(starts, own, strict=True)]


def blend(grid: Grid, maps: Iterable[Tensor]) -> Iterator[tuple[Tile, Tensor]]:
    """Join maps of tiles into one of the image: weighted means where tiles overlap.

    Parts of the result come as soon as they are complete. Kept is what two rows of tiles share, over the width of the
    image: channels * overlap * width numbers.

    Args:
        maps: [channels, height, width] of each tile, in their order.

    Yields:
        A part of the image and its map; together they cover it exactly.
    """
    down = find_weights(grid.rows, grid.height, grid.size, grid.overlap)
    across = find_weights(grid.cols, grid.width, grid.size, grid.overlap)
    maps = iter(maps)
    above: Tensor | None = None  # of the rows of tiles before, what reaches into this one
    for row, (top, below) in enumerate(zip(grid.rows, [*grid.rows[1:], grid.height], strict=True)):
        ready, kept, before = below - top, None, None
        for col, (left, right) in enumerate(zip(grid.cols, [*grid.cols[1:], grid.width], strict=True)):
            done = right - left
            given = next(maps)
            own = given * (down[row][:, None] * across[col]).to(given)
            if before is not None:  # of the tile to the left
                own[..., : before.shape[-1]] += before
            if above is not None:
                own[:, : above.shape[1], :done] += above[..., left:right]
            yield Tile(top, left, ready, done), own[:, :ready, :done]
            if ready < own.shape[1]:
                kept = own.new_empty(own.shape[0], own.shape[1] - ready, grid.width) if kept is None else kept
                kept[..., left:right] = own[:, ready:, :done]
            before = own[..., done:]
        above = kept
