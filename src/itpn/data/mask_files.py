"""Files of masks, as values that a table of labels gives a meaning: decoded as a whole, or read by window."""

import functools
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from itpn.data.class_names import Colour
from itpn.data.decode import (
    TIFF_HEADERS,
    OpenedImage,
    UnreadableImage,
    decoder_errors,
    load_image,
    open_image,
    reason_of,
)
from itpn.data.formats.image_file import ImageFile, Window
from itpn.data.formats.reader import REMEDY, open_file
from itpn.data.headers import BITS, COLOUR_MAP, PHOTOMETRIC, PNG_DEPTH, find_lossy, read_tags
from itpn.data.open_files import OpenFiles, Version, find_version
from itpn.data.readers import check_lost, read_file, read_head

BLOCK, ROWS = 2**24, 256  # pixels of a mask that are looked at together; rows, which are whole tiles as a rule
WHOLE = 4  # times --data.max-pixels: a decoded mask has a byte a pixel
THREADS = 8  # that read headers, of files which may be far away
WIDTH, LENGTH = 256, 257  # tags of TIFF
AS_STORED = (1, 2, 3)  # photometric interpretations whose values are as they are stored: grey, RGB, palette
KINDS = {"L": "uint8", "P": "uint8", "RGB": "uint8"}  # Pillow's mode -> type of number of what is read by window
DEEP = ("int16", "uint16", "int32", "uint32")  # that of its modes that begin with I


class DecodedMask:
    """A mask of any format that has been decoded as a whole.

    Args:
        max_pixels: a larger one is refused.
        parts: parts of it will be read: it may have `WHOLE` times as many pixels.

    Attributes:
        values: labels [H, W] or colours [H, W, 3], with the orientation applied.
        palette: the colours that labels stand for; empty for 8 bits or more without a palette.
        indexed: whether the file has a palette, not shades of few bits.
        lossy: see :func:`itpn.data.headers.find_lossy`.

    Raises:
        UnreadableImage: it is missing, corrupt, too large or transparent.
    """

    by_region = False

    def __init__(self, path: str, max_pixels: int, parts: bool = False) -> None:
        try:
            data = read_file(path)
        except (OSError, ValueError) as error:
            raise UnreadableImage(reason_of(error)) from None
        with decoder_errors():
            opened = open_image(io.BytesIO(data), None if parts else max_pixels)
            if parts:
                _check_size(opened, max_pixels)
            image, bits = load_image(opened), _count_bits(opened.image, data)
            self.lossy = find_lossy(opened.image, data)
            if image.mode in ("LA", "RGBA") and bits == 8 and image.getextrema()[-1] == (255, 255):
                image = image.convert(image.mode[:-1])  # of 16 bits Pillow keeps the upper 8
            if image.mode not in ("1", "L", "P", "RGB") and not image.mode.startswith("I"):
                remedy = ": save it without alpha" if "A" in image.mode else ""
                raise UnreadableImage(f"an image of mode {image.mode}, not a mask of labels{remedy}")
            self.values, self.palette = _find_palette(image, bits)
        self.indexed = image.mode == "P"
        self.height, self.width = self.values.shape[:2]

    def read(self, window: Window | None = None) -> np.ndarray:
        """The values of the mask, or of a window in it."""
        if window is None:
            return self.values
        top, left, height, width = window
        return self.values[top : top + height, left : left + width]

    @functools.cached_property
    def used(self) -> list[int]:
        """The labels that occur, of a mask with a palette."""
        return count_values(self)


class RegionMask:
    """A mask whose windows are read alone, with the attributes of :class:`DecodedMask`; its values are the same."""

    by_region = True
    lossy = ""

    def __init__(self, file: ImageFile, palette: list[Colour], source: tuple[str, Version]) -> None:
        self._file, self.palette, self.indexed = file, palette, bool(palette)
        self._source = source
        self.height, self.width = file.height, file.width

    def read(self, window: Window | None = None) -> np.ndarray:
        """See :meth:`DecodedMask.read`."""
        with decoder_errors():
            values = self._file.read(0, window)
        if values.dtype == np.uint32:
            values = values.astype(np.int32)  # as Pillow reads it
        return values.transpose(1, 2, 0) if len(values) == 3 else values[0]

    @property
    def used(self) -> list[int]:
        """See :attr:`DecodedMask.used`; the whole file is read for it, once in a process."""
        return _find_used(*self._source)


MaskFile = DecodedMask | RegionMask


def open_mask(path: str, max_pixels: int) -> MaskFile:
    """A mask whose windows will be read. A file that is read by window stays open, of others the last stays decoded.

    Raises:
        UnreadableImage: see :class:`DecodedMask`.
    """
    key = path, find_version([path])
    known = _open_files.find(key) or _decoded.find(key)
    if known is not None:
        return known
    if (file := open_regions(path)) is not None:
        _open_files.keep(key, file)
        return file
    decoded = DecodedMask(path, max_pixels, parts=True)
    _decoded.keep(key, decoded)
    return decoded


