"""Opening of what readers give: photographs, and images of any number of channels and any depth.

Photographs are files of 8 bits that a viewer shows in colour or grey: they become RGB, and mix freely in a data set.
Of all other images a data set has one :class:`ImageType`: as many channels, stored in the same type of number.
"""

import functools
import io
import itertools
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from itpn.data.bands import BandsOf
from itpn.data.decode import (
    TIFF_HEADERS,
    EncodedImage,
    OpenedImage,
    UnreadableImage,
    decoder_errors,
    is_deep_png,
    open_image,
    reads_regions,
    reason_of,
)
from itpn.data.file_types import DICOM_START
from itpn.data.files import ImageSource
from itpn.data.formats.bands import BandsFile
from itpn.data.formats.image_file import ImageFile, Window
from itpn.data.formats.photos import DecodedPhoto
from itpn.data.formats.reader import REMEDY, open_file
from itpn.data.headers import read_tags
from itpn.data.image_type import PHOTOGRAPH, ImageType, check_nodata
from itpn.data.open_files import OpenFiles, Version, find_version
from itpn.data.photographs import PHOTO_TAGS, find_nodata, find_photo, is_photo, is_photo_head, is_plain
from itpn.data.readers import FileReader, Reader, check_lost, read_file
from itpn.data.shards import read_shard
from itpn.data.skipped import nothing_readable
from itpn.data.stored import PLAIN, Limits, ReadSettings, StoredImage, describe_nodata, is_masked
from itpn.errors import UserError

NO_LIMIT = 2**62
TRIED = 1000  # images that are opened to find a readable one
LARGE_FILE = 2**26  # bytes: a larger photograph is read in parts where it can be
TRAINED = "the training images have"
HEAD = DICOM_START  # bytes that tell the format


class MixedImages(UserError):
    """Images of a data set differ in their number of channels or their depth."""


@dataclass(frozen=True)
class WindowRequest:
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

    def move(self, rng: random.Random) -> "WindowRequest":
        """The window at a random place around its own: training sees other windows in each epoch."""
        up, left, down, right = self.room
        y, x, height, width = self.box
        return replace(self, box=(y + rng.randint(-up, down), x + rng.randint(-left, right), height, width))


class OpenWindow:
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
        top, left = self.top + top, self.left + left
        if isinstance(self.image, StoredImage):
            return self.image.decode_window(top, left, height, width)
        return self.image.decode_crop(top, left, height, width, target)


Image = EncodedImage | StoredImage
Sample = Image | OpenWindow


def open_sample(
    data: bytes | Path | BandsOf | WindowRequest | UnreadableImage, settings: ReadSettings = PLAIN, name: str = ""
) -> Sample:
    """Read the header of what a reader gives: a file's content, its path, the paths of its bands, a window of these, or
    the error of reading it, which is raised.

    Args:
        name: of the image, for messages.

    Raises:
        UnreadableImage: no image, corrupt, too large, or of a format whose reader is not installed.
        MixedImages: an image of another type than the others.
    """
    if isinstance(data, WindowRequest):
        image = _open_for_windows(data.data, settings, name)
        if data.whole not in (None, (image.height, image.width)):
            height, width = data.whole
            raise UnreadableImage(f"{image.width}x{image.height} pixels, and {width}x{height} in the annotations")
        height, width = data.box[2:] if image.reads_windows else (image.height, image.width)
        if height * width > settings.max_pixels:
            rest = "" if image.reads_windows else f", and it cannot be read in parts: {REMEDY}"
            raise UnreadableImage(
                f"{width}x{height} pixels, more than the {settings.max_pixels} allowed (--data.max-pixels){rest}"
            )
        if settings.stretch is not None and isinstance(image, StoredImage) and isinstance(data.data, Path | BandsOf):
            stretch = replace(settings, max_pixels=NO_LIMIT, type=None, example="")
            image.limits = _keep_limits(data.data, find_version(list_paths(data.data)), stretch)
        return OpenWindow(image, data.box)
    return open_image_of(data, settings, name)


