"""From the bytes of an image file to an RGB tensor, whatever its format and mode; what cannot be read is refused."""

import io
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

# The first that fits wins. A closed list, because among Pillow's other formats some run programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
MAX_PIXELS = 2**27  # 134 megapixels, 400 MB as RGB: more than any camera, less than most bombs


class UnreadableImage(Exception):
    """The bytes are not an image that can be read in full; the message is a short reason."""


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
    if not data:
        raise UnreadableImage("empty file")
    with _quiet():
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header only
            if image.width * image.height > max_pixels:
                raise UnreadableImage(f"{image.width}x{image.height} pixels, more than the {max_pixels} allowed")
            if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
                encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy, because bytes are read-only
                return decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
            return _decode_with_pillow(image)
        except UnreadableImage:
            raise
        except UnidentifiedImageError:
            raise UnreadableImage("not an image of a known format") from None
        except Exception as error:  # decoders raise a dozen types on damaged input
            raise UnreadableImage(reason_of(error)) from None


def decode_sample(data: bytes | UnreadableImage, max_pixels: int = MAX_PIXELS) -> Tensor:
    """As :func:`decode_image`, of what a reader gives: the bytes of a file, or why they cannot be had."""
    if isinstance(data, UnreadableImage):
        raise data
    return decode_image(data, max_pixels)


def _decode_with_pillow(image: Image.Image) -> Tensor:
    image.load()
    with suppress(Exception):  # damaged metadata is no reason to lose the picture
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        image = Image.fromarray(_to_8_bits(np.asarray(image), image.mode, image.format))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.array(image.convert("RGB"))  # [height, width, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1)


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
