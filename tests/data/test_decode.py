"""Every kind of file a folder may hold: colours as a person sees them, or a refusal with a reason."""

import csv
import errno
import io
import multiprocessing
import os
import resource
import struct
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from samples import BLUE, GREEN, HEIGHT, RED, WIDTH, YELLOW, assert_quarters, encode, png, quarter_colors, quarters
from torchvision.io import decode_jpeg
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from itpn.data import decode
from itpn.data.decode import EncodedImage, UnreadableImage, decode_image, open_image
from itpn.data.image_type import ImageType
from itpn.data.samples import open_sample, type_of

SHARED = Path(__file__).parents[3] / "shared" / "data"


def rows_of_16_bits(image: Image.Image) -> bytes:
    """PNG rows, each after its filter type 0, with every byte twice: v becomes v * 257."""
    return b"".join(b"\0" + row.repeat(2).tobytes() for row in np.asarray(image).reshape(image.height, -1))


ENCODINGS = {
    "jpeg": lambda: encode(quarters(), "JPEG", quality=95),
    "progressive jpeg": lambda: encode(quarters(), "JPEG", quality=95, progressive=True),
    "cmyk jpeg": lambda: encode(quarters().convert("CMYK"), "JPEG", quality=95),
    "jpeg of two images": lambda: encode(
        quarters(), "MPO", quality=95, save_all=True, append_images=[ImageOps.invert(quarters())]
    ),
    "jpeg with garbage behind": lambda: encode(quarters(), "JPEG", quality=95) + b"garbage" * 99,
    "png": lambda: encode(quarters(), "PNG"),
    "palette png": lambda: encode(quarters().quantize(16), "PNG"),
    "webp": lambda: encode(quarters(), "WEBP", quality=95),
    "bmp": lambda: encode(quarters(), "BMP"),
    "tiff": lambda: encode(quarters(), "TIFF", compression="tiff_lzw"),
    "cmyk tiff": lambda: encode(quarters().convert("CMYK"), "TIFF"),
    "gif": lambda: encode(
        quarters().quantize(16), "GIF", save_all=True, append_images=[ImageOps.invert(quarters()).quantize(16)]
    ),
}


