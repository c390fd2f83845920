"""Photographs of every kind: bands, alpha, pages, and the limit of pixels."""

import io
import resource
import struct
import sys

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from samples import deep_png, encode, join_tiffs, png, quarters, tiff, with_chunks

from itpn.cli import main
from itpn.data.decode import PAGES, EncodedImage, UnreadableImage, decode_image
from itpn.data.formats.reader import read_size
from itpn.data.headers import has_pages
from itpn.data.masks import read_mask


def test_deeper_images_are_no_photographs():
    values = np.zeros((8, 8), np.uint16)
    colours = np.zeros((8, 8, 3), np.uint16)
    for data in (deep_png(values), deep_png(colours), tiff(values), tiff(colours), tiff(values.astype(np.float32))):
        with pytest.raises(UnreadableImage, match="more than 8 bits a channel"):
            decode_image(data)


# --- bands


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("bands", [3, 4])
def test_tiffs_are_read_right_or_refused(order, deflate, planar, bands):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 255, (6, 8, bands)).astype(np.uint8)
    want = values[..., :3]
    for extra in [None] if bands == 3 else [None, (0,)]:
        data = tiff(values, order, planar, deflate, extra)
        try:
            image = decode_image(data)
        except UnreadableImage as error:
            assert planar == 2, error  # noqa: PT017
            continue
        assert np.array_equal(image.permute(1, 2, 0).numpy(), want), extra


def test_only_a_declared_alpha_is_transparent():
    values = np.full((4, 4, 4), 100, np.uint8)
    values[..., 3] = 0
    for extra, want in {None: 100, (0,): 100, (2,): 255}.items():
        image = decode_image(tiff(values, extra=extra))
        assert image.unique().tolist() == [want], extra


def test_a_transparent_value_of_a_png_shows_white_at_every_depth():
    for bits, row, left in ((2, b"\x1b", [0, 85, 255, 255]), (4, b"\1\x23", [0, 17, 255, 51]), (8, b"\0\1\2\3", None)):
        data = with_chunks(png(4, 1, bits, 0, b"\0" + row), (b"tRNS", struct.pack(">H", 2)))
        assert decode_image(data)[0, 0].tolist() == (left or [0, 1, 255, 3]), bits


@pytest.mark.parametrize("extra", [1, 2])
def test_grey_with_alpha(extra):
    values = np.zeros((4, 4, 2), np.uint8)
    values[..., 1] = 51  # a fifth of black over white
    if extra == 1 and int(PIL.__version__.partition(".")[0]) < 13:  # which does not know premultiplied grey
        with pytest.raises(UnreadableImage, match="cannot be read"):
            decode_image(tiff(values, extra=(extra,)))
        return
    image = decode_image(tiff(values, extra=(extra,)))
    assert abs(int(image.unique()) - 204) <= 1


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((4, 4), np.float64),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 13), np.uint16),
        np.zeros((4, 4, 5), np.uint8),
    ],
)
def test_tiffs_that_cannot_be_read_say_so(values):
    with pytest.raises(UnreadableImage, match="TIFF of bands, a depth or a compression that cannot be read"):
        decode_image(tiff(values))


@pytest.mark.parametrize("order", ["<", ">"])
def test_signed_bytes_are_refused_not_taken_for_unsigned(order):
    values = np.arange(-128, 128, dtype=np.int8).reshape(16, 16)
    with pytest.raises(UnreadableImage, match="TIFF of signed 8 bits cannot be read"):
        decode_image(tiff(values, order))
    assert decode_image(tiff(values.view(np.uint8), order))[0, 0, 0] == 128


def test_cmyk_jpegs_with_and_without_adobes_marker():
    paper = encode(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG", quality=95)
    ink = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    red = torch.tensor([255, 0, 0])[:, None, None]
    assert decode_image(paper).min() > 250
    assert (decode_image(ink).int() - red).abs().max() < 12
    # without the marker, as libjpeg writes it for others than Adobe: ink is not inverted
    for data, want in (paper, torch.tensor(255)), (ink, red):
        place = data.index(b"\xff\xee")
        (length,) = struct.unpack(">H", data[place + 2 : place + 4])
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        plain = encode(Image.fromarray(255 - pixels, "CMYK"), "JPEG", quality=95)
        place = plain.index(b"\xff\xee")
        plain = plain[:place] + plain[place + 2 + length :]
        assert (decode_image(plain).int() - want).abs().max() < 12


# --- pages

GREY = np.full((8, 8), 7, np.uint8)


def page(kind: int | None = None, order: str = "<", tag: int = 254, form: int = 4) -> bytes:
    return tiff(GREY, order, tags=None if kind is None else {tag: (form, [kind])})


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ((None,), False),
        ((None, None), True),
        ((0, 0), True),
        ((2, 2), True),
        ((0, 1, 1), False),  # smaller copies
        ((None, 4), False),  # a mask
        ((0, 5), False),
        ((0, 1, 0), True),
    ],
)
def test_tiffs_of_several_pages_say_so(order, kinds, expected):
    image = EncodedImage(join_tiffs(*(page(kind, order) for kind in kinds)))
    assert Image.open(io.BytesIO(image.data)).n_frames == len(kinds)
    image.decode()
    assert image.warnings == ({"pages": PAGES} if expected else {})


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("tag", "form", "kind", "pages"), [(254, 3, 1, False), (254, 3, 2, True), (255, 3, 2, False)])
def test_smaller_copies_in_other_words(order, tag, form, kind, pages):
    assert has_pages(join_tiffs(page(None, order), page(kind, order, tag, form))) is pages


