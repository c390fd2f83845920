"""One orientation for each image, whatever holds it, and the same for every way of reading it."""

import random
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from samples import (
    XMP_HEADER,
    assert_quarters,
    encode,
    exif,
    quarters,
    tiff,
    with_chunks,
    with_riff_chunk,
    with_segments,
    xmp,
)

from itpn.data import decode
from itpn.data.augment import PretrainingTransform
from itpn.data.decode import EncodedImage, decode_image
from itpn.data.formats.reader import read_size
from itpn.data.gpu_decoding import GpuTransform, collate_encoded
from itpn.data.masks import read_mask
from itpn.data.resized_copies import resize_image

HEIGHT, WIDTH = 480, 640
# orientation -> the transposition that it undoes
STORED = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}


def stored(orientation: int, mode: str = "RGB") -> Image.Image:
    """The image as it is stored in a file of that orientation."""
    image = quarters(HEIGHT, WIDTH)
    return (image.transpose(Image.Transpose(STORED[orientation])) if orientation in STORED else image).convert(mode)


def jpeg(*segments: bytes, orientation: int = 1, **options) -> bytes:
    mode = options.pop("mode", "RGB")
    return with_segments(encode(stored(orientation, mode), "JPEG", quality=95, **options), *segments)


def png(orientation: int, *chunks: tuple[bytes, bytes], after: bool = False, mode: str = "RGB") -> bytes:
    return with_chunks(encode(stored(orientation, mode), "PNG"), *chunks, after=after)


def webp(orientation: int, name: bytes, data: bytes, lossless: bool = False) -> bytes:
    image = stored(orientation)
    plain = encode(image, "WEBP", quality=95, lossless=lossless)
    return with_riff_chunk(plain, name, data, (image.height, image.width))


def raw_profile(data: bytes, packed: bool) -> tuple[bytes, bytes]:
    """EXIF in a PNG as ImageMagick writes it."""
    text = b"\nexif\n%8d\n%s\n" % (len(data), data.hex().encode())
    return (
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))
        if packed
        else (
            b"tEXt",
            b"Raw profile type exif\0" + text,
        )
    )


def itxt(data: bytes, packed: bool = False) -> tuple[bytes, bytes]:
    return b"iTXt", b"XML:com.adobe.xmp\0" + (b"\1\0\0\0" + zlib.compress(data) if packed else b"\0\0\0\0" + data)


HEAD = b"Exif\0\0"
CONTAINERS: dict[str, Callable[[int], bytes]] = {
    "jpeg": lambda o: jpeg(HEAD + exif(o), orientation=o),
    "jpeg, big-endian long": lambda o: jpeg(HEAD + exif(o, ">", 4), orientation=o),
    "jpeg, little-endian long": lambda o: jpeg(HEAD + exif(o, "<", 4), orientation=o),
    "jpeg, big-endian short": lambda o: jpeg(HEAD + exif(o, ">"), orientation=o),
    "jpeg, exif after xmp": lambda o: jpeg(XMP_HEADER + b"<x/>", HEAD + exif(o), orientation=o),
    "jpeg, exif behind jfif, xmp and others": lambda o: encode(
        stored(o), "JPEG", quality=95, exif=HEAD + exif(o), xmp=b"<x/>", icc_profile=bytes(200_000)
    ),
    "jpeg, exif that promises more entries": lambda o: jpeg(HEAD + exif(o, entries=9)[:-4], orientation=o),
    "jpeg, xmp attribute": lambda o: jpeg(XMP_HEADER + xmp(o), orientation=o),
    "jpeg, xmp in single quotes": lambda o: jpeg(XMP_HEADER + xmp(o, quote="'"), orientation=o),
    "jpeg, xmp element of another prefix": lambda o: jpeg(XMP_HEADER + xmp(o, True, "t"), orientation=o),
    "jpeg, xmp in utf-16": lambda o: jpeg(XMP_HEADER + xmp(o).decode().encode("utf-16"), orientation=o),
    "jpeg, xmp beside exif without it": lambda o: jpeg(
        HEAD + exif(o).replace(b"\x12\x01", b"\x0f\x01"), XMP_HEADER + xmp(o), orientation=o
    ),
    "jpeg, exif wins over xmp": lambda o: jpeg(XMP_HEADER + xmp(9 - o), HEAD + exif(o), orientation=o),
    "jpeg, the first exif wins": lambda o: jpeg(HEAD + exif(o), HEAD + exif(9 - o), orientation=o),
    "jpeg, exif cut off, then xmp": lambda o: jpeg(HEAD + exif(o)[:20], XMP_HEADER + xmp(o), orientation=o),
    "progressive grey jpeg": lambda o: jpeg(HEAD + exif(o), orientation=o, mode="L", progressive=True),
    "cmyk jpeg": lambda o: jpeg(HEAD + exif(o), orientation=o, mode="CMYK"),
    "png": lambda o: png(o, (b"eXIf", exif(o))),
    "png, after the pixels": lambda o: png(o, (b"eXIf", exif(o, ">", 4)), after=True),
    "png, with a jpeg's header": lambda o: png(o, (b"eXIf", HEAD + exif(o))),
    "png, xmp": lambda o: png(o, itxt(xmp(o))),
    "png, xmp after the pixels": lambda o: png(o, itxt(xmp(o, True)), after=True),
    "png, xmp compressed": lambda o: png(o, itxt(xmp(o), True)),
    "png, raw profile": lambda o: png(o, raw_profile(HEAD + exif(o), True)),
    "png, raw profile after the pixels": lambda o: png(o, raw_profile(exif(o, ">"), False), after=True),
    "png, exif wins over xmp": lambda o: png(o, itxt(xmp(9 - o)), (b"eXIf", exif(o))),
    "palette png": lambda o: with_chunks(encode(stored(o).quantize(8), "PNG"), (b"eXIf", exif(o))),
    "webp": lambda o: webp(o, b"EXIF", exif(o)),
    "webp, with a jpeg's header": lambda o: webp(o, b"EXIF", HEAD + exif(o, ">")),
    "webp, lossless, xmp": lambda o: webp(o, b"XMP ", xmp(o), lossless=True),
    "tiff": lambda o: tiff(np.asarray(stored(o)), tags={274: (3, [o])}),
    "tiff, big-endian long, compressed": lambda o: tiff(np.asarray(stored(o)), ">", deflate=True, tags={274: (4, [o])}),
    "tiff, planes": lambda o: tiff(np.asarray(stored(o)), planar=2, tags={274: (3, [o])}),
    "tiff, xmp": lambda o: tiff(np.asarray(stored(o)), tags={700: (7, xmp(o))}),
    "tiff, the tag wins over xmp": lambda o: tiff(np.asarray(stored(o)), tags={274: (3, [o]), 700: (7, xmp(9 - o))}),
}
GREY = {"progressive grey jpeg"}


