"""Image files made on the spot: an image of four colours, and containers that Pillow does not write."""

import io
import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image

RED, GREEN, BLUE, YELLOW = (208, 28, 28), (51, 191, 71), (22, 42, 183), (239, 219, 49)
HEIGHT, WIDTH = 96, 128
XMP_HEADER = b"http://ns.adobe.com/xap/1.0/\0"


def quarters(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2], pixels[: height // 2, width // 2 :] = RED, GREEN
    pixels[height // 2 :, : width // 2], pixels[height // 2 :, width // 2 :] = BLUE, YELLOW
    return Image.fromarray(pixels)


def quarter_colors(image: torch.Tensor) -> torch.Tensor:
    """[3, H, W] -> [4, 3]: the colours in the middle of top left, top right, bottom left, bottom right."""
    rows, columns = (torch.tensor([n // 4, n * 3 // 4]) for n in image.shape[1:])
    return image[:, rows][:, :, columns].flatten(1).T.int()


def assert_quarters(image: torch.Tensor, tolerance: int = 10) -> None:
    assert image.dtype == torch.uint8
    difference = quarter_colors(image) - torch.tensor([RED, GREEN, BLUE, YELLOW])
    assert difference.abs().max() <= tolerance, quarter_colors(image)


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, bits: int, color_type: int, rows: bytes) -> bytes:
    """A PNG of a kind that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits from [height, width] or [height, width, channels]."""
    bands = 1 if values.ndim == 2 else values.shape[2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(values.shape[1], values.shape[0], 16, {1: 0, 2: 4, 3: 2, 4: 6}[bands], rows)


# --- metadata


def exif(orientation: int, order: str = "<", kind: int = 3, count: int = 1, entries: int = 1) -> bytes:
    """A block of EXIF with the one entry, and ``entries`` promised; ``kind`` 3 is SHORT, 4 LONG."""
    value = struct.pack(order + {1: "B", 3: "H", 4: "I", 9: "i"}.get(kind, "I"), orientation).ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, entries)
    return head + struct.pack(f"{order}HHI", 274, kind, count) + value + bytes(4)


def xmp(orientation: object, element: bool = False, prefix: str = "tiff", quote: str = '"') -> bytes:
    """A packet of XMP with the orientation as an attribute, or as an element."""
    inside = f"<{prefix}:Orientation>{orientation}</{prefix}:Orientation>"
    attribute = "" if element else f" {prefix}:Orientation={quote}{orientation}{quote}"
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:{prefix}="http://ns.adobe.com/tiff/1.0/"{attribute}>'
        f"{inside if element else ''}</rdf:Description></rdf:RDF></x:xmpmeta>"
    ).encode()


def with_segments(jpeg: bytes, *segments: bytes, marker: int = 0xE1) -> bytes:
    """A JPEG with APP1 segments right after its start."""
    return jpeg[:2] + b"".join(struct.pack(">BBH", 0xFF, marker, len(one) + 2) + one for one in segments) + jpeg[2:]


def with_chunks(data: bytes, *chunks: tuple[bytes, bytes], after: bool = False) -> bytes:
    """A PNG with chunks (name, data) before its pixels, or after them."""
    place = data.index(b"IEND" if after else b"IDAT") - 4
    return data[:place] + b"".join(png_chunk(*chunk) for chunk in chunks) + data[place:]


def with_riff_chunk(webp: bytes, name: bytes, data: bytes, size: tuple[int, int]) -> bytes:
    """A WebP of (height, width) with a chunk of metadata after its pixels."""
    flags = {b"EXIF": 8, b"XMP ": 4}[name]
    height, width = size
    head = struct.pack("<IBBBB", flags, 0, 0, 0, 0)[:4]
    head += struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    chunk = name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + head + webp[12:] + chunk
    return b"RIFF" + struct.pack("<I", len(body)) + body


def join_tiffs(*files: bytes) -> bytes:
    """A TIFF of several pages from some that `tiff` makes, of one byte order."""
    order = "<" if files[0][:2] == b"II" else ">"
    joined = bytearray()
    link = 0  # to the page that follows
    for file in files:
        place = len(joined)
        joined += file if not place else bytes(8) + file[8:]  # places inside are moved below
        (entries,) = struct.unpack_from(f"{order}H", file, 8)
        for entry in range(place + 10, place + 10 + 12 * entries, 12):
            tag, kind, count, value = struct.unpack_from(f"{order}HHII", joined, entry)
            if tag == 273 or {2: 1, 3: 2, 4: 4, 7: 1}[kind] * count > 4:
                assert tag != 273 or count == 1
                struct.pack_into(f"{order}I", joined, entry + 8, value + place)
        if place:
            struct.pack_into(f"{order}I", joined, link, place + 8)
        link = place + 10 + 12 * entries
    return bytes(joined)


def tiff(
    values: np.ndarray,
    order: str = "<",
    planar: int = 1,
    deflate: bool = False,
    extra: Sequence[int] | None = None,
    bits: int | None = None,
    tags: Mapping[int, tuple[int, Sequence[int] | bytes]] | None = None,
) -> bytes:
    """A TIFF of one strip a plane, of a kind that Pillow does not write.

    Args:
        values: [height, width] or [height, width, channels].
        extra: the tag ExtraSamples.
        bits: of a sample, where the data are packed already.
        tags: others, by number: type (2 for text, 3 for SHORT, 4 for LONG, 7 for bytes) and values.
    """
    values = values[..., None] if values.ndim == 2 else values
    height, width, bands = values.shape
    planes = [values] if planar == 1 else [values[..., band] for band in range(bands)]
    strips = [plane.astype(plane.dtype.newbyteorder(order)).tobytes() for plane in planes]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    entries: dict[int, tuple[int, Sequence[int] | bytes]] = {
        256: (4, [width if bits is None else width * 8 * values.itemsize // bits]),
        257: (4, [height]),
        258: (3, [bits or 8 * values.itemsize] * bands),
        259: (3, [8 if deflate else 1]),
        262: (3, [2 if bands > 2 else 1]),
        277: (3, [bands]),
        278: (4, [height]),
        284: (3, [planar]),
        339: (3, [{"u": 1, "i": 2, "f": 3}[values.dtype.kind]] * bands),
        **({} if extra is None else {338: (3, extra)}),
        **(tags or {}),
    }
    entries |= {273: (4, [0] * len(strips)), 279: (4, [len(strip) for strip in strips])}
    size, letters = {2: 1, 3: 2, 4: 4, 7: 1}, {3: "H", 4: "I"}
    outside = sum((len(v) * size[k] + 1) // 2 * 2 for k, v in entries.values() if len(v) * size[k] > 4)
    begin = 8 + 2 + 12 * len(entries) + 4
    places = np.cumsum([begin + outside, *map(len, strips)]).tolist()[:-1]
    entries[273] = (4, places)
    table, blobs = b"", b""
    for tag, (kind, content) in sorted(entries.items()):
        packed = content if isinstance(content, bytes) else struct.pack(order + letters[kind] * len(content), *content)
        field = packed.ljust(4, b"\0")
        if len(packed) > 4:
            field = struct.pack(f"{order}I", begin + len(blobs))
            blobs += packed + b"\0" * (len(packed) % 2)
        table += struct.pack(f"{order}HHI", tag, kind, len(content)) + field
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return head + table + bytes(4) + blobs + b"".join(strips)
