"""Values of more than 8 bits: scaling to 8, and the warnings about it."""

import io
import resource
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from samples import deep_png, encode, exif, join_tiffs, png, quarters, tiff, with_chunks

from itpn.cli import main
from itpn.data.decode import PAGES, EncodedImage, UnreadableImage, decode_image
from itpn.data.formats.reading import read_size
from itpn.data.headers import has_pages
from itpn.data.masks import read_mask

RAMP = np.linspace(0, 1, 48, dtype=np.float64)[None].repeat(48, 0)
NODATA = 42113


def read(data: bytes) -> tuple[torch.Tensor, str | None]:
    image = EncodedImage(data)
    return image.decode(), image.warnings.get("values")


def ramp(low: float, high: float, dtype: type, holes: float | None = None) -> np.ndarray:
    values = (low + RAMP * (high - low)).astype(dtype)
    if holes is not None:
        values[:4, :4] = holes
    return values


def levels(image: torch.Tensor) -> int:
    return len(image[0].unique())


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", [np.float32])
@pytest.mark.parametrize("holes", [-9999.0, -3.4e38, -32768.0, 1e20, np.nan, np.inf, -np.inf])
def test_pixels_without_data_do_not_take_the_contrast(order, dtype, holes):
    image, warning = read(tiff(ramp(1500, 1800, dtype, holes), order))
    assert 46 <= levels(image) <= 48
    assert (int(image.min()), int(image.max())) == (0, 255)
    assert image[:, :4, :4].max() == 0
    assert torch.equal(image[0, 47], torch.from_numpy((RAMP[47] * 255).round().astype(np.uint8)))
    assert warning is not None
    assert "between 1500 and 1800 (16 NaN, infinite or nodata left out)" in warning


@pytest.mark.parametrize("tag", [b"7\0", b"7.0 \0", b"7"])
def test_the_tag_says_what_stands_for_no_data(tag):
    values = ramp(1500, 1800, np.float32, 7)
    image, warning = read(tiff(values, tags={NODATA: (2, tag)}))
    assert levels(image) >= 46
    assert "between 1500 and 1800" in str(warning)
    image, warning = read(tiff(values))  # without it, 7 is a value
    assert "between 7 and 1800" in str(warning)
    image, warning = read(tiff(ramp(-9999, 1800, np.float32), tags={NODATA: (2, b"nan\0")}))
    assert "between -9999 and 1800:" in str(warning)  # declared, so no other value stands for none


def test_no_valid_value_at_all():
    for values in (np.full((8, 8), np.nan, np.float32), np.full((8, 8), -9999, np.float32)):
        image, warning = read(tiff(values))
        assert image.max() == 0
        assert "no valid value" in str(warning)


FLOATS = {  # least, greatest -> greatest of 8 bits, warning
    (0, 1): (255, None),
    (0, 1.02): (255, "between 0 and 1.02: taken as 0 to 1.02"),
    (0, 1.6): (255, "between 0 and 1.6: taken as 0 to 1.6"),
    (0.1, 0.6): (153, None),
    (0, 0.2): (51, "between 0 and 0.2: taken as 0 to 1"),
    (0, 255): (255, None),
    (0, 250.5): (250, None),
    (0, 9.5): (255, "between 0 and 9.5: stretched"),
    (-1, 1): (255, "between -1 and 1: stretched"),
    (0, 65535): (255, "between 0 and 65535: stretched"),
}


@pytest.mark.parametrize("span", FLOATS)
def test_floats(span):
    greatest, expected = FLOATS[span]
    image, warning = read(tiff(ramp(*span, np.float32)))
    assert abs(int(image.max()) - greatest) <= 1
    assert levels(image) >= 46
    assert (warning is None) if expected is None else (expected in str(warning))


INTEGERS = {  # type, least, greatest, value of holes -> grey levels, warning
    (np.int32, 0, 255, None): (48, "between 0 and 255: taken as 8 bits"),
    (np.int32, 0, 150, None): (48, "between 0 and 150: taken as 8 bits"),
    (np.int32, 0, 10**9, None): (48, "stretched"),
    (np.uint32, 0, 4 * 10**9, None): (48, "between 0 and 4e+09: stretched"),
    (np.int16, -500, 4000, -32768): (48, "between -500 and 4000 (16 NaN, infinite or nodata left out): stretched"),
    (np.int16, 0, 10000, -9999): (48, "between 0 and 10000 (16"),
}


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_of_unknown_range(kind):
    least, expected = INTEGERS[kind]
    dtype, low, high, holes = kind
    for order in "<>" if dtype is not np.uint32 else "<":
        image, warning = read(tiff(ramp(low, high, dtype, holes), order))
        assert levels(image) >= least - 1
        assert expected in str(warning)


