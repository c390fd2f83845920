"""TIFF by tifffile and imagecodecs: pages, planes, tiles, pyramids, axes of OME and ImageJ, every compression."""

import io
import math
import weakref
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
import tifffile

from itpn.data.decode import MAX_PIXELS, UnreadableImage
from itpn.data.formats.image_file import CUT_OFF, PIXEL_BYTES, Window, cut, keep_storable, plain_dtype, to_plain
from itpn.data.headers import NODATA, read_nodata
from itpn.data.orientation import ORIENTATION, SWAPPED, XMP, choose_orientation, find_stored_window, turn_array

NO_DECODER = "TIFF of compression {} is read by imagecodecs: pip install 'itpn[science]'"
CHUNK = 2**24  # pixels of a tile or strip that is decoded for a window
RGB, INDEXED = (2, 6), (0, 3)  # photometric interpretations: RGB and YCbCr; 0 is white, and palette
# sizes, depth, compression, strips, tiles, resolution, predictor, alpha, place on the ground and GDAL's own
PLAIN_TAGS = {*range(256, 260), 262, 273, 274, *range(277, 280), 282, 283, 284, 296, 317, *range(322, 326), 338, 339}
PLAIN_TAGS |= {33550, 33922, 34264, *range(34735, 34738), 42112, NODATA}
PRIVATE = 60_000  # compressions of single programs
IN_PAGE = "CSYX"  # axes of an image; all others (planes of a stack, moments, positions) are of several images


class TiffImage:
    """See :class:`itpn.data.formats.image_file.ImageFile`; of a pyramid it is the largest level.

    Attributes:
        decodes: whether its compression is known here.
    """

    def __init__(self, source: Path | bytes) -> None:
        opened = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: SIM115
        self._file = tifffile.TiffFile(opened)
        weakref.finalize(self, _close, self._file, opened)  # its objects refer to each other, and would keep it open
        self._series = find_series(self._file)
        self._axes, self._shape = self._series.axes, self._series.shape
        sizes = dict(zip(self._axes, self._shape, strict=True))
        if not {"Y", "X"} <= sizes.keys():
            raise UnreadableImage(f"TIFF of axes {self._axes} has no rows and columns")
        if 0 in self._shape:
            raise UnreadableImage("TIFF without pixels")
        tags = self._series.keyframe.tags
        self._orientation = choose_orientation(tags.valueof(ORIENTATION), tags.valueof(XMP))
        self.height, self.width = sizes["Y"], sizes["X"]
        if self._orientation in SWAPPED:
            self.height, self.width = self.width, self.height
        self.channels = sizes.get("C", 1) * sizes.get("S", 1)
        photometric = self._series.keyframe.photometric
        is_rgb = sizes.get("S") == 3 == self.channels and photometric in RGB
        self.grey_or_rgb = is_rgb or (self.channels == 1 and photometric not in INDEXED)
        self.pages = math.prod(size for axis, size in sizes.items() if axis not in IN_PAGE)
        self.dtype = plain_dtype(np.dtype(self._series.dtype))
        self.nodata = keep_storable(read_nodata(tags.valueof(NODATA)), self.dtype)
        self.decodes = self._series.keyframe.compression in tifffile.TIFF.DECOMPRESSORS
        # one uncompressed block, or pages of more than one plane, are left to tifffile
        self._planes = math.prod(size for axis, size in sizes.items() if axis not in "SYX")
        start = self._series.dataoffset
        self._mapped = start is not None
        if start is not None and start + self._series.nbytes > self._file.filehandle.size:
            raise UnreadableImage(CUT_OFF)
        self._tiled = not self._mapped and len(self._series.pages) == self._planes
        chunk = math.prod(self._series.keyframe.chunks[:2])
        if chunk > max(CHUNK, self.height * self.width):
            raise UnreadableImage(f"tiles of {chunk:,} pixels in an image of {self.width}x{self.height}")
        # an image that is compressed as one strip is decoded whole for each window
        self.by_region = self._mapped or (self._tiled and chunk <= CHUNK)

    def read(self, page: int = 0, window: Window | None = None) -> np.ndarray:
        """See :meth:`itpn.data.formats.image_file.ImageFile.read`."""
        if window is not None:
            window = find_stored_window(window, self._orientation, self.height, self.width)
        try:
            planes = [self._read_plane(number, window) for number in self._find_planes(page)]
        except Exception as error:  # of several types, for want of a decoder
            if find_spec("imagecodecs") is None and (isinstance(error, ImportError) or "imagecodecs" in str(error)):
                raise UnreadableImage(
                    NO_DECODER.format(tifffile.COMPRESSION(self._series.keyframe.compression).name)
                ) from None
            raise
        return to_plain(turn_array(np.concatenate(planes) if len(planes) > 1 else planes[0], self._orientation))

    def _find_planes(self, page: int) -> Iterable[int]:
        """Numbers of the file's planes that hold the channels of a page; the samples of a pixel are of one plane."""
        if self.pages == 1:
            return range(self._planes)
        outer = {axis: size for axis, size in zip(self._axes, self._shape, strict=True) if axis not in "SYX"}
        numbers = np.arange(math.prod(outer.values())).reshape(tuple(outer.values()))
        if "C" in outer:
            numbers = np.moveaxis(numbers, list(outer).index("C"), -1)
        return numbers.reshape(self.pages, -1)[page]

    def _read_plane(self, number: int, window: Window | None) -> np.ndarray:
        """[samples, height, width] of one plane or of a window in it."""
        if self._tiled:
            return read_page(self._file, self._series.pages[number], window)
        if not self._mapped and self._series.nbytes > MAX_PIXELS * PIXEL_BYTES:
            size = f"{self._series.nbytes / 2**30:.3g} GiB"
            raise UnreadableImage(f"{self.pages} planes stored as one block take {size}: save each as a page")
        pixels = self._series.asarray(out="memmap" if self._mapped else None)
        outer = len(self._axes.rstrip("SYX"))
        plane, axes = pixels.reshape(-1, *self._shape[outer:])[number], self._axes[outer:]
        return cut(np.moveaxis(plane, axes.index("S"), 0) if "S" in axes else plane[None], window)


