"""Decoding of image files of any format and mode to RGB tensors; unreadable files are refused."""

import functools
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageChops, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from itpn.data.headers import (
    BITS,
    COLOUR_MAP,
    EXTRA_SAMPLES,
    MAX_SCANS,
    PHOTOMETRIC,
    PLANES,
    PNG_DEPTH,
    SAMPLE_FORMAT,
    SAMPLES,
    count_scans,
    has_pages,
)
from itpn.data.orientation import ORIENTATION, SWAPPED, read_orientation, turn_image, turn_tensor
from itpn.data.quiet import quiet
from itpn.errors import LOST

# Tried in this order. A closed list, because some of Pillow's other formats run programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")
ADDED = ("HEIF",)  # where a plugin of Pillow's has registered it
TIFF_HEADERS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_PIXELS = 2**27  # 134 megapixels, 400 MB as RGB: more than any camera, less than most bombs
PAGES = "it has several pages, of which the first is read; save each as a file to use them all"


class UnreadableImage(Exception):
    """An image cannot be read, or not completely; the message is a short reason."""


class OpenedImage(NamedTuple):
    """An image of which only the header has been read.

    Attributes:
        image: as it is stored.
        orientation: from :func:`itpn.data.orientation.read_orientation`, to be applied to the decoded ``image``.
        height, width: in pixels, with the orientation applied.
    """

    image: Image.Image
    orientation: int
    height: int
    width: int


def open_image(file: IO[bytes], max_pixels: int | None = MAX_PIXELS) -> OpenedImage:
    """Read the header of an image file.

    Args:
        max_pixels: None for no limit.

    Raises:
        UnreadableImage: not an image, of a kind that would be decoded wrongly, or of more than ``max_pixels``.
    """
    with decoder_errors():
        try:
            image = Image.open(file, formats=[*FORMATS, *(name for name in ADDED if name in Image.OPEN)])
        except UnidentifiedImageError:
            file.seek(0)
            if file.read(4) not in TIFF_HEADERS:
                raise
            raise UnreadableImage("TIFF of bands, a depth or a compression that cannot be read") from None
        orientation = read_orientation(image, file)
        width, height = image.size
        if image.format == "TIFF":
            tags: Any = image.tag_v2  # type: ignore[attr-defined]
            _check_tags(image.info["compression"], tags)
            width, height = tags[256], tags[257]  # some versions of Pillow apply the orientation
            image.getexif()[ORIENTATION] = 1  # or else Pillow applies it a second time
    if orientation in SWAPPED:
        width, height = height, width
    opened = OpenedImage(image, orientation, height, width)
    check_pixels(opened, max_pixels)
    return opened


def check_pixels(image: OpenedImage, max_pixels: int | None) -> None:
    """Raise :class:`UnreadableImage` for an image of more pixels; None for no limit."""
    if max_pixels is not None and image.width * image.height > max_pixels:
        size = f"{image.width}x{image.height}"
        raise UnreadableImage(f"{size} pixels, more than the {max_pixels} allowed (--data.max-pixels)")


def load_image(opened: OpenedImage) -> Image.Image:
    """The pixels in their stored mode, with the orientation applied."""
    image = opened.image
    image.load()
    tags: Any = getattr(image, "tag_v2", {})
    if (
        image.mode in ("P", "PA") and max(tags.get(COLOUR_MAP) or (256,)) < 256
    ):  # a ColorMap of 8 bits, which libtiff accepts
        image.putpalette(bytes(tags[COLOUR_MAP]), "RGB;L")  # Pillow expects 16 bits, and makes it black
    return turn_image(image, opened.orientation)


def _check_tags(compression: str, tags: Any) -> None:
    """Refuse TIFFs of signed bytes or separate planes, which Pillow decodes wrongly without an error."""
    deep = max(tags.get(BITS) or (1,)) > 8
    if not deep and 2 in (tags.get(SAMPLE_FORMAT) or ()):
        raise UnreadableImage("TIFF of signed 8 bits cannot be read: save it with unsigned values, or more bits")
    undeclared = tags.get(SAMPLES, 1) == 4 and tags.get(PHOTOMETRIC) == 2 and EXTRA_SAMPLES not in tags
    if tags.get(PLANES) == 2 and (deep if compression == "raw" else undeclared):
        what = "16 bits" if deep else "an undeclared fourth band"
        raise UnreadableImage(f"TIFF of separate planes with {what} cannot be read: save it with interleaved bands")


