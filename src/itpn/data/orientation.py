"""Orientation of images: the only place that reads and applies it.

Decoders do not apply it: torchvision and nvImageCodec have an option, and in Pillow's TIFF reader the tag is reset.
"""

import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np
from PIL import Image
from torch import Tensor

ORIENTATION = 274  # the tag, in TIFF and EXIF alike
XMP = 700  # of TIFF
EXIF_STARTS = (b"Exif\0", b"II", b"MM")
MAX_METADATA = 2**24  # bytes: larger metadata chunks are not read, nor unpacked
SWAPPED = (5, 6, 7, 8)  # orientations that swap height and width
FLIPPED_ROWS, FLIPPED_COLUMNS = (3, 4, 7, 8), (2, 3, 6, 7)  # those that reverse an axis after that
INTEGERS = {1: "B", 3: "H", 4: "I", 8: "h", 9: "i"}  # EXIF's types: BYTE, SHORT, LONG and the signed ones
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_orientation(image: Image.Image, file: IO[bytes]) -> int:
    """The orientation of an image of which Pillow has read the header, 1 to 8.

    Of TIFF it is tag 274, of other formats the first EXIF that has one, and without either XMP's `tiff:Orientation`.
    Anything but a number from 1 to 8 counts as 1, and so does a truncated entry.

    Args:
        file: what ``image`` was opened from; its position is kept.
    """
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        return choose_orientation(tags.get(ORIENTATION), tags.get(XMP))
    blocks = (*_find_metadata(image, file),)
    value = next((found for exif in blocks if (found := _read_exif(exif)) is not None), None)
    return choose_orientation(value, blocks)


def choose_orientation(value: Any, packets: Any) -> int:
    """The orientation of a tag's value, or without one that of the first packet of XMP that has one; 1 without both.

    Args:
        packets: one, or a tuple of several.
    """
    if value is None:
        blocks = packets if isinstance(packets, tuple) else [packets]
        value = next((found for xmp in blocks if (found := _read_xmp(xmp)) is not None), 1)
    return {number: number for number in range(1, 9)}.get(value, 1)


def turn_image(image: Image.Image, orientation: int) -> Image.Image:
    """Apply an orientation to a decoded image."""
    return image if orientation == 1 else image.transpose(TRANSPOSES[orientation])


def turn_tensor(pixels: Tensor, orientation: int) -> Tensor:
    """Apply an orientation to decoded pixels [..., height, width]."""
    if orientation in SWAPPED:
        pixels = pixels.transpose(-2, -1)
    sides = [-2] * (orientation in FLIPPED_ROWS) + [-1] * (orientation in FLIPPED_COLUMNS)
    return pixels.flip(sides) if sides else pixels


def turn_array(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """As :func:`turn_tensor`, of an array; a view."""
    if orientation in SWAPPED:
        pixels = pixels.swapaxes(-2, -1)
    rows = -1 if orientation in FLIPPED_ROWS else 1
    return pixels[..., ::rows, :: -1 if orientation in FLIPPED_COLUMNS else 1]


def find_stored_window(
    window: tuple[int, int, int, int], orientation: int, height: int, width: int
) -> tuple[int, int, int, int]:
    """Where a window (top, left, height, width) of a turned image of this height and width is among stored pixels."""
    top, left, rows, columns = window
    if orientation in FLIPPED_ROWS:
        top = height - top - rows
    if orientation in FLIPPED_COLUMNS:
        left = width - left - columns
    return (left, top, columns, rows) if orientation in SWAPPED else (top, left, rows, columns)


def _find_metadata(image: Image.Image, file: IO[bytes]) -> Iterable[bytes]:
    """Blocks of EXIF and of XMP, in their order in the file."""
    if image.format == "PNG":
        return _read_png(file)
    if image.format in ("JPEG", "MPO"):
        # Pillow joins several segments of EXIF into one
        return [data for name, data in image.applist if name == "APP1"]  # type: ignore[attr-defined]
    return [image.info[name] for name in ("exif", "xmp") if image.info.get(name)]


def _read_exif(exif: bytes) -> int | None:
    """The value of the tag, 0 if it is not a single integer; None if the entry is missing or truncated."""
    exif = re.sub(b"^(Exif\0.)+", b"", exif, flags=re.DOTALL)
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, start)
        for place in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, count, value = struct.unpack_from(f"{order}HHI4s", exif, place)
            if tag == ORIENTATION:
                is_integer = count == 1 and kind in INTEGERS
                return int(struct.unpack_from(order + INTEGERS[kind], value)[0]) if is_integer else 0
    except struct.error:  # it is truncated
        pass
    return None


def _read_xmp(xmp: Any) -> int | None:
    """`tiff:Orientation`, an attribute or an element, with any prefix; None if there is none."""
    if not isinstance(xmp, bytes) or xmp.startswith(EXIF_STARTS):
        return None
    xmp = xmp.replace(b"\0", b"")  # reduces UTF-16 to ASCII
    declared = re.search(rb"xmlns:([\w.-]+)\s*=\s*[\"']http://ns\.adobe\.com/tiff/1\.0/[\"']", xmp)
    prefix = declared[1] if declared else b"tiff"
    found = re.search(rb"[\s<]" + re.escape(prefix) + rb":Orientation\s*(?:=\s*[\"']|>)\s*(\d{1,9})\s*[\"'<]", xmp)
    return int(found[1]) if found else None


def _read_png(file: IO[bytes]) -> Iterator[bytes]:
    """EXIF and XMP of a PNG, before its pixels or after them, in the chunks that different programs use."""
    position = file.tell()
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if name == b"IEND":
            break
        if name not in (b"eXIf", b"iTXt", b"tEXt", b"zTXt") or length > MAX_METADATA:
            file.seek(length + 4, 1)
            continue
        data = file.read(length)
        file.seek(4, 1)  # the checksum
        if name == b"eXIf":
            yield data
            continue
        keyword, _, text = data.partition(b"\0")
        if keyword == b"XML:com.adobe.xmp" or keyword in (b"Raw profile type exif", b"Raw profile type APP1"):
            yield _unpack_text(name, keyword, text)
    file.seek(position)


def _unpack_text(name: bytes, keyword: bytes, text: bytes) -> bytes:
    """The content of a text chunk of PNG; empty if it is corrupt."""
    try:
        packed = name == b"zTXt"
        if name == b"iTXt":
            packed, text = text[:1] == b"\1", text[2:].split(b"\0", 2)[2]
        elif packed:
            text = text[1:]
        if packed:
            text = zlib.decompressobj().decompress(text, MAX_METADATA)
        if keyword.startswith(b"Raw"):  # ImageMagick's: name, length, and the rest in hexadecimal digits
            text = bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except (zlib.error, IndexError, ValueError):
        return b""
    return text