def assert_picture(image: torch.Tensor, container: str, tolerance: int = 14) -> None:
    if container not in GREY:
        return assert_quarters(image, tolerance)
    want = decode_image(encode(quarters().convert("L"), "PNG"))
    rows, columns = [image.shape[1] // 4, image.shape[1] * 3 // 4], [image.shape[2] // 4, image.shape[2] * 3 // 4]
    for row, y in zip((24, 72), rows, strict=True):
        for column, x in zip((32, 96), columns, strict=True):
            assert (image[:, y, x].int() - want[:, row, column].int()).abs().max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("container", CONTAINERS)
def test_all_paths_agree(monkeypatch, tmp_path, container, orientation):
    data = CONTAINERS[container](orientation)
    path = tmp_path / "image"
    path.write_bytes(data)

    assert read_size(str(path)) == (HEIGHT, WIDTH)
    image = EncodedImage(data)
    assert (image.height, image.width) == (HEIGHT, WIDTH)
    whole = image.decode()
    assert whole.shape == (3, HEIGHT, WIDTH)
    assert_picture(whole, container)

    for codec in (True, False):
        if not codec:
            monkeypatch.setattr(decode, "_find_codec", lambda process: (None, None))
        part = EncodedImage(data).decode_crop(20, 60, 300, 400, target=(300, 400))
        assert torch.equal(part, whole[:, 20:320, 60:460])
        for side in (120, 60, 25):  # decoded at 1/2, 1/4 and 1/8 where that can be
            small = EncodedImage(data).decode_crop(0, 0, HEIGHT, WIDTH, target=(side, side))
            assert HEIGHT * small.shape[2] == WIDTH * small.shape[1]
            assert_picture(small, container)
            corner = EncodedImage(data).decode_crop(0, 320, 240, 320, target=(side // 2, side // 2)).float()
            assert (corner.mean(dim=(1, 2)) - whole[:, 120, 480]).abs().max() < 14  # top right

    small = decode_image(resize_image(EncodedImage(data), 48, 95))
    assert small.shape == (3, 48, 64)
    assert_picture(small, container, tolerance=20)
    assert decode_image(resize_image(EncodedImage(data), HEIGHT, 95)).shape == whole.shape  # and not turned once more


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("container", CONTAINERS)
def test_gpu_decoding_agrees(container, orientation):
    """The part that a GPU would do, on the CPU."""
    data = CONTAINERS[container](orientation)
    transform = PretrainingTransform((48, 64), scale=(0.3, 0.6), teacher_size=(24, 32))
    on_device = GpuTransform(transform)
    samples = [on_device(EncodedImage(data), random.Random(seed)) for seed in range(3)]
    batch = {**collate_encoded(samples), "key": list("abc"), "corrupt": [], "warnings": {}}
    done = on_device.finish_batch(batch, torch.device("cpu"))
    whole = decode_image(data)
    for seed in range(3):
        want = transform(whole, random.Random(seed))
        for name in ("image", "teacher_image"):
            difference = (done[name][seed].float() - want[name]).abs()
            assert difference.mean() < 2, (name, seed)  # crops of reduced decoding have blurred edges


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("container", ["png", "png, after the pixels", "png, xmp", "tiff"])
def test_masks_are_turned_alike(tmp_path, container, orientation):
    path = tmp_path / "mask.png"
    path.write_bytes(CONTAINERS[container](orientation))
    mask = read_mask(str(path))
    assert mask.shape == (HEIGHT, WIDTH, 3)
    assert_quarters(torch.from_numpy(np.array(mask)).permute(2, 0, 1), 0)


def label_file(orientation: int, dtype: type, format: str) -> bytes:
    labels = np.arange(12, dtype=dtype).reshape(3, 4)
    if orientation == 6:
        labels = np.ascontiguousarray(np.rot90(labels))
    if format == "TIFF":
        return tiff(labels, tags={274: (3, [orientation])})
    return with_chunks(encode(Image.fromarray(labels), "PNG"), (b"eXIf", exif(orientation)), after=True)


@pytest.mark.parametrize(("format", "dtype"), [("PNG", np.uint8), ("PNG", np.uint16), ("TIFF", np.int32)])
def test_labels_of_any_depth_are_turned(tmp_path, format, dtype):
    path = tmp_path / "mask"
    path.write_bytes(label_file(6, dtype, format))
    assert read_mask(str(path)).tolist() == np.arange(12).reshape(3, 4).tolist()


INVALID = {
    "zero": HEAD + exif(0),
    "nine": HEAD + exif(9),
    "a long of which the lower half is 6": HEAD + exif(65536 + 6, kind=4),
    "negative": HEAD + exif(-6, kind=9),
    "two of them": HEAD + exif(6, count=2),
    "none of them": HEAD + exif(6, count=0),
    "a rational": HEAD + exif(6, kind=5),
    "a kind that is not": HEAD + exif(6, kind=77),
    "cut off within the entry": HEAD + exif(6)[:20],
    "cut off before the entry": HEAD + exif(6)[:10],
    "no offset": HEAD + exif(6)[:6],
    "an offset behind the end": HEAD + exif(6)[:4] + b"\xff\xff\xff\x7f",
    "no byte order": HEAD + b"XX" + exif(6)[2:],
    "empty": HEAD,
    "xmp of 0": XMP_HEADER + xmp(0),
    "xmp of 9": XMP_HEADER + xmp(9),
    "xmp of 16": XMP_HEADER + xmp(16),
    "xmp of words": XMP_HEADER + xmp("left"),
    "extended xmp": b"http://ns.adobe.com/xmp/extension/\0" + bytes(40) + b"garbage",
}


@pytest.mark.parametrize("kind", INVALID)
def test_invalid_values_count_as_1(tmp_path, kind):
    data = jpeg(INVALID[kind])
    (tmp_path / "a.jpg").write_bytes(data)
    assert read_size(str(tmp_path / "a.jpg")) == (HEIGHT, WIDTH)
    assert_quarters(decode_image(data))
    assert EncodedImage(data).is_upright_jpeg
    assert_quarters(EncodedImage(data).decode_crop(0, 0, HEIGHT, WIDTH, (50, 50)))


def test_exif_with_an_invalid_value_still_wins_over_xmp():
    assert_quarters(decode_image(jpeg(HEAD + exif(0), XMP_HEADER + xmp(6))))


@pytest.mark.parametrize("value", [0, 9, 65536 + 6])
def test_invalid_tag_of_tiff(value):
    assert_quarters(decode_image(tiff(np.asarray(quarters()), tags={274: (4, [value])})), 0)


def test_corrupt_chunks_do_not_matter():
    plain = encode(quarters(), "PNG")
    for chunk in (
        (b"iTXt", b"XML:com.adobe.xmp"),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0nothing that zlib packed"),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 6\nno digits\n")),
        (b"tEXt", b"Raw profile type exif\0"),
        (b"eXIf", b""),
    ):
        data = with_chunks(plain, chunk, after=True)
        assert EncodedImage(data).height == 96
        assert_quarters(decode_image(data), 0)


def test_what_is_unpacked_has_a_limit():
    bomb = itxt(b" " * 2**26 + xmp(6), packed=True)
    data = with_chunks(encode(quarters(), "PNG"), bomb, after=True)
    assert (EncodedImage(data).height, EncodedImage(data).width) == (96, 128)


def test_both_ways_of_turning_are_the_same():
    pixels = torch.arange(3 * 4 * 5, dtype=torch.uint8).reshape(3, 4, 5)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    for orientation in range(1, 9):
        turned = np.asarray(decode.turn_image(image, orientation))
        assert torch.equal(decode.turn_tensor(pixels, orientation), torch.tensor(turned).permute(2, 0, 1))
