"""Opening of what readers give: photographs, and images of any number of channels and any depth.

Photographs are files of 8 bits that a viewer shows in colour or grey: they become RGB, and mix freely in a data set.
Of all other images a data set has one :class:`ImageType`: as many channels, stored in the same type of
number.
"""

import io
import math
import random
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from itpn.data.bands import BandsOf
from itpn.data.decode import (
    BITS,
    MAX_PIXELS,
    PAGES,
    TIFF_HEADERS,
    EncodedImage,
    UnreadableImage,
    is_deep_png,
    open_image,
    reading,
    reason_of,
)
from itpn.data.formats.bands import BandsFile
from itpn.data.formats.image_file import ImageFile, Window
from itpn.data.formats.reading import check_size, find_heif_reader, open_file
from itpn.data.image_type import PHOTOGRAPH, ImageType
from itpn.data.readers import check_lost, read_file
from itpn.errors import UserError

PART, WINDOWS = 2**24, 4  # of a larger image, statistics are of 4 x 4 windows with so many pixels together
NO_LIMIT = 2**62
LARGE_FILE = 2**26  # bytes: a larger photograph is read in parts where it can be
TRAINED = "the training images have"
REMEDY = "convert it, as by gdal_translate -of COG or vips tiffsave --tile"
HUGE = 1e20  # larger floats stand for no data: -3.4e38, 9.97e36, 1e20
HEAD = 32  # bytes that tell most formats
# tags of TIFF
PHOTOMETRIC, DESCRIPTION, SAMPLES, EXTRA_SAMPLES, SAMPLE_FORMAT = 262, 270, 277, 338, 339
ALPHA = (1, 2)  # kinds of extra samples
COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}  # photometric interpretation of a TIFF -> channels of colour
STACKS = ("<?xml", "<OME", "ImageJ=")  # in a description: which pages are channels is said there


@dataclass(frozen=True)
class Reading:
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
    axes: Literal["CHW", "HWC"] | None = None
    nodata: float | None = None
    stretch: tuple[float, float] | None = None
    type: ImageType | None = None
    example: str = ""
    advice: str = ": all images of a data set need the same channels and depth"


PLAIN = Reading()


class MixedImages(UserError):
    """Images of a data set differ in their number of channels or their depth."""


class StoredImage:
    """An image that is no photograph, with the interface of :class:`itpn.data.decode.EncodedImage`.

    Pixels keep the type in which they are stored (64 bits become float32). Pixels without data are NaN in floats; in
    integers they have the value ``nodata``.

    Raises:
        UnreadableImage: it is too large.
    """

    def __init__(self, file: ImageFile, settings: Reading) -> None:
        self.file, self.height, self.width = file, file.height, file.width
        self._settings = settings
        self.warnings: dict[str, str] = {}
        if file.pages > 1:
            self.warnings["pages"] = PAGES
        if file.dtype.kind in "iu" and settings.nodata is None and settings.type and file.nodata is not None:
            self.warnings["nodata"] = (
                f"it declares {file.nodata:g} for pixels without data, which the images before did not: give "
                f"--data.nodata {file.nodata:g}"
            )
        self.reads_windows = file.by_region
        grey_or_rgb = file.dtype == np.uint8 and (file.channels == 1 or file.rgb)
        self.type = PHOTOGRAPH if grey_or_rgb else ImageType(file.channels, _travelling(file.dtype).name)

    def decode(self) -> Tensor:
        """All pixels, [C, height, width]; of a photograph uint8 [3, height, width]."""
        check_size(self.file, self._settings.max_pixels)
        return self._read(None)

    def decode_crop(self, top: int, left: int, height: int, width: int, target: tuple[int, int]) -> Tensor:
        """A window, [C, height, width]; where the format allows it, without decoding the rest."""
        if not self.file.by_region:
            check_size(self.file, self._settings.max_pixels)
        return self._read((top, left, height, width))

    def decode_some(self) -> np.ndarray:
        """Pixels [C, n] for statistics: of a large image that is read by region, windows all over it."""
        if self.height * self.width <= PART or not self.file.by_region:
            return self.decode().flatten(1).numpy()
        side = math.isqrt(PART) // WINDOWS
        tops, lefts = (
            np.linspace(0, length - min(side, length), WINDOWS).astype(int) for length in (self.height, self.width)
        )
        windows = [
            (int(top), int(left), min(side, self.height), min(side, self.width)) for top in tops for left in lefts
        ]
        return np.concatenate([self._read(window).flatten(1).numpy() for window in windows], axis=1)

    def _read(self, window: tuple[int, int, int, int] | None) -> Tensor:
        if self._settings.stretch is not None and window is not None:  # percentiles are of the whole image
            top, left, height, width = window
            return self.decode()[:, top : top + height, left : left + width]
        with reading():
            pixels = self.file.read(0, window)
        with np.errstate(over="ignore"):  # infinite, which is no data
            pixels = np.require(pixels, _travelling(pixels.dtype), ["C", "W"])  # a mapped file is not to be written to
        pixels = mark_nodata(pixels, self.file.nodata, self._settings.nodata)
        if self._settings.stretch is not None:
            pixels = stretch_channels(pixels, self._settings.stretch, self._settings.nodata)
        tensor = torch.from_numpy(pixels)
        return tensor.expand(3, -1, -1).contiguous() if self.type.is_photo and len(tensor) == 1 else tensor