def test_pages_of_large_and_of_corrupt_tiffs():
    for big in (False, True):
        file = io.BytesIO()
        pages = [Image.new("L", (9, 9)) for _ in range(3)]
        pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:], big_tiff=big)
        assert has_pages(file.getvalue())
        file = io.BytesIO()
        pages[0].save(file, "TIFF", big_tiff=big)
        assert not has_pages(file.getvalue())
    joined = bytearray(join_tiffs(page(0), page(1)))
    end = joined.rindex(bytes(4) + GREY.tobytes())
    for place, want in ((8, True), (len(page(0)) + 8, False), (2**31, False)):  # back to the first, a ring, nowhere
        joined[end : end + 4] = struct.pack("<I", place)
        assert has_pages(bytes(joined)) is want
    assert not has_pages(b"II*\0")
    for kind in ((2, b"1"), (3, [1, 1])):  # text, and two numbers
        assert not has_pages(join_tiffs(page(), tiff(GREY, tags={254: kind})))
    large = bytearray(file.getvalue())
    end = 16 + 8 + 20 * struct.unpack_from("<Q", large, 16)[0]
    assert large[end : end + 8] == bytes(8)
    large[end : end + 8] = struct.pack("<Q", 2**64 - 1)
    assert not has_pages(bytes(large))


@pytest.mark.parametrize("workers", [0, 2])
def test_pages_are_said_once(tmp_path, capfd, workers):
    for name in ("a", "b", "c", "d"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / f"images/{name}.tif").write_bytes(join_tiffs(page(), page()))
    common = ("--data.root", tmp_path / "images", "--data.num-workers", workers, "--output-dir", tmp_path / "runs")
    for command in (
        ("train", "itpn-pixel_nano", *common, *TINY),
        ("shrink", tmp_path / "images", "--out", tmp_path / "small", "--num-workers", workers),
    ):
        assert run(*command) == 0
        lines = [line for line in "".join(capfd.readouterr()).splitlines() if "several pages" in line]
        assert len(lines) == 1
        assert lines[0].startswith("warning: ")
        assert lines[0].endswith(f".tif: {PAGES} (shown once, other images may have it too)")


# --- the limit of pixels


def large_png(side: int = 14000) -> bytes:
    """White, of 1 bit for each pixel."""
    row = b"\0" + b"\xff" * (side // 8)
    return png(side, side, 1, 0, row * side)


def test_the_limit_is_ours_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    data = encode(quarters(), "PNG")
    assert decode_image(data).shape == (3, 96, 128)
    (tmp_path / "a.png").write_bytes(data)
    assert read_size(str(tmp_path / "a.png")) == (96, 128)
    assert read_mask(str(tmp_path / "a.png")).shape == (96, 128, 3)
    assert Image.MAX_IMAGE_PIXELS == 40  # as it was, for others in this process
    for read_it in (lambda: decode_image(data, 9999), lambda: read_mask(str(tmp_path / "a.png"), 9999)):
        with pytest.raises(UnreadableImage, match=r"128x96 pixels, more than the 9999 allowed \(--data.max-pixels\)"):
            read_it()


def test_a_header_takes_no_memory(tmp_path):
    bombs = [png(60000, 60000, 8, 0, bytes(60001)), tiff(np.zeros((4, 4), np.uint8), tags={256: (4, [60000])})]
    bombs.append(encode(Image.new("RGB", (16000, 9000)), "WEBP", lossless=True, method=0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, bomb in enumerate(bombs):
        path = tmp_path / str(number)
        path.write_bytes(bomb)
        assert max(read_size(str(path))) >= 16000
        with pytest.raises(UnreadableImage):
            EncodedImage(bomb, 2**17)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert taken * (1 if sys.platform == "darwin" else 1024) < 100e6


# --- what commands say


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


TINY = ("--data.img-size", 32, "--data.batch-size", 4, "--trainer.accelerator", "cpu", "--trainer.max-steps", 2)


def test_images_that_are_too_large_say_so(tmp_path, capfd):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(large_png(400))
    options = ("--data.root", tmp_path / "images", "--data.num-workers", 0, "--output-dir", tmp_path / "runs", *TINY)
    assert run("train", "itpn-pixel_nano", *options, "--data.max-pixels", 1000) == 2
    expected = "".join(capfd.readouterr())
    assert "400x400 pixels, more than the 1000 allowed (--data.max-pixels)" in expected
    assert "none of 1 images" in expected


def test_more_pixels_than_pillow_allows(tmp_path, capfd, monkeypatch):
    """As the option says, in a worker process too; Pillow's limit is lowered, for want of memory for large images."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(large_png(400))
    options = ("--data.root", tmp_path / "images", "--data.num-workers", 1, "--output-dir", tmp_path / "runs", *TINY)
    assert run("train", "itpn-pixel_nano", *options, "--data.max-pixels", 160_000) == 0
    assert "0 files skipped" in "".join(capfd.readouterr())


def test_197_megapixels_are_opened():
    """More than Pillow allows by itself."""
    assert EncodedImage(large_png(), 10**9).width == 14000
    with pytest.raises(UnreadableImage, match="14000x14000 pixels"):
        EncodedImage(large_png())
