"""What every kind of image file answers once its header is read: size, channels, depth, any window of its pixels."""

from typing import Protocol

import numpy as np

from itpn.data.image_type import is_storable

CUT_OFF = "cut off: it ends before its last pixels"
PIXEL_BYTES = 32  # 4 GiB for the largest image: 16 bands of 16 bits

Window = tuple[int, int, int, int]  # top, left, height, width in pixels


class ImageFile(Protocol):
    """An image file whose header has been read. It is closed as soon as nothing refers to it.

    Attributes:
        channels, height, width: of a page.
        dtype: of the pixels that :meth:`read` returns.
        pages: images of the same size in the file: planes of a stack, moments, frames.
        nodata: the value of pixels without data; None if the file declares none.
        grey_or_rgb: whether the channels are grey, of which 0 is black, or red, green and blue.
        by_region: whether a window is read without decoding the rest.
    """

    channels: int
    height: int
    width: int
    dtype: np.dtype
    pages: int
    nodata: float | None
    grey_or_rgb: bool
    by_region: bool

    def read(self, page: int = 0, window: Window | None = None) -> np.ndarray:
        """Pixels [channels, height, width] of a page, or of a window in it."""
        ...


def cut(pixels: np.ndarray, window: Window | None) -> np.ndarray:
    """A window of pixels [..., height, width]."""
    if window is None:
        return pixels
    top, left, height, width = window
    return pixels[..., top : top + height, left : left + width]


def plain_dtype(stored: np.dtype) -> np.dtype:
    """The type of pixels: of complex numbers the magnitude, of bits 0 and 1, in this machine's byte order."""
    if stored.kind in "uif":  # torch knows no C type's other names, and no float of more than 64 bits
        return np.dtype(f"{stored.kind}{min(stored.itemsize, 8)}")
    return np.dtype({"c": np.float32, "b": np.uint8}.get(stored.kind, stored.newbyteorder("=")))


def keep_storable(nodata: float | None, dtype: np.dtype) -> float | None:
    """The value that a file declares for pixels without data; None for one that its pixels cannot have."""
    return nodata if nodata is None or is_storable(nodata, dtype.name) else None


def to_plain(pixels: np.ndarray) -> np.ndarray:
    """Pixels in their :func:`plain_dtype`, contiguous, and not those of a mapped file, which are not to be written."""
    dtype = plain_dtype(pixels.dtype)
    if pixels.dtype == dtype and pixels.dtype.char == dtype.char and pixels.flags.carray:
        return pixels
    with np.errstate(over="ignore"):  # infinite, which is no data
        # a view, as uint64 has two names in C
        plain = np.abs(pixels) if pixels.dtype.kind == "c" else pixels
        return np.require(plain, dtype, ["C", "W"]).view(dtype)
