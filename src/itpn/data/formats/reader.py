"""The one reader of image files: which library reads a file is told by its first bytes."""

import importlib
import os
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from itpn.data.decode import MAX_PIXELS, TIFF_HEADERS, UnreadableImage, decoder_errors, open_image
from itpn.data.file_types import DICOM_START, find_envi_header
from itpn.data.formats.arrays import HDF5, NUMPY, ZIP, ArrayImage, Axes
from itpn.data.formats.image_file import PIXEL_BYTES, ImageFile
from itpn.data.formats.photos import PhotoImage
from itpn.data.readers import read_head
from itpn.errors import UserError

JPEG2000 = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
REMEDY = "convert it, as by gdal_translate -of COG or vips tiffsave --tile"
DICOM_SUFFIXES = (".dcm", ".dicom", "")  # of files that may lack the first bytes of DICOM's file format
EXTRAS = {"tifffile": "science", "imagecodecs": "science", "h5py": "science", "pillow_heif": "science"}
EXTRAS |= {"rasterio": "geo", "pydicom": "dicom"}


def read_image(
    path: str | os.PathLike[str], page: int = 0, max_pixels: int = MAX_PIXELS, axes: Axes | None = None
) -> Tensor:
    """Read an image file of any format with all of its channels, in the depth that is stored.

    Values are those of the file: no window and no inversion is applied, and pixels without data keep their value. But:
    the orientation is applied, complex numbers become their magnitude and bits 0 and 1; DICOM's rescaling, where there
    is one, is applied and gives float32.

    Args:
        page: of a stack, a series or a file of several frames, counted from 0.
        max_pixels: a larger image is refused, before memory is taken.
        axes: "CHW" or "HWC", of an array whose shape does not tell; the axis shorter than both others is of channels.

    Returns:
        [channels, height, width].

    Raises:
        UserError: no such file or page, of no known format, corrupt, too large, or of a format whose reader is not
            installed.
    """
    try:
        with decoder_errors():
            image = open_file(Path(path), axes)
            if not 0 <= page < image.pages:
                raise UnreadableImage(f"there is no page {page}: it has {image.pages}, counted from 0")
            check_size(image, max_pixels)
            return torch.from_numpy(image.read(page))
    except UnreadableImage as error:
        raise UserError(f"{os.fspath(path)}: {error}") from None


def read_size(path: str, axes: Axes | None = None) -> tuple[int, int]:
    """Height and width of an image of any format from its header, with the orientation applied.

    Args:
        axes: of arrays, see :class:`ArrayImage`.

    Raises:
        UnreadableImage: see :func:`open_file`.
        OSError: no such file.
    """
    with open(path, "rb") as file:
        is_dicom = file.read(DICOM_START).endswith(b"DICM")
        file.seek(0)
        if not is_dicom:  # Pillow reads no more than the header
            with suppress(UnreadableImage):
                opened = open_image(file, max_pixels=None)
                return opened.height, opened.width
    with decoder_errors():
        image = open_file(Path(path), axes)
    return image.height, image.width


def check_size(image: ImageFile, max_pixels: int) -> None:
    """Refuse an image before memory is taken for it.

    Raises:
        UnreadableImage: it has more pixels, or more bytes than :func:`check_window` allows.
    """
    pixels = image.height * image.width
    if pixels > max_pixels:
        parts = "it can be read in parts, by --data.window-size where a task has that"
        if not image.by_region:
            parts = f"it cannot be read in parts: {REMEDY}"
        raise UnreadableImage(
            f"{image.width}x{image.height} pixels, more than the {max_pixels} allowed (--data.max-pixels); {parts}"
        )
    check_window(image, image.height, image.width, max_pixels)


