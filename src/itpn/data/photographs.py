"""What tells a photograph from other images: the first bytes of its file, or the tags of a TIFF.

A photograph is a file of 8 bits that a viewer shows in colour or grey.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from itpn.data.decode import OpenedImage, UnreadableImage, is_deep_png, open_image
from itpn.data.formats.reader import find_heif_reader, open_file
from itpn.data.headers import (
    BITS,
    DESCRIPTION,
    EXTRA_SAMPLES,
    NODATA,
    PHOTOMETRIC,
    SAMPLE_FORMAT,
    SAMPLES,
    read_nodata,
)
from itpn.data.image_type import is_storable

PHOTO_TAGS = (BITS, SAMPLE_FORMAT, SAMPLES, PHOTOMETRIC, EXTRA_SAMPLES)
ALPHA = (1, 2)  # kinds of extra samples
COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}  # photometric interpretation of a TIFF -> channels of colour
STACKS = ("<?xml", "<OME", "ImageJ=")  # in a description: which pages are channels is said there


def is_photo_head(head: bytes) -> bool:
    """Whether the first bytes of a file are those of a photograph; of TIFF and others they do not tell."""
    if head.startswith(b"\x89PNG"):
        return not is_deep_png(head)
    if head[4:8] == b"ftyp":
        find_heif_reader(head)
        return True
    return head.startswith((b"\xff\xd8", b"GIF8", b"BM")) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def find_photo(source: bytes | Path, file: IO[bytes]) -> OpenedImage | None:
    """The header of a TIFF that is a photograph; None for others, and for those that Pillow cannot read.

    Args:
        source: of which ``file`` is the content.
    """
    try:
        opened = open_image(file, max_pixels=None)
    except UnreadableImage:
        return None
    tags: Any = opened.image.tag_v2  # type: ignore[attr-defined]
    if not is_photo(tags):  # by a page that only Pillow finds
        return None
    stacked = str(tags.get(DESCRIPTION, "")).lstrip().startswith(STACKS)
    if not stacked or getattr(opened.image, "n_frames", 1) == 1:
        return opened
    stack = open_file(source)
    if not stack.grey_or_rgb:
        return None
    file.seek(0)
    return open_image(file, max_pixels=None)  # at its first page again


def find_nodata(photo: OpenedImage) -> float | None:
    """The value that a TIFF of grey or RGB declares for pixels without data; None for none."""
    tags: Any = photo.image.tag_v2  # type: ignore[attr-defined]
    declared = read_nodata(tags.get(NODATA))
    return declared if is_plain(photo) and declared is not None and is_storable(declared, "uint8") else None


def is_plain(photo: OpenedImage) -> bool:
    """Whether the numbers in a TIFF are those of grey or RGB: 8 bits without alpha or palette, of which 0 is black."""
    tags: Any = photo.image.tag_v2  # type: ignore[attr-defined]
    return photo.image.mode in ("L", "RGB") and {*tags.get(BITS, ())} == {8} and tags.get(PHOTOMETRIC) != 0


def is_photo(tags: Mapping[int, Any]) -> bool:
    """Whether the tags of a TIFF are those of a photograph: 8 bits or less, without a sign or a point, and the channels
    of its colours, and alpha perhaps."""
    if max(tags.get(BITS) or (1,)) > 8 or set(tags.get(SAMPLE_FORMAT) or ()) & {2, 3}:
        return False
    more = _one(tags.get(SAMPLES, 1)) - COLOURS.get(_one(tags.get(PHOTOMETRIC, 1)), 0)
    return more == 0 or (more == 1 and _one(tags.get(EXTRA_SAMPLES)) in ALPHA)


def _one(value: Any) -> int:
    """The first number of a tag; -1 where it holds none."""
    number = value[0] if isinstance(value, tuple) and value else value
    return number if isinstance(number, int) else -1
