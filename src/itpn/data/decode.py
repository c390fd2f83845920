"""From the bytes of an image file to an RGB tensor, whatever its format and mode; what cannot be read is refused."""

import functools
import io
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

# The first that fits wins. A closed list, because among Pillow's other formats some run programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
MAX_PIXELS = 2**27  # 134 megapixels, 400 MB as RGB: more than any camera, less than most bombs


MAX_SCANS = 100  # of a progressive JPEG: encoders make about 10
JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")  # none of those inside a scan's data


class UnreadableImage(Exception):
    """The bytes are not an image that can be read in full; the message is a short reason."""


class EncodedImage:
    """An image file of which only the header has been read: what is wanted of it is decoded when it is known.

    Attributes:
        data: the file's content.
        height, width: in pixels, the way a person sees it: EXIF rotation applied.
        format: Pillow's name of it.

    Raises:
        UnreadableImage: not an image, or of more than ``max_pixels`` (or 179 million, Pillow's own limit).
    """

    def __init__(self, data: bytes, max_pixels: int = MAX_PIXELS) -> None:
        if not data:
            raise UnreadableImage("empty file")
        self.data = data
        with _reading():
            self._image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header only
            self._orientation = 1
            if "exif" in self._image.info:
                with suppress(Exception):  # damaged metadata is no reason to lose the picture
                    self._orientation = self._image.getexif().get(ExifTags.Base.Orientation, 1)
        self.width, self.height = self._image.size[::-1] if self._orientation in TURNED else self._image.size
        if self.width * self.height > max_pixels:
            raise UnreadableImage(f"{self.width}x{self.height} pixels, more than the {max_pixels} allowed")
        self.format = self._image.format
        self._is_jpeg = self.format in ("JPEG", "MPO") and self._image.mode in ("L", "RGB")
        if "progressive" in self._image.info and count_scans(data) > MAX_SCANS:
            raise UnreadableImage(f"a JPEG of more than {MAX_SCANS} scans, each of which takes the time of an image")

    @property
    def is_upright_jpeg(self) -> bool:
        """Whether it is a grey or RGB JPEG that is stored as it is seen."""
        return self._is_jpeg and self._orientation == 1

    def decode(self) -> Tensor:
        """All of it, uint8 [3, height, width]; see :func:`decode_image`."""
        with _reading():
            if self._is_jpeg:
                encoded = torch.frombuffer(bytearray(self.data), dtype=torch.uint8)  # a copy: bytes are read-only
                return decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
            return _to_tensor(_to_rgb(self._image))

    def decode_crop(self, top: int, left: int, height: int, width: int, target: tuple[int, int]) -> Tensor:
        """A part of it that is going to be resized to ``target``, (height, width).

        A JPEG is decoded at the smallest scale, 1/2, 1/4 or 1/8, at which the part has twice the target's size both
        ways, the margin of Pillow's thumbnails: the result differs from that of a full decoding as bicubic and bilinear
        resizing differ. Its edges are moved to whole pixels of that scale.

        Returns:
            uint8 [3, height, width], or smaller by that scale; channels last in memory, for which resizing is quickest.

        Raises:
            UnreadableImage: damaged or cut off.
        """
        shrink = min(height // (2 * target[0]), width // (2 * target[1]))
        if not self._is_jpeg or shrink < 2:
            part = self._decode_part(top, left, height, width)
            if part is None:
                part = self.decode()[:, top : top + height, left : left + width]
            return part.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        shrink = max(scale for scale in (2, 4, 8) if scale <= shrink)
        with _reading():
            self._image.draft(None, (self._image.width // shrink, self._image.height // shrink))
            edges = (left, top, left + width, top + height)
            box = [round(edge / shrink) for edge in edges]
            return _to_tensor(_turn(self._image).crop((box[0], box[1], box[2], box[3])).convert("RGB"))

    def _decode_part(self, top: int, left: int, height: int, width: int) -> Tensor | None:
        """A part of a JPEG without what is below it and most of what is beside it; None where that cannot be done.

        The pixels are those of the whole image to the bit. Of a file that is cut off, parts that are there are decoded.
        """
        if not self.is_upright_jpeg:
            return None
        with _quiet():
            codec, decoder = _find_codec(os.getpid())
        if decoder is None:
            return None
        with _reading():
            region = codec.Region(top, left, top + height, left + width)
            part = decoder.decode(codec.CodeStream(self.data).get_sub_code_stream(region=region))
            return None if part is None else torch.from_numpy(np.asarray(part)).permute(2, 0, 1)


@functools.cache
def _find_codec(process: int) -> tuple[Any, Any]:
    """nvImageCodec and a decoder of it, for each process its own, because threads do not survive a fork."""
    try:
        from nvidia import nvimgcodec as codec

        backends = [codec.Backend(codec.CPU_ONLY)]
        return codec, codec.Decoder(
            device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=backends
        )
    except Exception:  # not there (there are builds for Linux alone), or not for this machine
        return None, None


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode an image file the way a person sees it.

    EXIF rotation is applied, ink (CMYK) and palette become RGB, 16 bits are scaled to 8, what is transparent
    is laid over white, and of an animation the first frame is taken.

    Returns:
        uint8 [3, height, width], RGB; memory may be laid out channels last.

    Raises:
        UnreadableImage: not an image, damaged, cut off, or of more than ``max_pixels``, which is found out
            from the header before memory is set aside (Pillow's own limit, 179 megapixels, holds as well).
    """
    return EncodedImage(data, max_pixels).decode()


def open_sample(data: bytes | UnreadableImage, max_pixels: int = MAX_PIXELS) -> EncodedImage:
    """What a reader gives, the bytes of a file or why they cannot be had, as an image to be decoded."""
    if isinstance(data, UnreadableImage):
        raise data
    return EncodedImage(data, max_pixels)


def decode_sample(data: bytes | UnreadableImage, max_pixels: int = MAX_PIXELS) -> Tensor:
    """As :func:`open_sample`, decoded whole."""
    return open_sample(data, max_pixels).decode()


def decode_whole(image: EncodedImage | Tensor) -> Tensor:
    return image if isinstance(image, Tensor) else image.decode()


@contextmanager
def _reading() -> Iterator[None]:
    """Whatever decoders raise, a dozen types on damaged input, becomes :class:`UnreadableImage`."""
    with _quiet():
        try:
            yield
        except UnidentifiedImageError:
            raise UnreadableImage("not an image of a known format") from None
        except Exception as error:
            raise UnreadableImage(reason_of(error)) from None


def count_scans(data: bytes) -> int:
    """Scans of a JPEG, not counting beyond `MAX_SCANS`: a few bytes make a decoder pass over all of the image again."""
    scans = place = 0
    while scans <= MAX_SCANS and (found := JPEG_MARKER.search(data, place)) is not None:
        place, marker = found.end(), found[1][0]
        if marker == 0xD9:  # the end: whatever follows is another file
            break
        scans += marker == 0xDA
        if marker != 0xD8:
            place += int.from_bytes(data[place : place + 2], "big")  # a segment with its length
    return scans


def _turn(image: Image.Image) -> Image.Image:
    image.load()
    with suppress(Exception):  # damaged metadata is no reason to lose the picture
        image = ImageOps.exif_transpose(image)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    image = _turn(image)
    if image.mode[0] in "IF":
        image = Image.fromarray(_to_8_bits(np.asarray(image), image.mode, image.format))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # of [height, width, 3]


def _to_8_bits(values: np.ndarray, mode: str, format: str | None) -> np.ndarray:
    """Scale grey values of more than 8 bits; where a file does not tell their range, guess it from the values."""
    if mode.startswith("I;16") or format == "PNG":  # older Pillow opens 16-bit PNG as 32-bit integers
        return (values >> 8).astype(np.uint8)
    values = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)
    low, high = values.min(), values.max()
    if low >= 0 and high <= 255:
        scaled = values * 255 if mode == "F" and high <= 1 else values
    else:
        scaled = (values - low) / (high - low or 1) * 255
    return scaled.round().astype(np.uint8)


def reason_of(error: Exception) -> str:
    """The first line of a decoder's complaint, without the place in its source that torchvision puts before it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^.*\.cpp:\d+,?\s*", "", lines[0])


# libjpeg and libtiff write their complaints about an odd file straight to file descriptor 2, in the middle of a
# progress bar. They are turned away while an image is decoded, in whichever number of threads.
_quiet_lock = threading.Lock()
_quiet_depth = 0
_saved_stderr = -1


@contextmanager
def _quiet() -> Iterator[None]:
    global _quiet_depth, _saved_stderr
    with _quiet_lock:
        _quiet_depth += 1
        if _quiet_depth == 1:
            with suppress(OSError):  # a process may run without stderr
                _saved_stderr = os.dup(2)
                os.dup2(_devnull(), 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if _quiet_depth == 0 and _saved_stderr >= 0:
                os.dup2(_saved_stderr, 2)
                os.close(_saved_stderr)
                _saved_stderr = -1


_devnull_descriptor = -1


def _devnull() -> int:
    global _devnull_descriptor
    if _devnull_descriptor < 0:
        _devnull_descriptor = os.open(os.devnull, os.O_WRONLY)
    return _devnull_descriptor
