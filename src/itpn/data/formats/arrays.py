"""Arrays that hold images: NumPy's .npy and .npz, and HDF5 by h5py."""

import contextlib
import io
import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from itpn.data.decode import UnreadableImage
from itpn.data.formats.image_file import Window, plain_dtype, to_plain
from itpn.data.readers import read_head
from itpn.data.splits import join

Axes = Literal["CHW", "HWC"]
NUMPY, ZIP, HDF5 = b"\x93NUMPY", b"PK\3\4", b"\x89HDF\r\n\x1a\n"  # magic bytes
MAX_HEADER = 2**16  # bytes of text in a .npy file; NumPy reads no more than 10,000, but up to 4 GiB to find out
NAMES = ("image", "images", "data", "arr_0")  # of the array of an image, in a file of several


class ArrayImage:
    """See :class:`itpn.data.formats.image_file.ImageFile`; a fourth axis, the first, is of pages.

    Args:
        axes: of an image of several channels; None where the axis of channels is the one shorter than both others.
    """

    nodata: float | None = None

    def __init__(self, source: Path | bytes, axes: Axes | None = None) -> None:
        self._array, self.by_region = open_array(source)
        shape, dtype = tuple(self._array.shape), np.dtype(self._array.dtype)
        if dtype.kind not in "uifbc" or not 2 <= len(shape) <= 4 or 0 in shape:
            raise UnreadableImage(f"an array of {dtype}, {'x'.join(map(str, shape)) or 'one number'}, is no image")
        self.pages = shape[0] if len(shape) == 4 else 1
        sides = shape[-3:] if len(shape) > 2 else shape
        self._axis = None if len(sides) == 2 else find_channels(sides, axes)
        self.channels = 1 if self._axis is None else sides[self._axis]
        self.grey_or_rgb = self.channels == 1 or (self.channels == 3 and self._axis == 2 and dtype == np.uint8)
        self.height, self.width = (side for axis, side in enumerate(sides) if axis != self._axis)
        self.dtype = plain_dtype(dtype)

    def read(self, page: int = 0, window: Window | None = None) -> np.ndarray:
        """See :meth:`itpn.data.formats.image_file.ImageFile.read`."""
        top, left, height, width = window or (0, 0, self.height, self.width)
        index: list[Any] = [slice(top, top + height), slice(left, left + width)]
        if self._axis is not None:
            index.insert(self._axis, slice(None))
        pixels = self._array[tuple([page, *index] if len(self._array.shape) == 4 else index)]
        return to_plain(pixels[None] if self._axis is None else np.moveaxis(pixels, self._axis, 0))


def find_channels(sides: tuple[int, ...], axes: Axes | None) -> int:
    """The axis of channels, 0 or 2, of an array of three.

    Raises:
        UnreadableImage: neither the first nor the last is the one shorter than both others.
    """
    first, middle, last = sides
    if axes is not None:
        return 0 if axes == "CHW" else 2
    if first < min(middle, last):
        return 0
    if last < min(first, middle):
        return 2
    raise UnreadableImage(
        f"an array of {first}x{middle}x{last} does not show which axis is of channels: CHW or HWC has to be given "
        "(--data.axes)"
    )


def open_array(source: Path | bytes) -> tuple[Any, bool]:
    """An array, or what is indexed like one, and whether parts of it are read alone.

    Raises:
        UnreadableImage: the file holds Python objects, or several arrays of which none has a name of `NAMES`.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    head = source[:8] if isinstance(source, bytes) else read_head(source, 8)
    if head.startswith(NUMPY):
        return read_numpy(file), True
    if head.startswith(ZIP):
        return ArchiveMember(file), False
    import h5py

    stored = h5py.File(file, "r")
    names: list[str] = []
    stored.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    found = stored[pick_name(names)]
    if found.external or found.is_virtual:  # a hostile file may name any other
        raise UnreadableImage("its pixels are in other files")
    return found, True


def read_numpy(file: Path | io.BytesIO) -> np.ndarray:
    """The array of a .npy file, mapped into memory.

    Raises:
        UnreadableImage: it is cut off, or an array of Python objects.
    """
    with open(file, "rb") if isinstance(file, Path) else contextlib.nullcontext(file) as opened:
        shape, fortran, dtype = read_header(opened)
        start = opened.tell()
        size = opened.seek(0, os.SEEK_END) - start
    if min(shape, default=0) < 0:
        raise UnreadableImage(f"an array of {'x'.join(map(str, shape))} is no image")
    if size < math.prod(shape) * dtype.itemsize:
        raise UnreadableImage("cut off: it ends before its last values")
    if isinstance(file, Path):
        return np.load(file, mmap_mode="r", allow_pickle=False)
    values = np.frombuffer(file.getbuffer(), dtype, math.prod(shape), start)
    return values.reshape(shape, order="F" if fortran else "C")


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the first axis varies fastest, and type of a .npy file, whose values begin at the position."""
    version = np.lib.format.read_magic(file)
    at, width = file.tell(), 2 if version == (1, 0) else 4
    if int.from_bytes(file.read(width), "little") > MAX_HEADER:
        raise UnreadableImage("a header of so many bytes is none of an array")
    file.seek(at)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise UnreadableImage("an array of Python objects is no image")
    return shape, fortran, dtype


class ArchiveMember:
    """The array of an .npz file: its shape is read at once, its values when they are asked for."""

    def __init__(self, file: Any) -> None:
        self._file = file
        with zipfile.ZipFile(file) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            self._name = pick_name(names)
            with archive.open(f"{self._name}.npy") as member:
                self.shape, _, self.dtype = read_header(member)

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(self._file, io.BytesIO):
            self._file.seek(0)
        with np.load(self._file, allow_pickle=False) as archive:
            values: np.ndarray = archive[self._name][index]
        return values


def pick_name(names: Sequence[str]) -> str:
    """The array of an image among those of a file."""
    known = [name for name in NAMES if name in names] or (list(names) if len(names) == 1 else [])
    if not known:
        held = f"arrays {join(names)}: name that of the image `image`" if names else "no array"
        raise UnreadableImage(f"it holds {held}")
    return known[0]
