"""Resized copies: their size, their names, and the tar that holds them."""

import contextlib
import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from itpn.data.decode import EncodedImage, UnreadableImage, decode_image
from itpn.data.file_types import COPIES_INDEX
from itpn.data.files import find_images
from itpn.data.resized_copies import (
    CopiesIndex,
    Original,
    ResizedCopies,
    list_originals,
    read_index,
    resize_image,
    write_tar,
)
from itpn.data.shards import read_shard
from itpn.system.writing import open_whole


def draw(width: int, height: int) -> Image.Image:
    """Smooth, red at the left and blue at the bottom."""
    x, y = np.meshgrid(np.linspace(255, 0, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, np.full_like(x, 60), y], axis=-1).astype(np.uint8))


def encode(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def resize_file(data: bytes, short_side: int, quality: int) -> bytes:
    return resize_image(EncodedImage(data), short_side, quality)


def rotated(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize(
    ("width", "height", "size"), [(600, 300, (128, 64)), (300, 601, (64, 128)), (64, 900, (64, 900))]
)
def test_the_short_side(width, height, size):
    small = Image.open(io.BytesIO(resize_file(encode(draw(width, height)), 64, 95)))
    assert (small.size, small.format, small.mode) == (size, "JPEG", "RGB")


def test_the_image_stays_the_same():
    large = draw(600, 400)
    small = decode_image(resize_file(encode(large, "PNG"), 100, 95)).float()
    want = torch.from_numpy(np.array(large.resize((150, 100), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    assert (small - want).abs().mean() < 1


def test_colours_keep_their_resolution():
    """Stripes of a pixel, which would be mixed where colours have half of it."""
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2, 0], stripes[:, 1::2, 2] = 255, 255
    small = decode_image(resize_file(encode(Image.fromarray(stripes), "PNG"), 64, 95))
    assert (small.float() - torch.from_numpy(stripes).permute(2, 0, 1)).abs().mean() < 2


@pytest.mark.parametrize("orientation", [6, 3])
def test_upright(orientation):
    data = encode(draw(300, 200), exif=rotated(orientation))
    want = decode_image(data)
    for short_side in (100, 500):
        copy = resize_file(data, short_side, 95)
        assert 0x0112 not in Image.open(io.BytesIO(copy)).getexif()
        small = decode_image(copy)
        assert small.shape[2] / small.shape[1] == want.shape[2] / want.shape[1]
        for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
            assert (small[:, y, x].float() - want[:, y, x].float()).abs().max() < 10


def test_small_jpegs_stay_as_they_are():
    for image in (draw(90, 60), draw(90, 60).convert("L")):
        for options in ({}, {"progressive": True}, {"exif": rotated(1)}, {"quality": 30}):
            data = encode(image, **options)
            assert resize_file(data, 60, 95) == data
            assert resize_file(data, 59, 95) != data


@pytest.mark.parametrize("data", [
    encode(draw(90, 60), "PNG"),
    encode(draw(90, 60), "WEBP"),
    encode(draw(90, 60).convert("CMYK")),
    encode(draw(90, 60).convert("P", dither=Image.Dither.NONE), "GIF"),
    encode(draw(90, 60).convert("RGBA"), "PNG"),
], ids=["png", "webp", "cmyk", "gif", "rgba"])  # fmt: skip
def test_everything_else_becomes_a_jpeg(data):
    small = resize_file(data, 512, 95)
    image = Image.open(io.BytesIO(small))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (90, 60))
    assert (decode_image(small).float() - decode_image(data).float()).abs().mean() < 3


def test_noise_can_be_written():
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    assert len(resize_file(encode(Image.fromarray(noise), "PNG"), 600, 100)) > 1e6


def test_what_cannot_be():
    with pytest.raises(UnreadableImage):
        resize_file(encode(draw(90, 60))[:-300], 512, 95)
    with pytest.raises(UnreadableImage, match="longer than the 65,535 pixels"):
        resize_file(encode(Image.new("RGB", (70000, 2)), "PNG"), 512, 95)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def test_names_and_folders(tmp_path):
    touch(tmp_path, "cat/a.b.jpg", "cat/a_b.png", "cat/a.b.webp", "dog/x/1.jpg", "dog.2/1.jpg")
    found = list_originals(find_images([tmp_path]))
    assert {(one.key, one.label) for one in found} == {
        ("cat/a_b", "cat"),
        ("cat/a_b-2", "cat"),
        ("cat/a_b-3", "cat"),
        ("dog/x/1", "dog"),
        ("dog.2/1", "dog.2"),
    }
    assert found == list_originals(find_images([tmp_path]))
    assert [one.path for one in found] != sorted(one.path for one in found)


def test_overlapping_roots(tmp_path):
    touch(tmp_path, "a/cat/1.jpg", "a/1.jpg", "b/cat/1.jpg")
    found = list_originals(find_images([tmp_path / "a", tmp_path / "b", tmp_path / "a/cat/1.jpg"]))
    assert sorted((one.key, one.label or "") for one in found) == [("1", ""), ("cat/1", "cat"), ("cat/1-2", "cat")]


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz"])
def test_images_of_shards(tmp_path, suffix):
    contents = {}
    for shard in ("a", "in/a"):
        members = {
            "./1.jpg": encode(draw(90, 60)),
            "1.cls": b"7\n",
            "x/1.5.png": encode(draw(30, 20), "PNG"),
            "n.txt": b"-",
        }
        path = tmp_path / f"{shard}.tar"
        path.parent.mkdir(exist_ok=True)
        write_tar(path, iter(members.items()))
        if suffix != "tar":
            path.with_name(f"a.{suffix}").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
        contents |= {f"{shard}/1": members["./1.jpg"]}
    found = list_originals(find_images([tmp_path]))
    assert [(one.key, one.name, one.label) for one in found] == [
        ("a/1", f"a.{suffix}/./1.jpg", None),
        ("a/x/1_5", f"a.{suffix}/x/1.5.png", None),
        ("in/a/1", f"a.{suffix}/./1.jpg", None),
        ("in/a/x/1_5", f"a.{suffix}/x/1.5.png", None),
    ]
    copies = {one.key: ResizedCopies(64, 95)[one] for one in found}
    for key, data in contents.items():
        assert copies[key][1:] == (data, len(data), None)
    assert decode_image(copies["in/a/x/1_5"][1]).shape == (3, 20, 30)


def test_missing_and_corrupt_files(tmp_path):
    touch(tmp_path, "a.jpg", "b.jpg")
    found = list_originals(find_images([tmp_path]))
    (tmp_path / "b.jpg").unlink()
    reasons = {one.key: str(ResizedCopies(64, 95)[one][1]) for one in found}
    assert reasons == {"a": "not an image of a known format", "b": "No such file or directory"}


def test_a_shard_appears_only_whole(tmp_path):
    def members():
        yield "a.jpg", b"1"
        assert [path.name for path in tmp_path.iterdir()] == ["s.tar.tmp"]
        yield "ü" * 120 + ".jpg", b"22"
        if corrupt:
            raise OSError("disk full")

    corrupt = True
    with pytest.raises(OSError, match="disk full"):
        write_tar(tmp_path / "s.tar", members())
    assert list(tmp_path.iterdir()) == []
    corrupt = False
    write_tar(tmp_path / "s.tar", members())
    assert list(read_shard(tmp_path / "s.tar")) == [("s.tar/a.jpg", b"1"), (f"s.tar/{'ü' * 120}.jpg", b"22")]
    with tarfile.open(tmp_path / "s.tar") as tar:
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}
    with contextlib.suppress(KeyboardInterrupt), open_whole(tmp_path / "s.tar") as file:
        file.write(b"3")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["s.tar"]
    write_tar(tmp_path / "empty.tar", iter(()))
    assert list(read_shard(tmp_path / "empty.tar")) == []


def test_files_and_members_of_more_than_two_gibibytes(tmp_path):
    """They are named and left out, and nothing of them is read."""
    size = 2**31 + 1
    (tmp_path / "a").mkdir()
    with (tmp_path / "a" / "0.jpg").open("wb") as file:
        file.truncate(size)  # sparse: it takes no room on disk
    (tmp_path / "b").mkdir()
    member = tarfile.TarInfo("0.jpg")
    member.size = size
    with (tmp_path / "b" / "s.tar").open("wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + -(-size // 512) * 512 + 1024)
    for folder in ("a", "b"):
        (one,) = list_originals(find_images([tmp_path / folder]))
        content = ResizedCopies(64, 95)[one].content
        assert isinstance(content, UnreadableImage)
        assert str(content) == f"{size:,} bytes, more than the {2**31:,} that are read"


def test_an_index_of_version_0_1_is_read(tmp_path):
    record = {"images": 3, "bytes": 100}
    content = {"settings": {"quality": 95}, "shards": {"a.tar": {**record, "broken": {"x.jpg": "cut off"}}}}
    (tmp_path / COPIES_INDEX).write_text(json.dumps({**content, "complete": True}))
    shards = {"a.tar": {**record, "corrupt": {"x.jpg": "cut off"}}}
    assert read_index(tmp_path) == CopiesIndex({"quality": 95}, shards, complete=True)


def test_a_photograph_with_pixels_without_data_is_shrunk_and_that_is_said(tmp_path):
    """JPEG holds no value for them."""
    pixels = np.full((40, 60, 3), 200, np.uint8)
    pixels[:, :30] = 0
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extratags=[(42113, "s", 0, "0", True)])
    copy = ResizedCopies(20, 95)[Original("a", "a.tif", str(tmp_path / "a.tif"))]
    assert decode_image(copy.content).shape == (3, 20, 30)
    assert "declares 0 for pixels without data" in copy.warnings["nodata"]