def stretch_channels(pixels: np.ndarray, percents: tuple[float, float], nodata: float | None) -> np.ndarray:
    """Two percentiles of each channel become 0 and 1; float32 [C, H, W], NaN without data."""
    valid = find_valid(pixels, nodata)
    stretched = np.full(pixels.shape, np.nan, np.float32)
    for own, present, target in zip(pixels, valid, stretched, strict=True):
        if present.any():
            low, high = np.percentile(own[present], percents)
            target[present] = ((own[present].astype(np.float64) - low) / ((high - low) or 1.0)).clip(0, 1)
    return stretched


def find_valid(values: np.ndarray, nodata: float | None) -> np.ndarray:
    """bool, True where pixels have a value: finite, and not ``nodata``."""
    if values.dtype.kind == "f":
        return np.isfinite(values)
    return np.ones(values.shape, dtype=bool) if nodata is None else values != nodata


def _travelling(stored: np.dtype) -> np.dtype:
    """The type in which pixels travel to the device; that of 64 bits is what they become there."""
    return np.dtype(np.float32) if stored.itemsize == 8 else stored


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
        return np.where(missing, np.float32(np.nan), pixels) if missing.any() else pixels
    if pixels.dtype.kind in "iu" and None not in (declared, nodata) and declared != nodata:
        return np.where(pixels == declared, np.array(nodata).astype(pixels.dtype), pixels)
    return pixels


@dataclass(frozen=True)
class WindowOf:
    """A window of what a reader gives.

    Attributes:
        data: as of `itpn.data.samples.open_sample`.
        box: top, left, height and width in pixels.
        room: how far it can be moved up, left, down and right, within the image and half of its side.
        whole: height and width of the image as they are in its annotations; None where there are none.
    """

    data: bytes | Path | BandsOf | UnreadableImage
    box: Window
    room: tuple[int, int, int, int] = (0, 0, 0, 0)
    whole: tuple[int, int] | None = None

    def move(self, rng: random.Random) -> "WindowOf":
        """The window at a random place around its own: training sees other windows in each epoch."""
        up, left, down, right = self.room
        y, x, height, width = self.box
        return replace(self, box=(y + rng.randint(-up, down), x + rng.randint(-left, right), height, width))


class WindowSample:
    """A window, with the interface of a whole image."""

    def __init__(self, image: "Image", box: Window) -> None:
        self.image = image
        self.top, self.left, self.height, self.width = box
        self.warnings = image.warnings

    def decode(self) -> Any:
        """Its pixels [C, height, width]."""
        return self.decode_crop(0, 0, self.height, self.width, (self.height, self.width))

    def decode_crop(self, top: int, left: int, height: int, width: int, target: tuple[int, int]) -> Any:
        """A part of it, [C, height, width], or smaller by a scale of JPEG."""
        return self.image.decode_crop(self.top + top, self.left + left, height, width, target)


Image = EncodedImage | StoredImage
Sample = Image | WindowSample


