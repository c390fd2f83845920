"""Which images are cut into tiles, and how."""

import statistics
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rich.progress import track
from torch import Tensor

from itpn.data.decode import UnreadableImage
from itpn.data.readers import Reader
from itpn.data.samples import Sample, open_for_tiles
from itpn.data.stored import ReadSettings
from itpn.errors import UserError
from itpn.system.console import Output, print_warnings
from itpn.tasks.source_images import SourceImage
from itpn.tasks.tiling import Grid, Tile

WHOLE = 2  # times the size of training's images: images up to there are not cut unless windows are given
SIZED = 10  # images whose sizes are looked at


@dataclass(frozen=True)
class Tiling:
    """How large images are cut.

    Attributes:
        size: side of the tiles in pixels of the image.
        overlap: pixels that neighbours share at least.
        given: the user has said so, or the network was trained on such windows. Otherwise photographs are not cut: as
            in training they are resized as a whole, for more of their pixels show the same things larger.
    """

    size: int
    overlap: int
    given: bool

    def grid(self, height: int, width: int, whole: bool = False) -> Grid | None:
        """The tiles of an image; None for one that is not cut.

        Args:
            whole: the image is a photograph, and small enough to be decoded.
        """
        if max(height, width) <= self.size * (1 if self.given else WHOLE) or (whole and not self.given):
            return None
        return Grid(height, width, self.size, self.overlap)

    def cut(self, image: "SourceImage") -> Grid | None:
        """As :meth:`grid`, of an image whose header has been read."""
        return self.grid(image.height, image.width, image.is_photo and image.fits)


def find_tiling(size: int | None, overlap: int | None, trained: Mapping[str, Any], usual: int) -> Tiling:
    """How images are cut, by what was given, or else by the settings of data that the network was trained with.

    Args:
        size, overlap: as of --window-size and --window-overlap; None where they were not given.
        usual: side of the images that the network was trained on.

    Raises:
        UserError: tiles would overlap by more than half.
    """
    stored = trained.get("window_size")
    side = size or stored or usual
    if overlap is None:
        overlap = min(trained.get("window_overlap", side), side // 2) if stored and side == stored else side // 4
    if overlap > side // 2:
        raise UserError(f"--window-overlap must be at most half of the windows' side of {side} pixels, not {overlap}")
    return Tiling(side, overlap, bool(size or stored))


def tiling_of_run(data: Any, usual: int) -> Tiling:
    """How the images of a run, or those that a checkpoint is evaluated on, are cut, by resolved settings of data.

    Args:
        usual: as of :func:`find_tiling`.
    """
    return find_tiling(None, None, {"window_size": data.window_size, "window_overlap": data.window_overlap}, usual)


def usual_side(images: Reader, settings: ReadSettings) -> int | None:
    """The median short side of some images of a data set, by their headers; None if none of those can be read.

    A tile of a larger image then shows as much to a network as an image did in training.
    """
    sides = []
    for index in range(0, len(images), max(1, len(images) // SIZED)):
        with suppress(UnreadableImage):
            name, data, *_ = images[index]
            sample = open_for_tiles(data, settings, name)
            sides.append(min(sample.height, sample.width))
    return int(statistics.median(sides)) if sides else None


def decode_middle(tiling: Tiling, settings: ReadSettings, sample: Sample) -> Tensor:
    """The pixels [C, H, W] of an image, or, of one that is cut, those of a tile in its middle."""
    image = SourceImage("", sample, None, settings)
    if tiling.cut(image) is None:
        return image.whole()
    height, width = min(tiling.size, image.height), min(tiling.size, image.width)
    tile = Tile((image.height - height) // 2, (image.width - width) // 2, height, width)
    return image.read(tile).clone()  # not a part of what is kept


def show_tiles(grid: Grid, name: str) -> Iterable[Tile]:
    """The tiles of an image, with a note of them at the first in a command, and a progress bar in a terminal."""
    how = f"{grid.width}x{grid.height} pixels are predicted in {len(grid):,} tiles of {grid.size} px that overlap by "
    print_warnings({"tiles": (name, f"{how}{grid.overlap} px (--window-size, --window-overlap)")})
    console = Output(stderr=True)
    return track(grid, "tiles", total=len(grid), console=console, disable=not console.is_terminal, transient=True)
