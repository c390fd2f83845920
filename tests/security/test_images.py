"""Rows of docs/security.md: image files of each format, and masks."""

import functools
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from security.attack import limited, refused

from itpn.data.decode import EncodedImage, UnreadableImage, decode_image
from itpn.data.formats.reader import read_size
from itpn.data.headers import MAX_SCANS, count_scans
from itpn.data.masks import read_mask
from itpn.data.readers import MAX_FILE, FileReader


def decode(data: bytes):
    """Shape of a decoded image, or why there is none."""
    try:
        return tuple(decode_image(data).shape)
    except UnreadableImage as error:
        return str(error)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def make_png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 + width)) if width * height <= 4096 else zlib.compress(bytes(2**20))
    rows = zlib.compress((bytes(1 + width)) * height) if width * height <= 4096 else rows
    parts = [png_chunk(b"IHDR", header), *(png_chunk(*one) for one in chunks), png_chunk(b"IDAT", rows)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + png_chunk(b"IEND", b"")


def make_tiff(tags: list[tuple[int, int, int, int]], after: bytes = b"", following: int = 0) -> bytes:
    """A little-endian TIFF of one directory; a tag is (number, type, count, value)."""
    body = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + struct.pack("<I", following) + after


def saved(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


GREY = Image.new("L", (8, 8))
BASIC = [
    (256, 4, 1, 8),
    (257, 4, 1, 8),
    (258, 3, 1, 8),
    (259, 3, 1, 1),
    (262, 3, 1, 1),
    (273, 4, 1, 8),
    (279, 4, 1, 64),
]


@pytest.mark.parametrize("form", ["EPS", "PCX", "TGA", "ICO", "PPM", "SGI", "DDS", "IM", "SPIDER", "MSP", "XBM"])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_formats_are_a_closed_list(tmp_path, monkeypatch, form, suffix):
    def run(*_, **__):
        (tmp_path / "canary").touch()
        raise OSError

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)  # a program that Pillow runs on such files
    image = {"MSP": GREY.convert("1"), "XBM": GREY.convert("1"), "SPIDER": GREY.convert("F")}.get(form, GREY)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(saved(image, form))
    assert decode(path.read_bytes()) == "not an image of a known format"
    with pytest.raises(UnreadableImage):
        read_mask(str(path))
    with pytest.raises(UnreadableImage):
        read_size(str(path))
    assert not (tmp_path / "canary").exists()


def bombs() -> dict[str, bytes]:
    """Files of a few kilobytes whose headers claim more pixels than any machine has memory for."""
    jpeg = bytearray(saved(GREY, "JPEG"))
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = struct.pack(">HH", 65500, 65500)
    gif = bytearray(saved(GREY, "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    bmp = bytearray(saved(GREY, "BMP"))
    bmp[18:26] = struct.pack("<ii", 10**6, 10**6)
    webp = bytearray(saved(GREY.convert("RGB"), "WEBP", lossless=True))
    place = webp.index(b"VP8L") + 9
    webp[place : place + 4] = struct.pack("<I", 16383 | 16383 << 14)
    sides = [(256, 4, 1, 10**6), (257, 4, 1, 10**6), *BASIC[2:]]
    return {
        "png": make_png(10**6, 10**6),
        "jpg": bytes(jpeg),
        "gif": bytes(gif),
        "bmp": bytes(bmp),
        "webp": bytes(webp),
        "tif": make_tiff(sides, bytes(64)),
    }


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "tif"])
def test_a_bomb_is_found_out_from_its_header(tmp_path, suffix):
    data = bombs()[suffix]
    assert len(data) < 10_000
    answer, _ = limited(decode, data, memory=2**28)
    assert isinstance(answer, str)
    (tmp_path / f"x.{suffix}").write_bytes(data)
    answer, _ = limited(read_mask, str(tmp_path / f"x.{suffix}"), memory=2**28)
    assert answer.startswith("UnreadableImage(")


def test_a_folder_of_bombs_is_refused(tmp_path):
    folder = tmp_path / "bombs"
    folder.mkdir()
    for suffix, data in bombs().items():
        (folder / f"x.{suffix}").write_bytes(data)
    line = refused("shrink", folder, "--out", tmp_path / "small", "--num-workers", "0", memory=2**29)
    assert str(folder) in line or "unreadable" in line or "broken" in line


@functools.cache
def pack_zeros() -> bytes:
    """A gigabyte in a megabyte."""
    packed = zlib.compressobj(9)
    return b"".join(packed.compress(bytes(2**24)) for _ in range(64)) + packed.flush()


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP", "many texts"])
def test_text_and_profiles_of_a_png_stay_packed(kind):
    zeros, text = pack_zeros(), zlib.compress(bytes(2**20 - 9))
    chunks = {
        "zTXt": [(b"zTXt", b"a\0\0" + zeros)],
        "iTXt": [(b"iTXt", b"a\0\1\0\0\0" + zeros)],
        "iCCP": [(b"iCCP", b"a\0\0" + zeros)],
        "many texts": [(b"zTXt", b"a%d\0\0" % i + text) for i in range(1000)],
    }[kind]
    answer, _ = limited(decode, make_png(8, 8, *chunks), memory=2**28)
    assert answer == (3, 8, 8) or isinstance(answer, str)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_many_frames_one_is_decoded(form):
    frame = Image.new("L", (1000, 1000))
    if form == "GIF":  # 65,000 more frames, a few bytes each
        one = saved(frame, "GIF")
        start = one.index(b"\x2c")
        data = one[:-1] + one[start:-1] * (65_000_000 // len(one)) + one[-1:]
    else:
        frames = [Image.new("L", (1000, 1000), value) for value in range(200)]
        options = {"TIFF": {"compression": "tiff_lzw"}}.get(form, {})
        data = saved(frames[0], form, save_all=True, append_images=frames[1:], **options)
    answer, _ = limited(decode, data, memory=2**28)
    assert answer == (3, 1000, 1000)


@pytest.mark.parametrize("kind", ["loop", "huge count", "many tags", "nested", "samples"])
def test_directories_of_a_tiff(kind):
    data = {
        "loop": make_tiff([*BASIC, (34665, 4, 1, 8), (330, 4, 1, 8)], bytes(64), following=8),
        "huge count": make_tiff([*BASIC, (305, 2, 2**32 - 1, 100), (700, 7, 2**31, 100)], bytes(64)),
        "many tags": make_tiff([*BASIC, *((40000 + i % 20000, 4, 1, i) for i in range(60000))], bytes(64)),
        "nested": make_tiff([*BASIC, *((40000 + i, 12, 2**28, 8) for i in range(1000))], bytes(64)),
        "samples": make_tiff([*BASIC, (277, 3, 1, 65535)], bytes(64)),
    }[kind]
    answer, _ = limited(decode, data, memory=2**28)
    assert answer == (3, 8, 8) or isinstance(answer, str)


def make_scans(scans: int, side: int = 4000) -> bytes:
    """A progressive JPEG whose scans say that nothing changes, in a few bytes each."""
    data = saved(Image.new("L", (side, side)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def test_scans_of_a_jpeg_are_counted():
    plain = saved(Image.effect_noise((64, 64), 80), "JPEG", progressive=True)
    assert 2 <= count_scans(plain) <= 12
    film = plain + make_scans(2 * MAX_SCANS)  # what phones put behind a photograph is not decoded
    assert count_scans(film) == count_scans(plain)
    assert decode(film) == (3, 64, 64)
    data = make_scans(100_000)
    assert len(data) < 2**26
    answer, _ = limited(decode, data)
    assert answer == f"a JPEG of more than {MAX_SCANS} scans, each of which takes the time of an image"


def test_scans_hidden_behind_a_comment_are_counted():
    plain = saved(Image.effect_noise((64, 64), 80), "JPEG", progressive=True)
    hidden = plain[:2] + b"\xff\xfe\x00\x06\xff\xd9\xff\xd9" + plain[2:]
    assert count_scans(hidden) == count_scans(plain)


def test_a_large_file_is_not_read(tmp_path):
    with (tmp_path / "x.jpg").open("wb") as file:
        file.truncate(100 * 2**30)  # sparse: it takes no room on disk
    (_, answer), _ = limited(read_one, str(tmp_path / "x.jpg"), memory=2**28)
    assert answer == f"{100 * 2**30:,} bytes, more than the {MAX_FILE:,} that are read"


def read_one(path: str):
    name, data = FileReader([path])[0]
    return name, str(data)


@pytest.mark.parametrize("kind", ["pipe", "device", "socketless link", "loop"])
def test_what_is_no_file_does_not_block(tmp_path, photo, kind):
    place = photo.parent / "x.jpg"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    elif kind == "loop":
        place.symlink_to(place)
        (photo.parent / "again").symlink_to(photo.parent)
    else:
        place.symlink_to(tmp_path / "nowhere")
    code, printed = limited(shrink_folder, str(photo.parent), str(tmp_path / "small"))
    if kind in ("pipe", "device"):
        assert code == 0, printed
        assert refused("shrink", place, "--out", tmp_path / "other").endswith("or tar shards")
    (_, answer), _ = limited(read_one, str(place))
    assert answer in ("not a regular file", "No such file or directory", "Too many levels of symbolic links")


def shrink_folder(folder: str, out: str) -> int:
    from itpn.cli import main

    return main(["shrink", folder, "--out", out, "--num-workers", "0"])


def test_a_mask_is_read_as_the_image_it_is(tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "x.png")
    assert read_mask(str(tmp_path / "x.png"))[7, 7] == 63
    assert EncodedImage((tmp_path / "x.png").read_bytes()).format == "PNG"
    assert Path("/dev/zero").exists()
