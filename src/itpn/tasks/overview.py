"""What is shown and kept of large images, which are not held as a whole."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from torch import Tensor

from itpn.tasks.tiling import Tile

IN_MEMORY = 2**24  # pixels of a class map that is not in a file
OVERVIEW = 2048  # pixels: longest side of what is drawn of a large image


class Overview:
    """Every n-th pixel of a large image, gathered tile by tile.

    Args:
        height, width: of the image.
    """

    def __init__(self, height: int, width: int) -> None:
        self.step = -(-max(height, width) // OVERVIEW)
        self._size = -(-height // self.step), -(-width // self.step)
        self._pixels: Tensor | None = None

    def add(self, tile: Tile, pixels: Tensor) -> None:
        """Pixels [C, height, width] of a tile, as stored."""
        if self._pixels is None:
            self._pixels = pixels.new_zeros(len(pixels), *self._size)
        taken = thin(pixels, tile, self.step)
        top, left = -(-tile.top // self.step), -(-tile.left // self.step)
        self._pixels[:, top : top + taken.shape[-2], left : left + taken.shape[-1]] = taken

    def watch(self, read: Callable[[Tile], Tensor]) -> Callable[[Tile], Tensor]:
        """What reads tiles, and adds them."""

        def read_and_add(tile: Tile) -> Tensor:
            pixels = read(tile)
            self.add(tile, pixels)
            return pixels

        return read_and_add

    @property
    def pixels(self) -> Tensor:
        assert self._pixels is not None
        return self._pixels


def thin(pixels: Tensor, tile: Tile, step: int) -> Tensor:
    """The pixels [..., h, w] of a tile that are in every n-th row and column of the image."""
    return pixels[..., -tile.top % step :: step, -tile.left % step :: step]


@contextmanager
def label_array(folder: Path, height: int, width: int) -> Iterator[np.ndarray]:
    """uint8 [height, width]; a large one is in a file without a name, so that others can have its memory."""
    if height * width <= IN_MEMORY:
        yield np.zeros((height, width), np.uint8)
        return
    with tempfile.TemporaryFile(dir=folder) as file:
        yield np.memmap(file, np.uint8, "w+", shape=(height, width))