def check_window(image: ImageFile, height: int, width: int, max_pixels: int) -> None:
    """Refuse a window of an image before memory is taken for it.

    Raises:
        UnreadableImage: it has more than `PIXEL_BYTES` bytes for each of ``max_pixels``.
    """
    size = height * width * image.channels * image.dtype.itemsize
    if size > max_pixels * PIXEL_BYTES:
        raise UnreadableImage(
            f"{width}x{height} pixels of {image.channels} channels take {size / 2**30:.3g} GiB, more than the "
            f"{max_pixels * PIXEL_BYTES / 2**30:.3g} allowed (--data.max-pixels)"
        )


def open_file(source: Path | bytes, axes: Axes | None = None, head: bytes | None = None) -> ImageFile:
    """Read the header of an image file, or of its content.

    Args:
        axes: of arrays, see :class:`ArrayImage`.
        head: the first `DICOM_START` bytes, where they have been read.

    Raises:
        UnreadableImage: of no known format, or of one whose reader is not installed.
        OSError: no such file.
    """
    if head is None:
        head = source[:DICOM_START] if isinstance(source, bytes) else _read_head(source)
    if not head:
        raise UnreadableImage("empty file")
    if head[128:132] == b"DICM":  # its first 128 bytes may be those of another format
        return _open_by("pydicom", "dicom", "DicomImage", "DICOM")(source)
    if head[:4] in TIFF_HEADERS:
        return _open_tiff(source)
    if head.startswith((NUMPY, ZIP)):
        return ArrayImage(source, axes)
    if head.startswith(HDF5):
        _need("h5py", "HDF5")
        return ArrayImage(source, axes)
    if head.startswith(JPEG2000):
        return _open_raster(source, "JPEG 2000", "JP2OpenJPEG")
    find_heif_reader(head)
    return _open_other(source)


def find_heif_reader(head: bytes) -> None:
    """Let Pillow read HEIC, if the first bytes of a file are those of one.

    Raises:
        UnreadableImage: the reader is not installed.
    """
    if head[4:8] == b"ftyp" and head[8:12] in HEIC:
        _need("pillow_heif", "HEIC").register_heif_opener()


def _open_tiff(source: Path | bytes) -> ImageFile:
    stored: Any = None
    if find_spec("tifffile") is not None:
        stored = _open_by("tifffile", "tiff", "TiffImage", "TIFF")(source)
        if stored.decodes:
            return stored
    with suppress(UnreadableImage):
        image = PhotoImage(source)  # of 8 bits, or of one band; and faxes, which imagecodecs reads from Python 3.11 on
        if image.pages == 1:
            return image
    return stored or _open_by("tifffile", "tiff", "TiffImage", "TIFF of several pages, bands or planes")(source)


def _open_other(source: Path | bytes) -> ImageFile:
    """A photograph, or what only its name or a file beside it tells."""
    try:
        return PhotoImage(source)
    except UnreadableImage as error:
        if isinstance(source, bytes):
            raise
        if find_envi_header(os.fspath(source)):
            return _open_raster(source, "ENVI", "ENVI")
        if source.suffix.lower() in DICOM_SUFFIXES:
            return _open_by("pydicom", "dicom", "DicomImage", "DICOM")(source)
        raise error


def _read_head(path: Path) -> bytes:
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UnreadableImage("not a regular file")  # to open a pipe would block
    return read_head(path, DICOM_START)


def _open_raster(source: Path | bytes, kind: str, driver: str) -> ImageFile:
    return _open_by("rasterio", "rasters", "RasterImage", kind)(source, driver)


def _open_by(library: str, file: str, name: str, kind: str) -> Callable[..., ImageFile]:
    _need(library, kind)
    opener: Callable[..., ImageFile] = getattr(importlib.import_module(f"itpn.data.formats.{file}"), name)
    return opener


def _need(library: str, kind: str) -> Any:
    """A library of an extra.

    Raises:
        UnreadableImage: it is not installed.
    """
    try:
        return importlib.import_module(library)
    except ImportError:
        raise UnreadableImage(f"{kind} is read by {library}: pip install 'itpn[{EXTRAS[library]}]'") from None
