"""Opening of what readers give: photographs, and images of any number of channels and any depth.

Photographs are files of 8 bits that a viewer shows in colour or grey: they become RGB, and mix freely in a data set.
Of all other images a data set has one :class:`ImageType`: as many channels, stored in the same type of number.
"""

import functools
import io
import itertools
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from itpn.data.bands import BandsOf
from itpn.data.decode import (
    TIFF_HEADERS,
    EncodedImage,
    UnreadableImage,
    is_deep_png,
    open_image,
    reading,
    reason_of,
)
from itpn.data.files import ImageSource
from itpn.data.formats.bands import BandsFile
from itpn.data.formats.image_file import ImageFile, Window
from itpn.data.formats.reading import REMEDY, find_heif_reader, open_file
from itpn.data.headers import BITS, DESCRIPTION, EXTRA_SAMPLES, PHOTOMETRIC, SAMPLE_FORMAT, SAMPLES, read_tags
from itpn.data.image_type import PHOTOGRAPH, ImageType
from itpn.data.readers import FileReader, Reader, check_lost, read_file, read_head
from itpn.data.shards import read_shard
from itpn.data.skipped import nothing_readable
from itpn.data.stored import PLAIN, Limits, Reading, StoredImage
from itpn.errors import UserError

NO_LIMIT = 2**62
TRIED = 1000  # images that are opened to find a readable one
LARGE_FILE = 2**26  # bytes: a larger photograph is read in parts where it can be
TRAINED = "the training images have"
HEAD = 32  # bytes that tell most formats
ALPHA = (1, 2)  # kinds of extra samples
COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}  # photometric interpretation of a TIFF -> channels of colour
STACKS = ("<?xml", "<OME", "ImageJ=")  # in a description: which pages are channels is said there


class MixedImages(UserError):
    """Images of a data set differ in their number of channels or their depth."""


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


Version = tuple[tuple[int, int], ...]  # time and size of files
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
        image = _open_for_windows(data.data, replace(settings, max_pixels=NO_LIMIT), name)
        if data.whole not in (None, (image.height, image.width)):
            height, width = data.whole
            raise UnreadableImage(f"{image.width}x{image.height} pixels, and {width}x{height} in the annotations")
        pixels = data.box[2] * data.box[3] if image.reads_windows else image.height * image.width
        if pixels > settings.max_pixels:
            raise UnreadableImage(
                f"{image.width}x{image.height} pixels, more than the {settings.max_pixels} allowed "
                f"(--data.max-pixels), and it cannot be read in parts: {REMEDY}"
            )
        if settings.stretch is not None and isinstance(image, StoredImage) and isinstance(data.data, Path | BandsOf):
            stretch = Reading(NO_LIMIT, settings.axes, settings.nodata, settings.stretch)
            image.limits = _keep_limits(data.data, _find_version(data.data), stretch)
        return WindowSample(image, data.box)
    return open_image_of(data, settings, name)


def open_for_tiles(
    data: bytes | Path | BandsOf | WindowOf | UnreadableImage, settings: Reading = PLAIN, name: str = ""
) -> Sample:
    """As :func:`open_sample`; a photograph in a TIFF that is too large to be decoded as a whole is opened too, if parts
    of it can be decoded alone.
    """
    try:
        return open_sample(data, settings, name)
    except UnreadableImage as error:
        if isinstance(data, Path) and (image := _open_regions(data, settings)) is not None:
            return image
        raise error


def _open_regions(path: Path, settings: Reading) -> StoredImage | None:
    try:
        if read_head(path, 4) not in TIFF_HEADERS:
            return None
        image = _open_stored(path, settings)
    except (OSError, UnreadableImage):
        return None
    return image if image.reads_windows and image.type.is_photo and settings.type in (None, image.type) else None


def open_image_of(data: bytes | Path | BandsOf | UnreadableImage, settings: Reading, name: str) -> Image:
    """As :func:`open_sample`, of a whole image."""
    if isinstance(data, UnreadableImage):
        raise data
    image: Image
    if isinstance(data, BandsOf):
        image = StoredImage(BandsFile(data.paths, settings.axes), settings)
    else:
        image = _open_path(data, settings) if isinstance(data, Path) else _open_bytes(data, settings)
    return _check_type(image, settings, name)