@pytest.mark.parametrize(
    ("high", "expected"),
    [
        (255, "between 0 and 255 of 65535 (8 bits end at 255)"),
        (1023, "between 0 and 1023 of 65535 (10 bits end at 1023)"),
        (4095, "between 0 and 4095 of 65535 (12 bits end at 4095)"),
        (16383, "between 0 and 16383 of 65535 (14 bits end at 16383)"),
        (5, "between 0 and 5 of 65535 (3 bits"),
        (40000, None),
        (65535, None),
    ],
)
def test_16_bits_are_divided_and_those_hardly_used_are_named(high, expected):
    values = ramp(0, high, np.uint16)
    colours = np.stack([values, values // 2, values], axis=-1)
    alpha = np.full_like(values, 65535)
    for data in (
        deep_png(values),
        tiff(values),
        tiff(values, ">", deflate=True),
        deep_png(colours),
        tiff(colours),
        deep_png(np.dstack([colours, alpha])),  # whose range does not count
        deep_png(np.stack([values, alpha], axis=-1)),
    ):
        image, warning = read(data)
        assert int(image.max()) == high >> 8
        if expected is None:
            assert warning is None
        elif high > 255:
            assert f"of 65535 ({expected.partition('(')[2]}" in str(warning)
    for data in (deep_png(values), tiff(values)):
        assert (expected or "None") in str(read(data)[1])


def test_a_narrow_range_of_high_values_is_named():
    assert "between 30000 and 34000 of 65535:" in str(read(deep_png(ramp(30000, 34000, np.uint16)))[1])
    values = ramp(0, 4095, np.uint16, 65535)
    image, warning = read(tiff(values, tags={NODATA: (2, b"65535\0")}))
    assert "between 0 and 4095 of 65535" in str(warning)
    assert image[:, :4, :4].max() == 0


def containers(values: np.ndarray, nodata: bytes | None = None) -> list[bytes]:
    """Grey and colours of 16 bits as PNG and TIFF; the tag, which PNG lacks, in TIFF alone."""
    tags = {NODATA: (2, nodata)} if nodata else None
    colours = np.stack([values, values, values], axis=-1)
    made = [tiff(values, tags=tags), tiff(colours, tags=tags)]
    return made if tags else [*made, deep_png(values), deep_png(colours)]


@pytest.mark.parametrize("side", [8, 48, 300])
@pytest.mark.parametrize(
    ("low", "high", "other", "part", "nodata"),
    [
        (0, 4095, 65535, 0.0, None),  # one hot pixel
        (0, 4095, 60000, 0.0, None),
        (0, 4095, 60000, 0.0009, None),
        (29952, 34047, 0, 0.0, None),  # a dead one
        (0, 4095, 65535, 0.3, None),  # no data, undeclared
        (0, 4095, 65535, 0.3, b"65535\0"),
        (0, 4095, 50000, 0.3, b"50000\0"),
        (29952, 34047, 0, 0.3, b"0\0"),
        (0, 255, 65535, 0.0, None),  # 8 bits in 16
    ],
)
def test_a_few_other_values_do_not_hide_a_narrow_range(side, low, high, other, part, nodata):
    values = np.linspace(low, high, side * side).astype(np.uint16).reshape(side, side)
    count = max(1, int(part * values.size))
    values.ravel()[1 + np.random.default_rng(0).permutation(values.size - 2)[:count]] = other  # not the ends
    for data in containers(values, nodata):
        warning = str(read(data)[1])
        assert f" and {high} of 65535" in warning, warning
        assert warning.startswith("all but") is (nodata is None), warning


@pytest.mark.parametrize("side", [8, 48, 300])
def test_ordinary_images_of_16_bits_need_no_remark(side):
    rng = np.random.default_rng(0)
    full = np.linspace(0, 65535, side * side).reshape(side, side)
    dark = full / 20
    dark[: side // 8] = 50000  # a lamp at night
    paper = np.where(rng.random((side, side)) < 0.1, 0, 65535)  # two values
    scan = np.where(full < 20000, full, 65535)  # saturated
    page = np.full((side, side), 65535)
    page[0, : max(1, side * side // 1250)] = np.arange(max(1, side * side // 1250)) % 500  # black ink
    product = np.where(full < 12000, full, 65535)  # dark, before saturated white
    for values in (full, full**2 / 65535, full.clip(20000, 40000), dark, paper, scan, page, product, full.clip(65534)):
        for data in containers(values.astype(np.uint16)):
            assert read(data)[1] is None
        assert read(tiff(values.astype(np.uint16), tags={NODATA: (2, b"nan\0")}))[1] is None


def test_images_of_one_value_and_of_8_bits_need_no_remark():
    for data in (
        deep_png(np.zeros((8, 8), np.uint16)),
        deep_png(np.full((8, 8), 65535, np.uint16)),
        tiff(np.full((8, 8), 0.5, np.float32)),
        tiff(np.full((8, 8), 5, np.float32)),
        encode(Image.new("L", (8, 8), 3), "PNG"),
        encode(quarters().point(lambda value: value // 32), "PNG"),
        encode(quarters(), "JPEG"),
    ):
        assert read(data)[1] is None


def test_12_bits_that_the_file_declares_are_all_of_them():
    values = np.arange(0, 4096, 16, dtype=np.uint16)[None].repeat(4, 0)
    first, second = values[:, ::2], values[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1).astype(np.uint8)
    image, warning = read(tiff(packed.reshape(4, -1), bits=12))
    assert torch.equal(image[0, 0], torch.arange(256, dtype=torch.uint8))
    assert warning is None


def test_white_is_zero():
    values = ramp(0, 65535, np.uint16)
    for order in "<":
        image = decode_image(tiff(values, order, tags={262: (3, [0])}))
        assert torch.equal(image[0, 0], 255 - torch.from_numpy((values[0] >> 8).astype(np.uint8)))
    image = decode_image(tiff(ramp(0, 1, np.float32, np.nan), tags={262: (3, [0])}))
    assert int(image[0, 47, 0]) == 255
    assert int(image[0, 47, 47]) == 0
    assert int(image[0, 0, 0]) == 0  # no data


# --- bands


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("bands", [3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiffs_are_read_right_or_refused(order, deflate, planar, bands, dtype):
    rng = np.random.default_rng(0)
    values = rng.integers(0, np.iinfo(dtype).max, (6, 8, bands)).astype(dtype)
    want = (values if dtype is np.uint8 else values >> 8)[..., :3].astype(np.uint8)
    for extra in [None] if bands == 3 else [None, (0,)]:
        data = tiff(values, order, planar, deflate, extra)
        try:
            image = decode_image(data)
        except UnreadableImage as error:
            assert planar == 2, error  # noqa: PT017
            continue
        assert np.array_equal(image.permute(1, 2, 0).numpy(), want), extra
    if planar == 2 and dtype is np.uint16 and not deflate:
        with pytest.raises(UnreadableImage, match="TIFF of separate planes with 16 bits"):
            decode_image(tiff(values, order, planar, deflate))


def test_only_a_declared_alpha_is_transparent():
    values = np.full((4, 4, 4), 100, np.uint8)
    values[..., 3] = 0
    for extra, want in {None: 100, (0,): 100, (2,): 255}.items():
        image = decode_image(tiff(values, extra=extra))
        assert image.unique().tolist() == [want], extra
        image = decode_image(tiff(values.astype(np.uint16) << 8, extra=extra))
        assert image.unique().tolist() == [want], extra


def test_a_transparent_value_of_a_png_shows_white_at_every_depth():
    values = np.array([[0, 300, 1000, 65535], [1000, 1001, 40000, 2]], np.uint16)
    grey = with_chunks(deep_png(values), (b"tRNS", struct.pack(">H", 1000)))
    turned = with_chunks(grey, (b"eXIf", exif(3)))
    for data in (grey, turned):
        image = decode_image(data)[0]
        assert (image if data is grey else image.flip(0, 1)).tolist() == [[0, 1, 255, 255], [255, 3, 156, 0]]
    transparent = with_chunks(deep_png(ramp(0, 4095, np.uint16, 65535)), (b"tRNS", struct.pack(">H", 65535)))
    image, warning = read(transparent)
    assert image[:, :4, :4].min() == 255
    assert str(warning).startswith("its values lie between 0 and 4095 of 65535")
    colours = np.stack([values, values[::-1], values], axis=-1)
    encoded = EncodedImage(with_chunks(deep_png(colours), (b"tRNS", struct.pack(">HHH", 0, 1000, 0))))
    want = (colours >> 8).astype(np.uint8)
    want[0, 0] = 255  # (0, 1000, 0) is transparent, (1000, 0, 1000) is not
    for _ in range(2):
        assert np.array_equal(encoded.decode().permute(1, 2, 0).numpy(), want)
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
def test_one_warning_of_pages_beside_one_of_values(folder, tmp_path, capfd, workers):
    for name in ("a/page", "b/page"):
        (folder / f"{name}.tif").write_bytes(join_tiffs(page(), page()))
    common = ("--data.root", folder, "--data.num-workers", workers, "--output-dir", tmp_path / "runs")
    for command in (
        ("train", "itpn-pixel_nano", *common, *TINY[:-1], 3, "--name", "p"),
        ("shrink", folder, "--out", tmp_path / "small", "--num-workers", workers),
    ):
        assert run(*command) == 0
        expected = "".join(capfd.readouterr())
        assert_one_warning(expected)
        lines = [line for line in expected.splitlines() if "several pages" in line]
        assert len(lines) == 1
        assert lines[0].startswith("warning: ")
        assert lines[0].endswith(f"page.tif: {PAGES} (shown once, other images may have it too)")


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


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of images of 12 bits in 16."""
    for name in ("images/a", "images/b"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(4):
            (tmp_path / name / f"{number}.png").write_bytes(deep_png(ramp(0, 4095, np.uint16)))
    return tmp_path / "images"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def assert_one_warning(text: str) -> None:
    lines = [line for line in text.splitlines() if "65535" in line]
    assert len(lines) == 1, text
    assert lines[0].startswith("warning: ")
    assert ".png: its values lie between 0 and 4095 of 65535" in lines[0]


TINY = ("--data.img-size", 32, "--data.batch-size", 4, "--trainer.accelerator", "cpu", "--trainer.max-steps", 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_warning_in_training_and_prediction(folder, tmp_path, capfd, workers):
    common = ("--data.root", folder, "--data.num-workers", workers, "--output-dir", tmp_path / "runs")
    assert run("train", "itpn-pixel_nano", *common, *TINY, "--name", "a") == 0
    assert_one_warning("".join(capfd.readouterr()))
    weights = next((tmp_path / "runs").glob("*/a/model.safetensors"))
    assert run("predict", weights, folder, "--out", tmp_path / "out") == 0
    assert_one_warning("".join(capfd.readouterr()))


def test_one_warning_in_evaluation(folder, tmp_path, capfd):
    common = ("--data.root", folder, "--data.num-workers", 1, "--data.val-fraction", 0.5)
    options = ("--output-dir", tmp_path / "runs", "--name", "c", "--model.name", "itpn_nano", "--model.patch-size", 8)
    options += ("--model.scratch",)
    assert run("train", "classifier_small", *common, *TINY, *options) == 0
    assert_one_warning("".join(capfd.readouterr()))
    weights = next((tmp_path / "runs").glob("*/c/model.safetensors"))
    evaluation = ("--checkpoint", weights, "--out", tmp_path / "evaluation", *common, "--trainer.accelerator", "cpu")
    assert run("evaluate", "classifier_small", *evaluation) == 0
    assert_one_warning("".join(capfd.readouterr()))


@pytest.mark.parametrize("workers", [0, 2])
def test_one_warning_and_a_limit_in_shrinking(folder, tmp_path, capfd, workers):
    assert run("shrink", folder, "--out", tmp_path / "small", "--num-workers", workers) == 0
    assert_one_warning("".join(capfd.readouterr()))
    assert run("shrink", folder, "--out", tmp_path / "none", "--num-workers", workers, "--max-pixels", 999) == 2
    assert "48x48 pixels, more than the 999 allowed" in "".join(capfd.readouterr())


def test_images_of_shards_are_named(folder, tmp_path, capfd):
    with tarfile.open(tmp_path / "train-0.tar", "w") as shard:
        for path in sorted(folder.glob("*/*.png")):
            shard.add(path, f"{path.parent.name}{path.name}")
    options = ("--data.num-workers", 0, "--output-dir", tmp_path / "runs", "--name", "s")
    assert run("train", "itpn-pixel_nano", "--data.root", tmp_path / "train-0.tar", *options, *TINY) == 0
    assert_one_warning("".join(capfd.readouterr()))


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
