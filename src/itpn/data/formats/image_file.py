"""What every kind of image file answers once its header is read: size, channels, depth, any window of its pixels."""

from typing import Protocol

import numpy as np

Window = tuple[int, int, int, int]  # top, left, height, width in pixels


class ImageFile(Protocol):
    """An image file whose header has been read.

    Attributes:
        channels, height, width: of a page.
        dtype: of the pixels that :meth:`read` returns.
        pages: images of the same size in the file: planes of a stack, moments, frames.
        nodata: the value of pixels without data; None if the file declares none.
        rgb: whether the channels are red, green and blue.
        by_region: whether a window is read without decoding the rest.
    """

    channels: int
    height: int
    width: int
    dtype: np.dtype
    pages: int
    nodata: float | None
    rgb: bool
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
    return np.dtype({"c": np.float32, "b": np.uint8}.get(stored.kind, stored.newbyteorder("=")))


def to_plain(pixels: np.ndarray) -> np.ndarray:
    """Pixels in their :func:`plain_dtype`, contiguous."""
    dtype = plain_dtype(pixels.dtype)
    return np.ascontiguousarray(np.abs(pixels) if pixels.dtype.kind == "c" else pixels, dtype)