def _check_type(image: Image, settings: Reading, name: str) -> Image:
    if settings.type not in (None, own := type_of(image)):
        example = TRAINED if settings.example == f"{name} has" else settings.example  # which has changed since
        raise MixedImages(f"{example} {settings.type}, and {name} has {own}{settings.advice}")
    return image


def _open_for_windows(data: bytes | Path | BandsOf | UnreadableImage, settings: Reading, name: str) -> Image:
    """As :func:`open_image_of`; a file that is read in parts stays open for its next windows."""
    if not isinstance(data, Path | BandsOf):
        return open_image_of(data, settings, name)
    file = _keep_open(os.getpid(), data, _find_version(data), settings.axes)
    if file is None:
        return open_image_of(data, settings, name)
    return _check_type(StoredImage(file, settings), settings, name)


def _find_version(data: Path | BandsOf) -> Version:
    """What tells that files have been changed."""
    paths = data.paths if isinstance(data, BandsOf) else (data,)
    try:
        return tuple((status.st_mtime_ns, status.st_size) for status in (path.stat() for path in paths))
    except OSError as error:
        check_lost(paths[0], error)
        raise UnreadableImage(reason_of(error)) from None


@functools.lru_cache(maxsize=4)
def _keep_open(
    process: int, data: Path | BandsOf, version: Version, axes: Literal["CHW", "HWC"] | None
) -> ImageFile | None:
    """An open file that is read in parts; None for others. Each process has its own, because it moves in the file."""
    image = open_image_of(data, Reading(NO_LIMIT, axes), str(data))
    return image.file if isinstance(image, StoredImage) and image.reads_windows else None


@functools.lru_cache(maxsize=2**12)
def _keep_limits(data: Path | BandsOf, version: Version, settings: Reading) -> tuple[Limits, ...]:
    """What becomes 0 and 1 in each channel of an image: a part of it is read, or the whole where it has no parts."""
    image = open_image_of(data, settings, str(data))
    assert isinstance(image, StoredImage)
    return image.limits


def type_of(image: Sample) -> ImageType:
    """Channels and depth of an image."""
    whole = image.image if isinstance(image, WindowSample) else image
    return whole.type if isinstance(whole, StoredImage) else PHOTOGRAPH


def find_type(images: ImageSource | Reader, settings: Reading) -> tuple[ImageType, str]:
    """The type of the first readable image, and its name.

    Args:
        settings: without a type.

    Raises:
        UserError: the first thousand cannot be read.
        MachineError: because the file system fails.
    """
    corrupt = []
    for name, data, *_ in itertools.islice(_in_order(images), TRIED):
        try:
            return type_of(open_sample(data, settings, name)), name
        except UnreadableImage as error:
            corrupt.append((name, str(error)))
    raise nothing_readable(corrupt)


def _in_order(images: ImageSource | Reader) -> Iterator[tuple[Any, ...]]:
    """Images as readers give them; shards are read no further than is asked for."""
    if isinstance(images, ImageSource):
        if images.shards:
            return itertools.chain.from_iterable(read_shard(shard, images.members) for shard in images.shards)
        images = FileReader(images.images)
    return (images[index] for index in range(len(images)))


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
        if _has_other_depth(read_tags(file, (BITS, SAMPLE_FORMAT))):
            return False
        file.seek(0)
        try:
            image = open_image(file, max_pixels=None).image
        except UnreadableImage:  # by Pillow
            return False
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        if _has_other_depth(tags):  # of a page that only Pillow finds
            return False
        more = tags.get(SAMPLES, 1) - COLOURS.get(tags.get(PHOTOMETRIC, 1), 0)
        if not (more == 0 or (more == 1 and (tags.get(EXTRA_SAMPLES) or (0,))[0] in ALPHA)):
            return False
        stacked = str(tags.get(DESCRIPTION, "")).lstrip().startswith(STACKS)
        if not stacked or getattr(image, "n_frames", 1) == 1:
            return True
    stack = open_file(source)
    return stack.channels == 1 or stack.rgb


def _has_other_depth(tags: Mapping[int, Any]) -> bool:
    """Whether the pixels of a TIFF have more than 8 bits, a sign or a point."""
    return max(tags.get(BITS) or (1,)) > 8 or bool(set(tags.get(SAMPLE_FORMAT) or ()) & {2, 3})