def open_sample(
    data: bytes | Path | BandsOf | WindowOf | UnreadableImage, settings: Reading = PLAIN, name: str = ""
) -> Sample:
    """Read the header of what a reader gives: a file's content, its path, the paths of its bands, a window of these, or
    the error of reading it, which is raised.

    Args:
        name: of the image, for messages.

    Raises:
        UnreadableImage: no image, corrupt, too large, or of a format whose reader is not installed.
        MixedImages: an image of another type than the others.
    """
    if isinstance(data, WindowOf):
        image = open_image_of(data.data, replace(settings, max_pixels=NO_LIMIT), name)
        if data.whole not in (None, (image.height, image.width)):
            height, width = data.whole
            raise UnreadableImage(f"{image.width}x{image.height} pixels, and {width}x{height} in the annotations")
        pixels = data.box[2] * data.box[3] if image.reads_windows else image.height * image.width
        if pixels > settings.max_pixels:
            raise UnreadableImage(
                f"{image.width}x{image.height} pixels, more than the {settings.max_pixels} allowed "
                f"(--data.max-pixels), and it cannot be read in parts: {REMEDY}"
            )
        return WindowSample(image, data.box)
    return open_image_of(data, settings, name)


def open_image_of(data: bytes | Path | BandsOf | UnreadableImage, settings: Reading, name: str) -> Image:
    """As :func:`open_sample`, of a whole image."""
    if isinstance(data, UnreadableImage):
        raise data
    image: Image
    if isinstance(data, BandsOf):
        image = StoredImage(BandsFile(data.paths, settings.axes), settings)
    else:
        image = _open_path(data, settings) if isinstance(data, Path) else _open_bytes(data, settings)
    if settings.type not in (None, own := type_of(image)):
        example = TRAINED if settings.example == f"{name} has" else settings.example  # which has changed since
        raise MixedImages(f"{example} {settings.type}, and {name} has {own}{settings.advice}")
    return image


def type_of(image: Sample) -> ImageType:
    """Channels and depth of an image."""
    whole = image.image if isinstance(image, WindowSample) else image
    return whole.type if isinstance(whole, StoredImage) else PHOTOGRAPH


def _open_bytes(data: bytes, settings: Reading) -> Image:
    if not data:
        raise UnreadableImage("empty file")
    if is_photo_head(data[:HEAD]) or (data[:4] in TIFF_HEADERS and is_photo_tiff(data)):
        return EncodedImage(data, settings.max_pixels)
    return _open_stored(data, settings)


def _open_path(path: Path, settings: Reading) -> Image:
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
        if is_photo_head(head) or (head[:4] in TIFF_HEADERS and is_photo_tiff(path)):
            return _open_photo(path, settings)
        return _open_stored(path, settings)
    except (OSError, ValueError) as error:
        check_lost(path, error)
        raise UnreadableImage(reason_of(error)) from None


def _open_photo(path: Path, settings: Reading) -> Image:
    """A photograph; a large TIFF, which windows are read of, stays in its file where tifffile is installed."""
    if path.stat().st_size > LARGE_FILE:
        with suppress(UnreadableImage):
            image = _open_stored(path, settings)
            if image.reads_windows and image.type.is_photo:
                return image
    return EncodedImage(read_file(str(path)), settings.max_pixels)


def _open_stored(source: bytes | Path, settings: Reading) -> StoredImage:
    with reading():
        return StoredImage(open_file(source, settings.axes), settings)


def is_photo_head(head: bytes) -> bool:
    """Whether the first bytes of a file are those of a photograph; of TIFF and others they do not tell."""
    if head.startswith(b"\x89PNG"):
        return not is_deep_png(head)
    if head[4:8] == b"ftyp":
        find_heif_reader(head)
        return True
    return head.startswith((b"\xff\xd8", b"GIF8", b"BM")) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def is_photo_tiff(source: bytes | Path) -> bool:
    """Whether a TIFF is a photograph: of 8 bits or less, and with the channels of its colours, and alpha perhaps."""
    with open(source, "rb") if isinstance(source, Path) else io.BytesIO(source) as file:
        try:
            image = open_image(file, max_pixels=None).image
        except UnreadableImage:  # by Pillow
            return False
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        if max(tags.get(BITS) or (1,)) > 8 or set(tags.get(SAMPLE_FORMAT) or ()) & {2, 3}:
            return False
        more = tags.get(SAMPLES, 1) - COLOURS.get(tags.get(PHOTOMETRIC, 1), 0)
        if not (more == 0 or (more == 1 and (tags.get(EXTRA_SAMPLES) or (0,))[0] in ALPHA)):
            return False
        stacked = str(tags.get(DESCRIPTION, "")).lstrip().startswith(STACKS)
        if not stacked or getattr(image, "n_frames", 1) == 1:
            return True
    stack = open_file(source)
    return stack.channels == 1 or stack.rgb