@pytest.mark.parametrize("kind", ENCODINGS)
def test_colors(kind: str) -> None:
    image = decode_image(ENCODINGS[kind]())
    assert image.shape == (3, HEIGHT, WIDTH)
    assert_quarters(image)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation(format: str, orientation: int) -> None:
    stored = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> the transposition that it undoes
    image = quarters()
    if orientation in stored:
        image = image.transpose(Image.Transpose(stored[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encode(image, format, exif=exif, quality=95))
    assert decoded.shape == (3, HEIGHT, WIDTH)
    assert_quarters(decoded)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_corrupt_exif_does_not_matter(format: str, exif: bytes) -> None:
    assert_quarters(decode_image(encode(quarters(), format, exif=exif, quality=95)))


def test_transparency_shows_white() -> None:
    alpha = Image.fromarray(np.repeat(np.array([[0, 128, 255]], np.uint8), 8, 0))
    color, grey = Image.new("RGB", (3, 8), (200, 0, 100)), Image.new("L", (3, 8), 100)
    over_white = torch.tensor([[255, 227, 200], [255, 127, 0], [255, 177, 100]])  # [channel, column]
    color.putalpha(alpha)
    for format in ("PNG", "TIFF"):
        assert (decode_image(encode(color, format))[:, 4].int() - over_white).abs().max() <= 1
    grey.putalpha(alpha)
    assert (decode_image(encode(grey, "PNG"))[:, 4].int() - torch.tensor([255, 177, 100])).abs().max() <= 1


def test_palette_transparency_without_a_warning() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 100, 0, 50, 0])
    image.putdata([0, 1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for transparency, left in ((0, [255, 255, 255]), (bytes([128, 255]), [227, 127, 177])):
            decoded = decode_image(encode(image, "PNG", transparency=transparency))[:, 0].int()
            assert (decoded.T - torch.tensor([left, [0, 50, 0]])).abs().max() <= 1
        assert_quarters(decode_image(encode(quarters().quantize(16), "GIF", transparency=15)), 255)
    assert not caught


@pytest.mark.parametrize("size", [(1, 1), (4000, 20), (20, 4000)])
def test_extreme_sizes(size: tuple[int, int]) -> None:
    for format in ("JPEG", "PNG"):
        image = decode_image(encode(Image.new("RGB", size, YELLOW), format, quality=95))
        assert image.shape == (3, size[1], size[0])
        assert (image.int() - torch.tensor(YELLOW)[:, None, None]).abs().max() <= 3


JPEG = encode(Image.effect_noise((200, 150), 60), "JPEG")
CORRUPT = {
    "empty": b"",
    "text": b"this is not an image\n" * 50,
    "first half": JPEG[: len(JPEG) // 2],
    "last byte missing": JPEG[:-1],
    "header only": JPEG[:400],
    "half a png": encode(Image.effect_noise((200, 150), 60), "PNG")[:9000],
    "half a gif": encode(Image.effect_noise((200, 150), 60), "GIF")[:9000],
    "half a webp": encode(Image.effect_noise((200, 150), 60), "WEBP")[:3000],
    "half a tiff": encode(Image.effect_noise((200, 150), 60), "TIFF")[:9000],
    "a format outside the list": encode(quarters(), "PPM"),
    "postscript, which Pillow would run": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_corrupt_is_refused(kind: str) -> None:
    with pytest.raises(UnreadableImage) as refusal:
        decode_image(CORRUPT[kind])
    reason = str(refusal.value)
    assert 5 < len(reason) < 120
    assert "\n" not in reason
    assert "0x" not in reason  # no addresses
    assert ".cpp" not in reason


def test_bomb_is_refused_before_memory_is_taken() -> None:
    bomb = png(60000, 60000, 8, 0, bytes(60001))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnreadableImage, match="pixels"):
        decode_image(bomb)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert taken * (1 if sys.platform == "darwin" else 1024) < 200e6


def test_no_warning_about_the_size(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(UnreadableImage, match="9500x9500 pixels"):  # Pillow warns of 90 megapixels and more
        decode_image(png(9500, 9500, 1, 0, b""), max_pixels=2**26)
    assert not recwarn.list


def test_size_limit_is_judged_by_the_header() -> None:
    for data in (JPEG[:2000], JPEG):  # if pixels were read first, the cut one would be called cut off
        with pytest.raises(UnreadableImage, match=r"200x150 pixels, more than the 29999"):
            decode_image(data, max_pixels=29_999)
    assert decode_image(JPEG, max_pixels=30_000).shape == (3, 150, 200)


def test_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    odd = JPEG[:-2] + bytes(50) + JPEG[-2:]
    decode_jpeg(torch.frombuffer(bytearray(odd), dtype=torch.uint8))
    assert "Corrupt JPEG" in capfd.readouterr().err  # what would be printed
    threads = [threading.Thread(target=lambda: [decode_image(odd) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capfd.readouterr() == ("", "")
    print("and stderr works again", file=sys.stderr)
    assert "works again" in capfd.readouterr().err


def assert_like_pillow(data: bytes) -> None:
    want = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)
    difference = (decode_image(data).int() - want.int()).abs()
    assert difference.max() <= 4  # decoders may round the inverse DCT and the colours differently
    assert difference.float().mean() < 0.25


def test_like_pillow() -> None:
    noise = torch.nn.functional.interpolate(
        torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(0)), (120, 161), mode="bicubic"
    )
    photo = Image.fromarray((noise[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())
    for options in ({}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 30}):
        assert_like_pillow(encode(photo, "JPEG", **options))
    assert_like_pillow(encode(photo.convert("L"), "JPEG"))


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data sets")
def test_like_pillow_on_photos() -> None:
    for path in sorted(SHARED.glob("imagenet_sample/*/*"))[::10]:
        assert_like_pillow(path.read_bytes())


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data sets")
def test_manifest_of_bad_images() -> None:
    folder = SHARED / "bad_images"
    with open(folder / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    for row in rows:
        data = (folder / row["file"]).read_bytes()
        if row["should_yield_rgb"] == "no":
            with pytest.raises(UnreadableImage):
                decode_image(data)
            continue
        if row["file"] == "16bit_gray.png":  # not a photograph
            assert type_of(open_sample(data)) == ImageType(1, "uint16")
            continue
        image = decode_image(data)
        size = {"one_pixel.png": (1, 1), "very_wide.jpg": (20, 4000)}.get(row["file"], (192, 256))
        assert image.shape == (3, *size), row["file"]
        if row["file"] in ("grayscale.png", "grayscale_alpha.png"):
            assert torch.equal(image[0], image[1])
            assert image.float().std() > 10
        elif row["file"] == "palette_transparency.png":  # yellow shows through
            assert (quarter_colors(image)[:3] - torch.tensor([RED, GREEN, BLUE])).abs().max() < 10
            assert quarter_colors(image)[3, 2] > YELLOW[2] + 50
        elif row["file"] == "rgba.png":
            assert image[:, :, :5].float().mean() > image[:, :, -5:].float().mean()  # the left shows white
        elif row["file"] != "one_pixel.png":
            assert_quarters(image, 15)


def test_decoding_is_a_copy() -> None:
    """The tensor owns its memory: writing to it must not reach the bytes of the file."""
    for data in (JPEG, encode(quarters(), "PNG")):
        first = decode_image(data)
        first.zero_()
        assert decode_image(data).float().mean() > 10


def noisy_photo(mode: str = "RGB") -> Image.Image:
    """Structure of all scales, so that no two parts are alike; odd sides."""
    rng = np.random.default_rng(0)
    image = np.zeros((301, 407, 3))
    for side in (3, 12, 50, 200):
        coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        image += np.asarray(coarse.resize((407, 301), Image.Resampling.BICUBIC), dtype=float) / 4
    return Image.fromarray(image.astype(np.uint8)).convert(mode)


PARTS = [(0, 0, 301, 407), (13, 22, 100, 170), (200, 300, 101, 107), (300, 0, 1, 407), (17, 406, 200, 1)]


@pytest.mark.parametrize("codec", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"format": "JPEG"},
        {"format": "JPEG", "subsampling": 0},
        {"format": "JPEG", "progressive": True},
        {"format": "JPEG", "mode": "L"},
        {"format": "JPEG", "mode": "CMYK"},
        {"format": "JPEG", "orientation": 6},
        {"format": "PNG"},
        {"format": "PNG", "orientation": 3},
    ],
)
def test_a_part_is_that_of_the_whole(monkeypatch, options, codec):
    options = {"mode": "RGB", "orientation": 1, **options}
    exif = Image.Exif()
    exif[0x0112] = options.pop("orientation")
    data = encode(noisy_photo(options.pop("mode")), exif=exif, **options)
    if codec:
        pytest.importorskip("nvidia.nvimgcodec")
    else:
        monkeypatch.setattr(decode, "_find_codec", lambda process: (None, None))
    whole = decode_image(data)
    for top, left, height, width in PARTS:
        if exif[0x0112] == 6:
            top, left, height, width = left, top, width, height
        image = EncodedImage(data)
        assert (image.height, image.width) == whole.shape[1:]
        part = image.decode_crop(top, left, height, width, target=(150, 150))
        assert torch.equal(part, whole[:, top : top + height, left : left + width])


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_large_part_is_decoded_smaller(mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(noisy_photo(mode).resize((1224, 904), Image.Resampling.BICUBIC), "JPEG", quality=92, exif=exif)
    whole = decode_image(data)
    for target, shrink in {(99, 101): 2, (45, 50): 4, (20, 25): 8, (240, 120): 1}.items():
        image = EncodedImage(data)
        assert (image.height, image.width) == whole.shape[1:]
        part = image.decode_crop(104, 200, 400, 456, target)
        assert part.shape == (3, 400 // shrink, 456 // shrink)
        # as much as an image changes when it is resized by another filter
        want = whole[:, 104:504, 200:656]
        ours, theirs, other = (
            resize(x, list(target), mode, antialias=True).float()
            for x, mode in (
                (part, InterpolationMode.BICUBIC),
                (want, InterpolationMode.BICUBIC),
                (want, InterpolationMode.BILINEAR),
            )
        )
        assert (ours - theirs).abs().mean() <= 1.5 * (other - theirs).abs().mean()


@pytest.mark.parametrize("codec", [True, False])
@pytest.mark.parametrize("target", [(150, 150), (20, 20)])
def test_a_part_that_is_not_there(monkeypatch, codec, target):
    if not codec:
        monkeypatch.setattr(decode, "_find_codec", lambda process: (None, None))
    data = encode(noisy_photo(), "JPEG")
    with pytest.raises(UnreadableImage, match=r"truncated|[Pp]remature|EOF"):
        EncodedImage(data[: len(data) // 2]).decode_crop(50, 0, 250, 400, target)
    with pytest.raises(UnreadableImage):
        EncodedImage(data[: len(data) // 40]).decode_crop(50, 0, 250, 400, target)


def test_a_decoder_of_its_own_after_a_fork():
    """As workers of a loader do, that start when this process has decoded already."""
    data = encode(noisy_photo(), "JPEG")
    part = EncodedImage(data).decode_crop(10, 10, 200, 200, (150, 150))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        other = pool.apply_async(_decode_in_child, (data,)).get(timeout=60)
    assert torch.equal(part, torch.from_numpy(other))


def _decode_in_child(data: bytes) -> np.ndarray:
    return EncodedImage(data).decode_crop(10, 10, 200, 200, (150, 150)).numpy()


def test_a_lost_disk_is_no_corrupt_image():
    class Lost(io.BytesIO):
        def read(self, *_):
            raise OSError(number, os.strerror(number))

    for number in (errno.EIO, errno.ESTALE, errno.ENOTCONN):
        with pytest.raises(OSError, match=os.strerror(number)):
            open_image(Lost())
    number = errno.EINVAL  # as Pillow raises it of corrupt files
    with pytest.raises(UnreadableImage, match="Invalid argument"):
        open_image(Lost())


@pytest.mark.parametrize("scale", [1, 257])
def test_a_tiff_palette_of_8_bits_is_taken_as_it_is(scale: int) -> None:
    colours = [(200, 10, 0), (0, 255, 30), (7, 0, 90)]
    image = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8)).convert("P")
    bands = [[colour[band] for colour in colours] + [0] * 253 for band in range(3)]
    entries = tuple(scale * value for band in bands for value in band)
    file = io.BytesIO()
    image.putpalette([value for colour in colours for value in colour])
    image.save(file, "TIFF")
    content = bytearray(file.getvalue())
    tags = Image.open(file).tag_v2
    written = struct.pack(f"<{len(tags[320])}H", *tags[320])
    place = content.index(written)
    content[place : place + len(written)] = struct.pack(f"<{len(entries)}H", *entries)
    pixels = decode_image(bytes(content)).permute(1, 2, 0).tolist()
    assert pixels == [[list(colours[0]), list(colours[1])], [list(colours[2]), list(colours[0])]]
