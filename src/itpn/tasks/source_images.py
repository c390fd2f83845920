"""Images to predict, of any size: a file is read without holding all of its pixels."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from itpn.data.bands import BandsOf
from itpn.data.channels import is_valid
from itpn.data.decode import UnreadableImage
from itpn.data.files import ImageSource
from itpn.data.formats.georeference import Georeference, find_georeference
from itpn.data.readers import FileReader
from itpn.data.samples import NO_LIMIT, Sample, open_for_tiles, type_of
from itpn.data.shards import read_shard
from itpn.data.skipped import none_readable
from itpn.data.stored import EMPTY, PLAIN, ReadSettings, StoredImage
from itpn.system.console import print_note, print_warnings
from itpn.tasks.tiling import Tile

KEPT_BYTES = 2**28  # bytes of an image's rows that are kept: strips of a file are decoded once for a row of tiles
NO_DATA = 255  # label of pixels without data


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

    def __init__(self, name: str, sample: Sample, path: Path | None, settings: ReadSettings = PLAIN) -> None:
        self.name, self.path, self.height, self.width = name, path, sample.height, sample.width
        self._sample = sample
        stored = sample if isinstance(sample, StoredImage) else None
        self.is_photo = type_of(sample).is_photo
        self.fits = self.height * self.width <= settings.max_pixels
        self._parts: StoredImage | None = None  # which is read by region
        if stored is not None and stored.file.by_region:
            self._parts = StoredImage(stored.file, replace(settings, max_pixels=NO_LIMIT))
        self.nodata = settings.nodata
        if self.nodata is None and stored is not None and not self.is_photo:
            self.nodata = stored.file.nodata
        self._kept: tuple[int, int, Tensor] | None = None  # first row, rows and pixels
        self._empty: bool | None = None  # whether no tile has had a value

    def warn(self) -> None:
        """Print what is remarkable about its pixels, once for many images."""
        warnings = {**self._sample.warnings, **({"empty": EMPTY} if self._empty else {})}
        print_warnings({kind: (self.name, warning) for kind, warning in warnings.items()})

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
            pixels = self._parts.decode_window(top, left, height, width)
        else:
            first, _, kept = rows
            pixels = kept[:, top - first : top - first + height, left : left + width]
        if self._empty is not False:
            self._empty = not is_valid(pixels, self.nodata).any()
        return pixels

    def _read_rows(self, tile: Tile) -> tuple[int, int, Tensor] | None:
        """Rows that have a tile in them; None where they are too many to keep."""
        if self._parts is None:
            if self._kept is None:
                self._kept = 0, self.height, self._sample.decode()
            return self._kept
        if self._kept is None or self._kept[:2] != (tile.top, tile.height):
            file = self._parts.file
            if tile.height * self.width * file.channels * file.dtype.itemsize > KEPT_BYTES:
                return None
            self._kept = None  # before the next are read
            pixels = self._parts.decode_window(tile.top, 0, tile.height, self.width)
            self._kept = tile.top, tile.height, pixels
        return self._kept


class SourceImages:
    """The images of a source, one after the other; those that cannot be read are named and skipped.

    Args:
        report: takes which image is skipped, and why.
    """

    def __init__(
        self, source: ImageSource, settings: ReadSettings, report: Callable[[str], object] = print_note
    ) -> None:
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
            with self.skipping(name):
                path = data.paths[0] if isinstance(data, BandsOf) else data
                opened = open_for_tiles(data, self._settings, name)
                image = SourceImage(name, opened, path if isinstance(path, Path) else None, self._settings)
            if image is not None:
                yield image
        if not self._done:
            raise none_readable(f"the images in {', '.join(self._source.roots)}", self._first)

    @contextmanager
    def skipping(self, name: str, image: SourceImage | None = None) -> Iterator[None]:
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
