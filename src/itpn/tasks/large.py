"""Images of any size: which are cut into tiles, and how a file is read and shown without holding all of its pixels."""

import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from torch import Tensor

from itpn.data.bands import BandsOf
from itpn.data.channels import is_valid
from itpn.data.decode import UnreadableImage
from itpn.data.files import ImageSource
from itpn.data.formats.georeference import Georeference, find_georeference
from itpn.data.readers import FileReader, Reader
from itpn.data.samples import NO_LIMIT, Sample, open_for_tiles, type_of
from itpn.data.shards import read_shard
from itpn.data.skipped import none_readable
from itpn.data.stored import PLAIN, Reading, StoredImage
from itpn.errors import UserError
from itpn.system.console import Output, print_note, print_warnings
from itpn.tasks.tiling import Grid, Tile

WHOLE = 2  # times the size of training's images: images up to there are not cut unless windows are given
BAND = 2**28  # bytes of an image's rows that are kept: strips of a file are decoded once for a row of tiles
IN_MEMORY = 2**24  # pixels of a class map that is not in a file
OVERVIEW = 2048  # pixels: longest side of what is drawn of a large image
SIZED = 10  # images whose sizes are looked at
NO_DATA = 255  # label of pixels without data


# --- which images are cut


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


def usual_side(images: Reader, settings: Reading) -> int | None:
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


# --- reading


class SourceImage:
    """An image of any size, of which only the header has been read.

    Args:
        settings: how it was opened; their limit of pixels is not for parts that are read alone.

    Attributes:
        name: as it is shown.
        path: of its file; None in a shard.
        fits: whether it is small enough to be decoded as a whole.
        nodata: value of pixels without data in integers; floats have NaN there.
    """

    def __init__(self, name: str, sample: Sample, path: Path | None, settings: Reading = PLAIN) -> None:
        self.name, self.path, self.height, self.width = name, path, sample.height, sample.width
        self._sample = sample
        stored = sample if isinstance(sample, StoredImage) else None
        self.is_photo = type_of(sample).is_photo
        self.fits = self.height * self.width <= settings.max_pixels
        self._parts: StoredImage | None = None  # which is read by region
        if stored is not None and stored.file.by_region:
            self._parts = StoredImage(stored.file, replace(settings, max_pixels=NO_LIMIT))
        self.nodata = settings.nodata if stored is None or settings.nodata is not None else stored.file.nodata
        self._kept: tuple[int, int, Tensor] | None = None  # first row, rows and pixels

    def warn(self) -> None:
        """Print what is remarkable about its pixels, once for many images."""
        print_warnings({kind: (self.name, warning) for kind, warning in self._sample.warnings.items()})

    def place(self) -> Georeference | None:
        """Where it is on the ground; None where that is not known, or for lack of a library, which is said."""
        if self.path is None:
            return None
        place, missing = find_georeference(self.path)
        if missing is not None:
            print_warnings({"place": (self.name, missing)})
        return place

    def whole(self) -> Tensor:
        """All pixels [C, H, W] as they are stored."""
        return self._sample.decode()

    def read(self, tile: Tile) -> Tensor:
        """The pixels [C, height, width] of a tile. Where the format allows it, not much more is decoded."""
        rows, (top, left, height, width) = self._read_rows(tile), tile
        if rows is None:
            assert self._parts is not None
            return self._parts.decode_window(top, left, height, width)
        first, _, pixels = rows
        return pixels[:, top - first : top - first + height, left : left + width]

    def _read_rows(self, tile: Tile) -> tuple[int, int, Tensor] | None:
        """Rows that have a tile in them; None where they are too many to keep."""
        if self._parts is None:
            if self._kept is None:
                self._kept = 0, self.height, self._sample.decode()
            return self._kept
        if self._kept is None or self._kept[:2] != (tile.top, tile.height):
            file = self._parts.file
            if tile.height * self.width * file.channels * file.dtype.itemsize > BAND:
                return None
            self._kept = None  # before the next are read
            pixels = self._parts.decode_window(tile.top, 0, tile.height, self.width)
            self._kept = tile.top, tile.height, pixels
        return self._kept


def decode_middle(tiling: Tiling, settings: Reading, sample: Sample) -> Tensor:
    """The pixels [C, H, W] of an image, or, of one that is cut, those of a tile in its middle."""
    image = SourceImage("", sample, None, settings)
    if tiling.cut(image) is None:
        return image.whole()
    height, width = min(tiling.size, image.height), min(tiling.size, image.width)
    tile = Tile((image.height - height) // 2, (image.width - width) // 2, height, width)
    return image.read(tile).clone()  # not a part of what is kept


class SourceImages:
    """The images of a source, one after the other; those that cannot be read are named and skipped.

    Args:
        report: takes which image is skipped, and why.
    """

    def __init__(self, source: ImageSource, settings: Reading, report: Callable[[str], object] = print_note) -> None:
        self._source, self._settings, self._report = source, settings, report
        self._first: tuple[str, str] | None = None  # that was skipped, and why
        self._done = 0

    def __iter__(self) -> Iterator[SourceImage]:
        """Images whose headers can be read.

        Raises:
            UserError: none of the images could be read.
        """
        files = FileReader(self._source.images)
        shards = (read_shard(shard, self._source.members) for shard in self._source.shards)
        for name, data in itertools.chain((files[number] for number in range(len(files))), *shards):
            image = None
            with self.reading(name):
                path = data.paths[0] if isinstance(data, BandsOf) else data
                opened = open_for_tiles(data, self._settings, name)
                image = SourceImage(name, opened, path if isinstance(path, Path) else None, self._settings)
            if image is not None:
                yield image
        if not self._done:
            raise none_readable(f"the images in {', '.join(self._source.roots)}", self._first)

    @contextmanager
    def reading(self, name: str, image: SourceImage | None = None) -> Iterator[None]:
        """For what reads an image: if it cannot be read, it is skipped.

        Args:
            image: whose pixels are read.
        """
        try:
            yield
            if image is not None:
                image.warn()
                self._done += 1
        except UnreadableImage as error:
            self._first = self._first or (name, str(error))
            self._report(f"skipped {name}: {error}")


def find_missing(pixels: Tensor, nodata: float | None) -> Tensor:
    """bool [H, W], True where no channel of pixels [C, H, W] has data."""
    return ~is_valid(pixels, nodata).any(dim=0)


def show_tiles(grid: Grid, name: str) -> Iterable[Tile]:
    """The tiles of an image, with a note of them at the first in a command, and a progress bar in a terminal."""
    how = f"{grid.width}x{grid.height} pixels are predicted in {len(grid):,} tiles of {grid.size} px that overlap by "
    print_warnings({"tiles": (name, f"{how}{grid.overlap} px (--window-size, --window-overlap)")})
    console = Output(stderr=True)
    return track(grid, "tiles", total=len(grid), console=console, disable=not console.is_terminal, transient=True)


# --- showing


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