class EncodedImage:
    """An image file of which only the header has been read; all of it or a crop is decoded later.

    Args:
        opened: its header, where that has been read.

    Attributes:
        data: the file's content.
        height, width: in pixels, with the orientation applied.
        format: as Pillow names it.
        warnings: after decoding, kind ("pages") -> message.

    Raises:
        UnreadableImage: see :func:`open_image`.
    """

    def __init__(self, data: bytes, max_pixels: int | None = MAX_PIXELS, opened: OpenedImage | None = None) -> None:
        if not data:
            raise UnreadableImage("empty file")
        self.data = data
        self._opened = opened or open_image(io.BytesIO(data), None)
        check_pixels(self._opened, max_pixels)
        self._image, self._orientation, self.height, self.width = self._opened
        self.format = self._image.format
        self._tags: Any = getattr(self._image, "tag_v2", {})
        self.warnings: dict[str, str] = {}
        self._is_jpeg = is_plain_jpeg(self._image)
        if self._image.mode[0] in "IF" or is_deep_png(data) or max(self._tags.get(BITS) or (8,)) > 8:
            raise UnreadableImage("more than 8 bits a channel: no photograph")
        if "progressive" in self._image.info and count_scans(data) > MAX_SCANS:
            raise UnreadableImage(f"a JPEG of more than {MAX_SCANS} scans, each of which takes the time of an image")

    @property
    def is_upright_jpeg(self) -> bool:
        """Whether it is a grey or RGB JPEG without an orientation to apply."""
        return self._is_jpeg and self._orientation == 1

    @property
    def reads_windows(self) -> bool:
        """Whether a region is decoded without the rest."""
        return reads_regions(self._opened)

    def decode(self) -> Tensor:
        """Decode the whole image, uint8 [3, height, width]; see :func:`decode_image`."""
        with decoder_errors():
            if self._is_jpeg:
                encoded = torch.frombuffer(bytearray(self.data), dtype=torch.uint8)  # a copy: bytes are read-only
                pixels = decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=False)
                return turn_tensor(pixels, self._orientation)
            image = _to_rgb(self._opened, self.data)
            if self.format == "TIFF" and has_pages(self.data):
                self.warnings["pages"] = PAGES
            return _to_tensor(image)

    def decode_crop(self, top: int, left: int, height: int, width: int, target: tuple[int, int]) -> Tensor:
        """Decode a crop that will be resized to ``target``, (height, width).

        A JPEG is decoded at the smallest scale, 1/2, 1/4 or 1/8, at which the crop has at least twice the target's
        sides, as for Pillow's thumbnails. The result differs from that of a full decoding about as much as bicubic and
        bilinear resizing differ. The crop's edges are rounded to pixels of that scale.

        Returns:
            uint8 [3, height, width], or smaller by that scale; channels last in memory, for which resizing is fastest.

        Raises:
            UnreadableImage: corrupt or cut off.
        """
        shrink = min(height // (2 * target[0]), width // (2 * target[1]))
        if not self._is_jpeg or shrink < 2:
            part = self._decode_part(top, left, height, width)
            if part is None:
                part = self.decode()[:, top : top + height, left : left + width]
            return part.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        shrink = max(scale for scale in (2, 4, 8) if scale <= shrink)
        with decoder_errors():
            self._image.draft(None, (self._image.width // shrink, self._image.height // shrink))
            edges = (left, top, left + width, top + height)
            box = [round(edge / shrink) for edge in edges]
            return _to_tensor(load_image(self._opened).crop((box[0], box[1], box[2], box[3])).convert("RGB"))

    def _decode_part(self, top: int, left: int, height: int, width: int) -> Tensor | None:
        """Decode a region of a JPEG, without the rows below and most of what is beside it; None if that is impossible.

        The pixels equal those of the whole image. In a truncated file, regions before the end can be decoded.
        """
        if not self.is_upright_jpeg:
            return None
        codec, decoder = _find_codec(os.getpid())
        if decoder is None:
            return None
        with decoder_errors():
            region = codec.Region(top, left, top + height, left + width)
            stream = codec.CodeStream(self.data).get_sub_code_stream(region=region)
            part = decoder.decode(stream, params=codec.DecodeParams(apply_exif_orientation=False))
            return None if part is None else torch.from_numpy(np.asarray(part)).permute(2, 0, 1)


def is_plain_jpeg(image: Image.Image) -> bool:
    """Whether it is a grey or RGB JPEG."""
    return image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")


def reads_regions(opened: OpenedImage) -> bool:
    """Whether a region of a photograph is decoded without the rest: of an upright JPEG, where nvImageCodec is there."""
    return is_plain_jpeg(opened.image) and opened.orientation == 1 and _find_codec(os.getpid())[1] is not None


@functools.cache
def _find_codec(process: int) -> tuple[Any, Any]:
    """nvImageCodec and a decoder of it. Each process has its own, because threads do not survive a fork."""
    try:
        with quiet():  # about libraries for GPUs
            from nvidia import nvimgcodec as codec

            backends = [codec.Backend(codec.CPU_ONLY)]
            return codec, codec.Decoder(
                device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=backends
            )
    except Exception:  # not installed (it exists for Linux only), or not for this machine
        return None, None


def is_deep_png(data: bytes) -> bool:
    """Whether the first bytes of a file are those of a PNG of 16 bits."""
    return data.startswith(b"\x89PNG") and data[PNG_DEPTH : PNG_DEPTH + 1] == b"\x10"


def decode_image(data: bytes, max_pixels: int | None = MAX_PIXELS) -> Tensor:
    """Decode an image file as a viewer shows it.

    The orientation is applied; CMYK and palettes become RGB; transparent pixels are composited over white; of an
    animation the first frame is taken.

    Returns:
        uint8 [3, height, width], RGB; possibly channels last in memory.

    Raises:
        UnreadableImage: not an image, corrupt, truncated, of more than 8 bits a channel, or of more than
            ``max_pixels``; the size is checked in the header, before memory is allocated.
    """
    return EncodedImage(data, max_pixels).decode()


def decode_whole(image: Any) -> Tensor:
    """The pixels of a sample, or pixels as they are."""
    return image if isinstance(image, Tensor) else image.decode()


@contextmanager
def decoder_errors() -> Iterator[None]:
    """Convert all errors of decoders, a dozen types on corrupt input, to :class:`UnreadableImage`."""
    with quiet():
        try:
            yield
        except UnreadableImage:
            raise
        except UnidentifiedImageError:
            raise UnreadableImage("not an image of a known format") from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in LOST:  # the disk fails, not the image
                raise
            raise UnreadableImage(reason_of(error)) from None


def _to_rgb(opened: OpenedImage, data: bytes) -> Image.Image:
    """RGB the way a person sees it."""
    image, stored = load_image(opened), opened.image
    tags: Any = getattr(stored, "tag_v2", {})
    transparent = _read_transparent(stored, data)
    if image.mode == "CMYK" and stored.format == "JPEG" and "adobe" not in stored.info:
        image = ImageChops.invert(image)  # Pillow assumes Adobe's, which is stored inverted
    elif image.has_transparency_data and not (tags and EXTRA_SAMPLES not in tags):  # a fourth band need not be alpha
        if transparent is not None:
            image = image.copy()
            image.info["transparency"] = transparent
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _read_transparent(stored: Image.Image, data: bytes) -> Any:
    """The value or colour that a PNG declares transparent, in the depth of Pillow's pixels; None if there is none.

    Pillow returns it in the file's depth, but scales pixels of 2 and 4 bits to 8.
    """
    value = stored.info.get("transparency")
    if stored.format != "PNG" or not isinstance(value, int | tuple) or stored.mode not in ("L", "RGB"):
        return None
    bits = data[PNG_DEPTH]
    return value * 255 // (2**bits - 1) if isinstance(value, int) and bits < 8 else value


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # of [height, width, 3]


def reason_of(error: Exception) -> str:
    """The operating system's reason of an error, or a decoder's first line without torchvision's source location."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^.*\.cpp:\d+,?\s*", "", lines[0])