def open_to_scan(path: str, max_pixels: int, parts: bool) -> MaskFile:
    """A mask that will be read once: of a large one not the whole at a time, where its format allows it.

    Args:
        max_pixels, parts: as of :class:`DecodedMask`; with ``parts`` there is no limit for what is read by window.

    Raises:
        UnreadableImage: see :class:`DecodedMask`.
    """
    try:
        with open(path, "rb") as file:
            is_tiff = file.read(4) in TIFF_HEADERS
            file.seek(0)
            tags = read_tags(file, (WIDTH, LENGTH)) if is_tiff else {}
    except (OSError, ValueError):  # which is said when it is read
        tags = {}
    pixels = tags.get(WIDTH, (0,))[0] * tags.get(LENGTH, (0,))[0]
    large = pixels > min(BLOCK, max_pixels) if parts else BLOCK < pixels <= max_pixels
    return (open_regions(path) if large else None) or DecodedMask(path, max_pixels, parts)


def open_regions(path: str) -> RegionMask | None:
    """A mask whose windows can be read alone, with the values that decoding it as a whole gives; None for others."""
    try:
        if read_head(path, 4) not in TIFF_HEADERS:
            return None
        version = find_version([path])
        with decoder_errors(), open(path, "rb") as source:
            opened = open_image(source, max_pixels=None)
            mode, tags = opened.image.mode, opened.image.tag_v2  # type: ignore[attr-defined]
            if tags.get(PHOTOMETRIC) not in AS_STORED or find_lossy(opened.image, b""):
                return None
            file = open_file(Path(path))
            if mode == "L" and {*tags.get(BITS, ())} != {8}:  # which have shades of few bits
                return None
            kinds = DEEP if mode.startswith("I") else (KINDS.get(mode),)
            same = (file.height, file.width, file.pages) == (opened.height, opened.width, 1)
            if not (
                same and file.by_region and file.dtype.name in kinds and file.channels == (3 if mode == "RGB" else 1)
            ):
                return None
            return RegionMask(file, _read_colour_map(tags) if mode == "P" else [], (path, version))
    except OSError as error:
        check_lost(path, error)
    except UnreadableImage:
        pass
    return None  # decoding it as a whole says why


def find_undivided(paths: Sequence[str]) -> list[str]:
    """The masks whose windows cannot be read alone."""
    with ThreadPoolExecutor(THREADS) as pool:
        return [path for path, file in zip(paths, pool.map(open_regions, paths), strict=True) if file is None]


def split_rows(file: MaskFile) -> Iterator[Window]:
    """Windows of some rows each that a mask consists of."""
    rows = max(ROWS, BLOCK // max(file.width, 1) // ROWS * ROWS)
    return ((top, 0, min(rows, file.height - top), file.width) for top in range(0, file.height, rows))


def count_values(file: MaskFile) -> list[int]:
    """The labels of 8 bits that occur in a mask."""
    found = np.zeros(256, dtype=bool)
    for window in split_rows(file):
        found[file.read(window).ravel()] = True
    return found.nonzero()[0].tolist()


_open_files: OpenFiles[RegionMask] = OpenFiles()
_decoded: OpenFiles[DecodedMask] = OpenFiles(1)


@functools.lru_cache(maxsize=2**16)
def _find_used(path: str, version: Version) -> list[int]:
    file = open_regions(path)
    if file is None:
        raise UnreadableImage("it has been changed while it was read")
    return count_values(file)


def _check_size(opened: OpenedImage, max_pixels: int) -> None:
    if opened.height * opened.width > WHOLE * max_pixels:
        raise UnreadableImage(
            f"{opened.width}x{opened.height} pixels, more than {WHOLE} times --data.max-pixels {max_pixels}, and it "
            f"cannot be read in parts: {REMEDY}"
        )


def _count_bits(image: Image.Image, data: bytes) -> int:
    """Bits of a stored pixel, of formats that allow fewer than 8 for grey."""
    if image.format == "PNG":
        return data[PNG_DEPTH]
    tags: Any = getattr(image, "tag_v2", {})
    return int((tags.get(BITS) or (8,))[0])


def _find_palette(image: Image.Image, bits: int) -> tuple[np.ndarray, list[Colour]]:
    """The stored values and the colours that they stand for; no colours for 8 bits or more without a palette."""
    if image.mode == "P":
        channels = iter(image.getpalette("RGB") or ())
        return np.asarray(image), list(zip(channels, channels, channels, strict=False))
    if image.mode == "1":
        image, bits = image.convert("L"), 1
    if image.mode == "L" and bits in (1, 2, 4):
        step = 255 // (2**bits - 1)  # Pillow multiplies by this
        return np.asarray(image) // step, [(shade, shade, shade) for shade in range(0, 256, step)]
    return np.asarray(image), []


def _read_colour_map(tags: Any) -> list[Colour]:
    """The palette of a TIFF of 8 bits, whose colours have 16, or 8 in some files."""
    colours = np.array(tags[COLOUR_MAP]).reshape(3, -1)
    return [(red, green, blue) for red, green, blue in (colours // (256 if colours.max() > 255 else 1)).T.tolist()]
