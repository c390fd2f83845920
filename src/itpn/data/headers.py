"""Of encoded images, what Pillow does not give: further pages, scans, and lossy compression."""

import io
import math
import re
import struct
from collections.abc import Collection
from contextlib import suppress
from typing import IO, Any

from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

# tags of TIFF
SUBFILE = 254  # 1 for a smaller copy, 4 for a mask
OLD_SUBFILE = 255  # its forerunner: 2 for a smaller copy
BITS, PHOTOMETRIC, DESCRIPTION, SAMPLES, PLANES, COLOUR_MAP = 258, 262, 270, 277, 284, 320
EXTRA_SAMPLES, SAMPLE_FORMAT = 338, 339
NODATA = 42113  # of GDAL
PNG_DEPTH = 24  # the byte of a PNG that holds the bits of a channel
MAX_SCANS = 100  # of a progressive JPEG: encoders make about 10
INTEGERS = {1: "B", 3: "H", 4: "I"}  # types of a tag
MAX_TAGS, MAX_VALUES = 4096, 2**16  # of a page, and of a tag: one for each channel
MAX_COPIES = 64  # reduced copies of a TIFF's page, each half as wide as the one before; more are a cycle
JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")  # without those inside a scan's data


def has_pages(tiff: bytes) -> bool:
    """Whether a TIFF has more than one page, not counting reduced copies and masks (NewSubfileType)."""
    file = io.BytesIO(tiff)
    with suppress(Exception):  # Pillow raises many types on a corrupt directory
        tags = ImageFileDirectory_v2(tiff[: 16 if 43 in tiff[2:4] else 8])  # of 64 or of 32 bits
        for number in range(MAX_COPIES):
            file.seek(tags.next)
            tags.load(file)
            kind, old_kind = tags.get(SUBFILE, 0), tags.get(OLD_SUBFILE, 0)
            if not tags:  # it is truncated, or of no page
                return False
            if number and not (kind & 5 or old_kind == 2):
                return True
            if not tags.next:
                return False
    return False


def read_tags(file: IO[bytes], wanted: Collection[int]) -> dict[int, tuple[int, ...]]:
    """Numbers of some tags of a TIFF's first page, those of the types BYTE, SHORT and LONG; none of a corrupt file.

    Libraries read all tags, which takes as long as decoding a small image.
    """
    with suppress(struct.error, OverflowError):
        start = file.read(16)
        order = {b"II": "<", b"MM": ">"}[start[:2]]
        big = struct.unpack_from(f"{order}H", start, 2)[0] == 43
        (place,) = struct.unpack_from(f"{order}Q" if big else f"{order}I", start, 8 if big else 4)
        file.seek(place)
        counter, entry = ("Q", f"{order}HHQ8s") if big else ("H", f"{order}HHI4s")
        (count,) = struct.unpack(order + counter, file.read(8 if big else 2))
        size = struct.calcsize(entry)
        directory = file.read(size * min(count, MAX_TAGS))
        found = {}
        for tag, kind, number, value in struct.iter_unpack(entry, directory):
            form = INTEGERS.get(kind)
            if tag not in wanted or form is None or not 0 < number <= MAX_VALUES:
                continue
            length = struct.calcsize(form) * number
            if length > len(value):
                file.seek(struct.unpack(f"{order}Q" if big else f"{order}I", value)[0])
                value = file.read(length)
            found[tag] = struct.unpack_from(f"{order}{number}{form}", value)
        return found
    return {}


def read_nodata(tag: Any) -> float | None:
    """The number in GDAL's tag; None where it holds none, or is missing."""
    try:
        number = float(str(tag).strip(" \0"))
    except ValueError:
        return None
    return number if math.isfinite(number) else None  # others never count as data


def count_scans(data: bytes) -> int:
    """Count the scans of a JPEG, up to `MAX_SCANS` + 1: a few bytes make a decoder process the whole image again."""
    scans = place = 0
    while scans <= MAX_SCANS and (found := JPEG_MARKER.search(data, place)) is not None:
        place, marker = found.end(), found[1][0]
        if marker == 0xD9:  # end of image: another file may follow
            break
        scans += marker == 0xDA
        if marker != 0xD8:
            place += int.from_bytes(data[place : place + 2], "big")  # a segment with its length
    return scans


def find_lossy(image: Image.Image, data: bytes) -> str:
    """The lossy compression of an image, by its content; empty if there is none."""
    if image.format in ("JPEG", "MPO"):
        return "JPEG"
    if image.format == "TIFF":
        return "JPEG" if image.info.get("compression") in ("jpeg", "tiff_jpeg") else ""
    place = 12  # after RIFF, a length and WEBP
    while image.format == "WEBP" and place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if name in (b"VP8 ", b"VP8L"):
            return "lossy WebP" if name == b"VP8 " else ""
        place += 8 + (16 if name == b"ANMF" else size + size % 2)  # a frame holds chunks of its own
    return ""
