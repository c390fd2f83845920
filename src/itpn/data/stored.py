"""Images that are no photographs, of any number of channels and any depth, as they are stored."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from itpn.data.decode import MAX_PIXELS, PAGES, decoder_errors
from itpn.data.formats.arrays import Axes
from itpn.data.formats.image_file import ImageFile, Window
from itpn.data.formats.reader import check_size, check_window
from itpn.data.image_type import MASKED_PHOTO, PHOTOGRAPH, ImageType

PART, WINDOWS = 2**24, 4  # of a larger image, statistics are of 4 x 4 windows with so many pixels together
PART_BYTES = 2**27  # in them at most
Limits = tuple[float, float] | None  # of the values of a channel
EMPTY = "no pixel has a value: all are NaN, infinite or without data"
HUGE = 1e20  # larger floats stand for no data: -3.4e38, 9.97e36, 1e20


@dataclass(frozen=True)
class ReadSettings:
    """How the images of a data set are read.

    Attributes:
        max_pixels: larger images are refused.
        axes: of arrays, see `itpn.data.formats.arrays.ArrayImage`.
        nodata: the value of pixels without data; None for what each file declares.
        stretch: percentiles of each image and channel that become 0 and 1; None for values as they are stored.
        type: that the images must have; None for any.
        example: what has that type, for a message: "a.tif has".
        advice: the end of that message.
    """

    max_pixels: int = MAX_PIXELS
    axes: Axes | None = None
    nodata: float | None = None
    stretch: tuple[float, float] | None = None
    type: ImageType | None = None
    example: str = ""
    advice: str = ": all images of a data set need the same channels and depth"


PLAIN = ReadSettings()


class StoredImage:
    """An image that is no photograph, with the interface of :class:`itpn.data.decode.EncodedImage`.

    Pixels keep the type in which they are stored (64 bits become float32). Pixels without data are NaN in floats; in
    integers they have the value ``nodata``.

    Photographs are such images too where they are read in parts, or where pixels without data are told apart in them:
    then all photographs of the data set are of the type `MASKED_PHOTO`, RGB as they are elsewhere.

    Attributes:
        grey_or_rgb: whether the pixels are those of a photograph, which has 3 channels.

    Raises:
        UnreadableImage: it is too large.
    """

    def __init__(self, file: ImageFile, settings: ReadSettings) -> None:
        self.file, self.height, self.width = file, file.height, file.width
        self._settings = settings
        self.warnings: dict[str, str] = {}
        if file.pages > 1:
            self.warnings["pages"] = PAGES
        if file.dtype.kind in "iu" and settings.nodata is None and settings.type and file.nodata is not None:
            self.warnings["nodata"] = describe_nodata(file.nodata, settings.type)
        self.reads_windows = file.by_region
        self.grey_or_rgb = file.dtype == np.uint8 and file.grey_or_rgb
        if self.grey_or_rgb:
            self.type = MASKED_PHOTO if is_masked(file.nodata, settings) else PHOTOGRAPH
        else:
            self.type = ImageType(file.channels, _travelling(file.dtype).name)

    def decode(self) -> Tensor:
        """All pixels, [C, height, width]; of grey or RGB of 8 bits uint8 [3, height, width]."""
        check_size(self.file, self._settings.max_pixels)
        return self._read(None)

    def decode_crop(self, top: int, left: int, height: int, width: int, target: tuple[int, int]) -> Tensor:
        """A crop of the image, [C, height, width]; where the format allows it, without decoding the rest."""
        check_size(self.file, self._settings.max_pixels)
        return self._read((top, left, height, width))

    def decode_window(self, top: int, left: int, height: int, width: int) -> Tensor:
        """As :meth:`decode_crop`; where the format allows it, of an image that is too large as a whole."""
        if self.file.by_region:
            check_window(self.file, height, width, self._settings.max_pixels)
        else:
            check_size(self.file, self._settings.max_pixels)
        return self._read((top, left, height, width))

    def decode_some(self) -> np.ndarray:
        """Pixels [C, n] for statistics: of a large image that is read by region, windows all over it."""
        if not self._is_sampled:
            return self.decode().flatten(1).numpy()
        some = self._read_some()
        return some if self._settings.stretch is None else stretch_channels(some, self.limits, self._settings.nodata)

    @functools.cached_property
    def limits(self) -> tuple[Limits, ...]:
        """The values of each channel that become 0 and 1 where each image is stretched: of a large image that is read
        by region, percentiles of windows all over it.
        """
        return self._find_limits(self._read_some())

    def _find_limits(self, some: np.ndarray) -> tuple[Limits, ...]:
        assert self._settings.stretch is not None
        return find_limits(some, self._settings.stretch, self._settings.nodata)

    @property
    def _is_sampled(self) -> bool:
        return self.height * self.width > self._part and self.file.by_region

    @property
    def _part(self) -> int:
        """Pixels that stand for those of a larger image."""
        return min(PART, PART_BYTES // (self.file.channels * self.file.dtype.itemsize))

    def _read_some(self) -> np.ndarray:
        """As :meth:`decode_some`, as they are stored."""
        if not self._is_sampled:
            check_size(self.file, self._settings.max_pixels)
            pixels = self._read_stored(None)
            return pixels.reshape(len(pixels), -1)
        side = max(1, math.isqrt(self._part) // WINDOWS)
        tops, lefts = (
            np.linspace(0, length - min(side, length), WINDOWS).astype(int) for length in (self.height, self.width)
        )
        windows = [
            (int(top), int(left), min(side, self.height), min(side, self.width)) for top in tops for left in lefts
        ]
        parts = [self._read_stored(window) for window in windows]
        return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)

    def _read(self, window: Window | None) -> Tensor:
        pixels = self._read_stored(window)
        if self._settings.stretch is not None:
            if window is None and not self._is_sampled:  # or else it would be read twice
                self.limits = self._find_limits(pixels.reshape(len(pixels), -1))
            pixels = stretch_channels(pixels, self.limits, self._settings.nodata)
        tensor = torch.from_numpy(pixels)
        return tensor.expand(3, -1, -1).contiguous() if self.grey_or_rgb and len(tensor) == 1 else tensor

    def _read_stored(self, window: Window | None) -> np.ndarray:
        with decoder_errors():
            pixels = self.file.read(0, window)
        if pixels.dtype.itemsize == 8:
            with np.errstate(over="ignore"):  # infinite, which is no data
                pixels = pixels.astype(_travelling(pixels.dtype))
        mark = mark_colours if self.type == MASKED_PHOTO and self.grey_or_rgb else mark_nodata
        pixels = mark(pixels, self.file.nodata, self._settings.nodata)
        if window is None and not has_values(pixels, self._settings.nodata):
            self.warnings["empty"] = EMPTY
        return pixels


def describe_nodata(declared: float, kind: ImageType) -> str:
    """What is remarkable about an image that declares a value for pixels without data in a data set without one."""
    others = "the first of these photographs" if kind.is_photo else "the images that statistics are of"
    return (
        f"it declares {declared:g} for pixels without data, unlike {others}: they count as values unless --data.nodata "
        "is given"
    )


def is_masked(declared: float | None, settings: ReadSettings) -> bool:
    """Whether pixels without data are told apart in a photograph, because its file declares a value for them, other
    photographs of the data set do, or it was given.

    Args:
        declared: that value; None for none.
    """
    if settings.type == PHOTOGRAPH:
        return False
    return declared is not None or settings.nodata is not None


def find_limits(pixels: np.ndarray, percents: tuple[float, float], nodata: float | None) -> tuple[Limits, ...]:
    """Two percentiles of each channel of [C, n]; None for a channel without data."""
    valid = find_valid(pixels, nodata)
    found: list[Limits] = []
    for own, present in zip(pixels, valid, strict=True):
        if not present.any():
            found.append(None)
            continue
        low, high = np.percentile(own[present], percents).tolist()
        found.append((low, high))
    return tuple(found)


def stretch_channels(pixels: np.ndarray, limits: Sequence[Limits], nodata: float | None) -> np.ndarray:
    """Two values of each channel become 0 and 1; float32 of the same shape, NaN without data."""
    valid = find_valid(pixels, nodata)
    stretched = np.full(pixels.shape, np.nan, np.float32)
    for own, present, target, limit in zip(pixels, valid, stretched, limits, strict=True):
        low, high = limit or (0.0, 1.0)
        target[present] = ((own[present].astype(np.float64) - low) / ((high - low) or 1.0)).clip(0, 1)
    return stretched


def find_valid(values: np.ndarray, nodata: float | None) -> np.ndarray:
    """bool, True where pixels have a value: finite, and not ``nodata``."""
    if values.dtype.kind == "f":
        return np.isfinite(values)
    return np.ones(values.shape, dtype=bool) if nodata is None else values != nodata


def has_values(pixels: np.ndarray, nodata: float | None) -> bool:
    """Whether a pixel of [C, H, W] has a value; a few are looked at first."""
    if pixels.dtype.kind != "f" and nodata is None:
        return True
    return bool(find_valid(pixels[:, ::16, ::16], nodata).any() or find_valid(pixels, nodata).any())


def _travelling(stored: np.dtype) -> np.dtype:
    """The type in which pixels travel to the device; that of 64 bits is what they become there."""
    return np.dtype(np.float32) if stored.itemsize == 8 else stored


def mark_colours(pixels: np.ndarray, declared: float | None, nodata: float | None) -> np.ndarray:
    """Pixels without data become ``nodata``: those with that value, or with what the file declares, in all channels.
    Others that have it in a channel alone, as shadows have 0, get the value beside it.

    Args:
        pixels: uint8 [C, H, W].
        declared, nodata: as of :func:`mark_nodata`.
    """
    value = declared if nodata is None else nodata
    if value is None:
        return pixels
    marked = np.where(pixels == value, np.uint8(value + (1 if value < 255 else -1)), pixels)
    for missing in {value, declared} - {None}:
        marked[:, (pixels == missing).all(axis=0)] = value
    return marked


def mark_nodata(pixels: np.ndarray, declared: float | None, nodata: float | None) -> np.ndarray:
    """Pixels without data become NaN in floats, and ``nodata`` in integers.

    Args:
        declared: the value that the file declares for them.
        nodata: that of the data set, if it is known.
    """
    if pixels.dtype.kind == "f":
        with np.errstate(over="ignore"):  # of 16 bits none is as large
            missing = ~(np.abs(pixels) < np.float64(HUGE).astype(pixels.dtype))
            for value in [value for value in (declared, nodata) if value is not None]:
                missing |= np.isclose(pixels, value, rtol=1e-6, atol=0)
        return np.where(missing, pixels.dtype.type(np.nan), pixels) if missing.any() else pixels
    if pixels.dtype.kind in "iu" and None not in (declared, nodata) and declared != nodata:
        return np.where(pixels == declared, np.array(nodata).astype(pixels.dtype), pixels)
    return pixels