def open_for_tiles(
    data: bytes | Path | BandsOf | WindowRequest | UnreadableImage, settings: ReadSettings = PLAIN, name: str = ""
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


def _open_regions(path: Path, settings: ReadSettings) -> StoredImage | None:
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
            file.seek(0)
            photo = find_photo(path, file) if head[:4] in TIFF_HEADERS else None
            if photo is None or not is_plain(photo):
                return None
        image = _open_stored(path, settings, head)
    except (OSError, UnreadableImage):
        return None
    return image if image.reads_windows and image.grey_or_rgb and settings.type in (None, image.type) else None


def open_image_of(
    data: bytes | Path | BandsOf | UnreadableImage, settings: ReadSettings, name: str, in_parts: bool = False
) -> Image:
    """As :func:`open_sample`, of a whole image.

    Args:
        in_parts: windows are to be read of it, which may be larger than is allowed as a whole.
    """
    if isinstance(data, UnreadableImage):
        raise data
    image: Image
    if isinstance(data, BandsOf):
        image = StoredImage(BandsFile(data.paths, settings.axes), settings)
    elif isinstance(data, Path):
        image = _open_path(data, settings, in_parts)
    else:
        image = _open_bytes(data, settings, in_parts)
    return _check_type(image, settings, name)


def _check_type(image: Image, settings: ReadSettings, name: str) -> Image:
    if settings.type not in (None, own := type_of(image)):
        example = TRAINED if settings.example == f"{name} has" else settings.example  # which has changed since
        raise MixedImages(f"{example} {settings.type}, and {name} has {own}{settings.advice}")
    return image


_open_files: OpenFiles[ImageFile] = OpenFiles()


def _open_for_windows(data: bytes | Path | BandsOf | UnreadableImage, settings: ReadSettings, name: str) -> Image:
    """As :func:`open_image_of`; a file that is read in parts stays open for its next windows."""
    if not isinstance(data, Path | BandsOf):
        return open_image_of(data, settings, name, in_parts=True)
    key = (data, find_version(list_paths(data)), settings.axes)
    file = _open_files.find(key)
    if file is not None:
        return _check_type(StoredImage(file, settings), settings, name)
    image = open_image_of(data, settings, name, in_parts=True)
    if isinstance(image, StoredImage) and image.reads_windows:
        _open_files.keep(key, image.file)
    return image


def list_paths(data: Path | BandsOf) -> tuple[Path, ...]:
    return data.paths if isinstance(data, BandsOf) else (data,)


@functools.lru_cache(maxsize=2**12)
def _keep_limits(data: Path | BandsOf, version: Version, settings: ReadSettings) -> tuple[Limits, ...]:
    """What becomes 0 and 1 in each channel of an image: a part of it is read, or the whole where it has no parts."""
    image = open_image_of(data, settings, str(data), in_parts=True)
    assert isinstance(image, StoredImage)
    return image.limits


def type_of(image: Sample) -> ImageType:
    """Channels and depth of an image."""
    whole = image.image if isinstance(image, OpenWindow) else image
    return whole.type if isinstance(whole, StoredImage) else PHOTOGRAPH


def find_type(images: ImageSource | Reader, settings: ReadSettings) -> tuple[ReadSettings, str]:
    """How images are read, as the first that can be read tells, see :func:`settle`; and the name of that one.

    Args:
        settings: without a type.

    Raises:
        UserError: the first thousand cannot be read.
        MachineError: because the file system fails.
    """
    corrupt = []
    for name, data, *_ in itertools.islice(_in_order(images), TRIED):
        try:
            return settle(settings, open_sample(data, settings, name), name), name
        except UnreadableImage as error:
            corrupt.append((name, str(error)))
    raise nothing_readable(corrupt)


def settle(settings: ReadSettings, image: Sample, name: str) -> ReadSettings:
    """How images are read, of which this is one: of its type, and without data where it has none.

    Raises:
        UserError: its pixels cannot have the value for no data that was given.
    """
    kind, nodata = type_of(image), settings.nodata
    check_nodata(nodata, kind)
    whole = image.image if isinstance(image, OpenWindow) else image
    if nodata is None and isinstance(whole, StoredImage) and not kind.is_photo:
        nodata = whole.file.nodata
    example = settings.example if settings.type else f"{name} has"
    return replace(settings, type=kind, example=example, nodata=nodata)


def _in_order(images: ImageSource | Reader) -> Iterator[tuple[Any, ...]]:
    """Images as readers give them; shards are read no further than is asked for."""
    if isinstance(images, ImageSource):
        if images.shards:
            return itertools.chain.from_iterable(read_shard(shard, images.members) for shard in images.shards)
        images = FileReader(images.images)
    return (images[index] for index in range(len(images)))


def measure(data: bytes | Path | BandsOf | UnreadableImage, settings: ReadSettings, name: str) -> tuple[int, int, bool]:
    """Height and width of an image, and whether parts of it are decoded alone. Of a file the header is read.

    Raises:
        UnreadableImage, MixedImages: as of :func:`open_sample`.
    """
    if isinstance(data, Path):
        with _naming_losses(data), open(data, "rb") as file:
            head = file.read(HEAD)
            if is_photo_head(head) or is_deep_png(head):
                file.seek(0)
                opened = open_image(file, max_pixels=None)
                return opened.height, opened.width, reads_regions(opened)
    image = open_image_of(data, settings, name, in_parts=True)
    return image.height, image.width, image.reads_windows


@contextmanager
def _naming_losses(path: Path) -> Iterator[None]:
    """Convert the errors of a file that cannot be opened to :class:`UnreadableImage`."""
    try:
        yield
    except (OSError, ValueError) as error:
        check_lost(path, error)
        raise UnreadableImage(reason_of(error)) from None


def _open_bytes(data: bytes, settings: ReadSettings, in_parts: bool) -> Image:
    if not data:
        raise UnreadableImage("empty file")
    if is_photo_head(data[:HEAD]):
        return _open_photo(data, settings, in_parts)
    if data[:4] in TIFF_HEADERS:
        return _open_tiff(data, io.BytesIO(data), data[:HEAD], settings, in_parts)
    return _open_stored(data, settings, data[:HEAD])


def _open_path(path: Path, settings: ReadSettings, in_parts: bool) -> Image:
    with _naming_losses(path):
        with open(path, "rb") as file:
            head = file.read(HEAD)
            if head[:4] in TIFF_HEADERS:
                return _open_tiff(path, file, head, settings, in_parts)
        if is_photo_head(head):
            return _open_photo(read_file(str(path)), settings, in_parts)
        return _open_stored(path, settings, head)


def _open_tiff(source: bytes | Path, file: IO[bytes], head: bytes, settings: ReadSettings, in_parts: bool) -> Image:
    """A TIFF, whose header is read from an open file.

    A photograph is decoded as a whole; a large one, or one that windows are read of, stays in its file, if parts of it
    can be read. So does one in which pixels without data are told apart.
    """
    file.seek(0)
    if not is_photo(read_tags(file, PHOTO_TAGS)):
        return _open_stored(source, settings, head)
    file.seek(0)
    large = in_parts or (isinstance(source, Path) and os.fstat(file.fileno()).st_size > LARGE_FILE)
    data = b"" if large else read_file(str(source)) if isinstance(source, Path) else source
    photo = find_photo(source, file if large else io.BytesIO(data))
    if photo is None:
        return _open_stored(source, settings, head)
    declared = find_nodata(photo)
    if is_masked(declared, settings):
        return _open_stored(source, settings, head)
    if large:
        with suppress(UnreadableImage):
            stored = _open_stored(source, settings, head)
            if stored.reads_windows and stored.type.is_photo and is_plain(photo):
                return stored
        data, photo = read_file(str(source)) if isinstance(source, Path) else source, None
    image = _open_photo(data, settings, in_parts, photo)
    if declared is not None:
        image.warnings["nodata"] = describe_nodata(declared, PHOTOGRAPH)
    return image


def _open_photo(data: bytes, settings: ReadSettings, in_parts: bool, opened: OpenedImage | None = None) -> Image:
    """A photograph from its content; one that is to be read in parts may be of any size."""
    image = EncodedImage(data, None if in_parts else settings.max_pixels, opened)
    return StoredImage(DecodedPhoto(image), settings) if is_masked(None, settings) else image


def _open_stored(source: bytes | Path, settings: ReadSettings, head: bytes) -> StoredImage:
    with decoder_errors():
        return StoredImage(open_file(source, settings.axes, head), settings)