def find_series(file: tifffile.TiffFile) -> tifffile.TiffPageSeries:
    """The first series of pages of a file, at its largest level.

    A page with nothing but `PLAIN_TAGS` is the series, whatever programs there are whose files tifffile looks for.
    """
    if len(file.pages) == 1:
        page: Any = file.pages[0]
        if page.compression < PRIVATE and all(tag.code in PLAIN_TAGS for tag in page.tags):
            return tifffile.TiffPageSeries([page], page.shape, page.dtype, page.axes)
    if not file.series:
        raise UnreadableImage("TIFF without an image")
    return file.series[0].levels[0]


def _close(file: tifffile.TiffFile, opened: IO[bytes]) -> None:
    file.close()  # others that OME names
    opened.close()


def read_page(file: tifffile.TiffFile, page: Any, window: Window | None) -> np.ndarray:
    """[samples, height, width] of a TIFF page or of a window in it, of which only its tiles or strips are decoded."""
    key = page.keyframe
    separate = key.axes == "SYX"
    samples, (rows, cols) = key.samplesperpixel, key.chunks[:2]
    down, across = key.chunked[separate : separate + 2]
    top, left, height, width = window or (0, 0, key.imagelength, key.imagewidth)
    pixels = np.empty((samples, height, width), key.dtype)
    chunks = [
        (plane, row, col)
        for plane in range(samples if separate else 1)
        for row in range(top // rows, -(-(top + height) // rows))
        for col in range(left // cols, -(-(left + width) // cols))
    ]
    decoded = read_chunks(file, page, [(plane * down + row) * across + col for plane, row, col in chunks])
    for (plane, row, col), chunk in zip(chunks, decoded, strict=True):
        y, x = row * rows - top, col * cols - left
        target = pixels[plane : plane + 1] if separate else pixels
        target = target[:, max(y, 0) : y + rows, max(x, 0) : x + cols]
        # chunks without bytes have no data
        target[:] = (
            key.nodata if chunk is None else chunk[max(-y, 0) : height - y, max(-x, 0) : width - x].transpose(2, 0, 1)
        )
    return pixels


def read_chunks(file: tifffile.TiffFile, page: Any, numbers: Iterable[int]) -> Iterator[np.ndarray | None]:
    """Tiles or strips [height, width, samples]; None for those of which the file has no bytes.

    Raises:
        UnreadableImage: the file is cut off.
    """
    handle, offsets, sizes = file.filehandle, page.dataoffsets, page.databytecounts
    decode, tables = page.keyframe.decode, page.jpegtables
    for number in numbers:
        size = sizes[number]
        if not size:
            yield None
            continue
        handle.seek(offsets[number])
        data = handle.read(size)
        if len(data) < size:
            raise UnreadableImage(CUT_OFF)
        chunk = decode(data, number, jpegtables=tables)[0]
        yield None if chunk is None else chunk[0]
