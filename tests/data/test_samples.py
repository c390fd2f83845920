"""What is opened: photographs, and images of any channels and depth, of which a data set has one type."""

import gc
import io
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import itpn
import itpn.data.stored
from itpn.data.bands import BandsOf
from itpn.data.batches import BatchPlan, FileBatches, UnreadableBatch, stack
from itpn.data.decode import UnreadableImage, decode_image
from itpn.data.formats.reader import open_file
from itpn.data.image_type import PHOTOGRAPH, ImageType
from itpn.data.readers import FileReader
from itpn.data.samples import MixedImages, OpenFiles, WindowRequest, open_for_tiles, open_sample, type_of
from itpn.data.statistics import compute_statistics
from itpn.data.stored import PLAIN, ReadSettings, StoredImage
from itpn.data.windows import cut_windows
from itpn.errors import UserError

RNG = np.random.default_rng(0)
BANDS = RNG.integers(0, 60_000, (5, 40, 60)).astype(np.uint16)


def write(path: Path, pixels: np.ndarray, **options: object) -> Path:
    tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="separate", **options)
    return path


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "CMYK", "1"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_photographs(tmp_path, mode, kind):
    image = Image.fromarray(RNG.integers(0, 255, (20, 30, 3)).astype(np.uint8)).convert(mode)
    path = tmp_path / f"a.{kind.lower()}"
    try:
        image.save(path, kind)
    except OSError:
        pytest.skip(f"{kind} has no {mode}")
    for data in (path, path.read_bytes()):
        sample = open_sample(data)
        assert type_of(sample) == PHOTOGRAPH
        assert torch.equal(sample.decode(), decode_image(path.read_bytes()))


@pytest.mark.parametrize(
    ("pixels", "options"),
    [
        (BANDS, {}),
        (BANDS[0], {}),
        (BANDS.astype(np.int16), {"tile": (16, 16), "compression": "deflate"}),
        (BANDS.astype(np.float32), {}),
        ((BANDS >> 8).astype(np.uint8), {}),
    ],
    ids=["five bands", "16-bit grey", "tiles", "floats", "five bands of 8 bits"],
)
def test_others_keep_channels_and_depth(tmp_path, pixels, options):
    path = write(tmp_path / "a.tif", pixels, **options)
    for data in (path, path.read_bytes()):
        sample = open_sample(data)
        stored = pixels if pixels.ndim == 3 else pixels[None]
        assert type_of(sample) == ImageType(len(stored), stored.dtype.name)
        assert (sample.height, sample.width) == stored.shape[1:]
        assert np.array_equal(sample.decode().numpy(), stored)
        part = sample.decode_crop(3, 7, 20, 30, (10, 10))
        assert np.array_equal(part.numpy(), stored[:, 3:23, 7:37])


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_integers_of_64_bits_become_floats(tmp_path, dtype):
    """On the device they do; in a data set they are an image type of their own nowhere."""
    np.save(tmp_path / "a.npy", BANDS.astype(dtype))
    sample = open_sample(tmp_path / "a.npy")
    assert type_of(sample) == ImageType(5, "float32")
    assert np.array_equal(sample.decode().numpy(), BANDS.astype(np.float32))


def test_values_beyond_a_type_give_no_warning(tmp_path, recwarn):
    """They are no data; nothing is printed in the middle of a progress bar."""
    for dtype, value in {"float64": 1e300, "float16": np.inf}.items():
        pixels = BANDS.astype(dtype)
        pixels[0] = value
        np.save(tmp_path / "a.npy", pixels)
        found = open_sample(tmp_path / "a.npy").decode()
        assert found[0].isnan().all()
        assert found[1:].isfinite().all()
    assert not recwarn.list


def test_double_floats_become_single(tmp_path):
    write(tmp_path / "a.tif", BANDS.astype(np.float64) / 3)
    image = open_sample(tmp_path / "a.tif").decode()
    assert image.dtype == torch.float32
    assert np.array_equal(image.numpy(), (BANDS.astype(np.float64) / 3).astype(np.float32))


def test_16_bit_png(tmp_path):
    Image.fromarray(BANDS[0]).save(tmp_path / "a.png")
    for data in (tmp_path / "a.png", (tmp_path / "a.png").read_bytes()):
        assert type_of(open_sample(data)) == ImageType(1, "uint16")


def test_a_fourth_band_that_is_not_alpha_stays(tmp_path):
    pixels = (BANDS[:4] >> 8).astype(np.uint8).transpose(1, 2, 0)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=(0,))
    tifffile.imwrite(tmp_path / "b.tif", pixels, photometric="rgb", extrasamples=("unassalpha",))
    assert type_of(open_sample(tmp_path / "a.tif")) == ImageType(4, "uint8")
    assert type_of(open_sample(tmp_path / "b.tif")) == PHOTOGRAPH


def test_grey_and_colours_of_8_bits_in_other_formats_are_photographs(tmp_path):
    grey, rgb = (BANDS[0] >> 8).astype(np.uint8), (BANDS[:3] >> 8).astype(np.uint8)
    np.save(tmp_path / "grey.npy", grey)
    np.save(tmp_path / "rgb.npy", rgb.transpose(1, 2, 0))
    np.save(tmp_path / "stains.npy", rgb)
    assert np.array_equal(open_sample(tmp_path / "grey.npy").decode().numpy(), np.stack([grey] * 3))
    assert np.array_equal(open_sample(tmp_path / "rgb.npy").decode().numpy(), rgb)
    assert type_of(open_sample(tmp_path / "rgb.npy")) == type_of(open_sample(tmp_path / "grey.npy")) == PHOTOGRAPH
    assert type_of(open_sample(tmp_path / "stains.npy")) == ImageType(3, "uint8")


def test_a_stack_of_photographs_says_that_its_first_page_is_read(tmp_path):
    pages = (BANDS[:4, None] >> 8).astype(np.uint8)
    tifffile.imwrite(tmp_path / "z.tif", pages, photometric="minisblack", imagej=True, metadata={"axes": "ZCYX"})
    sample = open_sample(tmp_path / "z.tif")
    assert type_of(sample) == PHOTOGRAPH
    assert np.array_equal(sample.decode()[0].numpy(), pages[0, 0])
    assert "several pages" in sample.warnings["pages"]


def test_channels_of_a_stack_are_channels(tmp_path):
    pages = (BANDS[:3] >> 8).astype(np.uint8)
    tifffile.imwrite(tmp_path / "c.tif", pages, photometric="minisblack", metadata={"axes": "CYX"}, ome=True)
    assert type_of(open_sample(tmp_path / "c.tif")) == ImageType(3, "uint8")


@pytest.mark.parametrize("pair", [("five.tif", "photo.png"), ("photo.png", "five.tif"), ("five.tif", "deep.tif")])
def test_a_mixture_is_refused_with_two_names(tmp_path, pair):
    write(tmp_path / "five.tif", BANDS)
    write(tmp_path / "deep.tif", BANDS.astype(np.float32))
    Image.new("RGB", (30, 20)).save(tmp_path / "photo.png")
    first, second = (str(tmp_path / name) for name in pair)
    kind = type_of(open_sample(Path(first)))
    with pytest.raises(MixedImages, match=r"(?s)has .*, and .* has .*: all images of a data set need the same"):
        open_sample(Path(second), ReadSettings(type=kind, example=f"{first} has"), second)
    plan = BatchPlan(2, 1, 0, 1, 0, ReadSettings(type=kind, example=f"{first} has"), lambda image, rng: {}, stack)
    batch = FileBatches(FileReader([first, second]), plan)[0]  # as a worker process makes it
    assert isinstance(batch, UnreadableBatch)
    assert first in batch.error
    assert second in batch.error


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_pixels_without_data(tmp_path, dtype):
    pixels = BANDS[:2].astype(dtype)
    pixels[:, :5] = -9999
    tag = (42113, "s", 0, "-9999", True)
    path = write(tmp_path / "a.tif", pixels, extratags=[tag])
    image = open_sample(path, ReadSettings(nodata=-1)).decode().numpy()
    missing = np.isnan(image) if dtype == np.float32 else image == -1
    assert missing[:, :5].all()
    assert missing.sum() == missing[:, :5].size
    assert np.array_equal(image[:, 5:], pixels[:, 5:])
    late = open_sample(path, ReadSettings(type=ImageType(2, np.dtype(dtype).name)))  # others have not declared it
    assert ("nodata" in late.warnings) == (dtype == np.int16)


def test_values_that_no_sensor_measures_are_no_data(tmp_path):
    pixels = BANDS[0].astype(np.float32)
    pixels[0, :4] = (np.nan, np.inf, -3.4e38, 1e30)
    image = open_sample(write(tmp_path / "a.tif", pixels)).decode()
    assert image[0, 0, :4].isnan().all()
    assert int(image.isnan().sum()) == 4


def test_percentiles_of_each_image(tmp_path):
    path = write(tmp_path / "a.tif", BANDS)
    image = open_sample(path, ReadSettings(stretch=(10.0, 90.0))).decode()
    for own, stored in zip(image.numpy(), BANDS, strict=True):
        low, high = np.percentile(stored, (10, 90))
        assert np.allclose(own, ((stored - low) / (high - low)).clip(0, 1), atol=1e-6)
    part = open_sample(path, ReadSettings(stretch=(10.0, 90.0))).decode_crop(3, 7, 20, 30, (10, 10))
    assert torch.equal(part, image[:, 3:23, 7:37])


def test_a_corrupt_and_a_missing_file(tmp_path):
    path = write(tmp_path / "a.tif", BANDS)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UnreadableImage):
        open_sample(path).decode()
    with pytest.raises(UnreadableImage, match="No such file"):
        open_sample(tmp_path / "missing.tif")
    (tmp_path / "empty.tif").touch()
    with pytest.raises(UnreadableImage, match="empty file"):
        open_sample(tmp_path / "empty.tif")


# --- windows


def test_windows_cover_an_image_and_are_read_alone(tmp_path):
    path = write(tmp_path / "a.tif", BANDS, tile=(16, 16))
    small = write(tmp_path / "b.tif", BANDS[:, :10, :12])
    reading = ReadSettings(max_pixels=500)
    windows, whole = cut_windows(FileReader([str(path), str(small)]), 20, 4, reading)
    assert whole == []
    seen = np.zeros(BANDS.shape[1:], int)
    for index in range(len(windows)):
        name, window = windows[index]
        sample = open_sample(window, reading, name)
        top, left, height, width = window.box
        stored = BANDS if "a.tif" in name else BANDS[:, :10, :12]
        assert np.array_equal(sample.decode().numpy(), stored[:, top : top + height, left : left + width])
        if "a.tif" in name:
            assert (height, width) == (20, 20)
            seen[top : top + height, left : left + width] += 1
    assert seen.min() == 1
    assert len(windows) == 3 * 4 + 1


def test_windows_move_within_the_image(tmp_path):
    path = write(tmp_path / "a.tif", BANDS)
    windows, _ = cut_windows(FileReader([str(path)]), 20, 0, ReadSettings())
    rng, places = random.Random(0), set()
    for index in range(len(windows)):
        for _ in range(50):
            top, left, height, width = windows[index][1].move(rng).box
            assert 0 <= top <= 40 - height
            assert 0 <= left <= 60 - width
            places.add((top, left))
    assert len(places) > 150


def test_a_window_of_what_cannot_be_read_in_parts(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(BANDS[0]).save(buffer, "PNG")
    window = WindowRequest(buffer.getvalue(), (3, 7, 20, 30))
    assert np.array_equal(open_sample(window).decode()[0].numpy(), BANDS[0, 3:23, 7:37])
    with pytest.raises(UnreadableImage, match=r"60x40 pixels, more than the 1000 allowed .* cannot be read in parts: "):
        open_sample(window, ReadSettings(max_pixels=1000))
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    _, whole = cut_windows(FileReader([str(tmp_path / "a.png")]), 8, 0, ReadSettings())
    assert whole == [str(tmp_path / "a.png")]


@pytest.mark.parametrize("kind", ["tiles", "png", "bands"])
def test_windows_share_the_percentiles_of_their_image(tmp_path, kind, monkeypatch):
    """Which are found once for a file; a window that is read alone decodes nothing else."""
    reading, found = ReadSettings(stretch=(5, 95), nodata=7.0), []
    pixels = BANDS.copy()
    pixels[:, :15, :20] = 7
    if kind == "tiles":
        data = write(tmp_path / "a.tif", pixels, tile=(16, 16), compression="deflate")
    elif kind == "png":
        data = tmp_path / "a.png"
        Image.fromarray(pixels[0]).save(data)
    else:
        data = BandsOf(tuple(write(tmp_path / f"{n}.tif", band, tile=(16, 16)) for n, band in enumerate(pixels)))
    whole = open_sample(data, reading).decode()
    assert whole.dtype == torch.float32
    real = itpn.data.stored.find_limits
    monkeypatch.setattr(itpn.data.stored, "find_limits", lambda *given: found.append(1) or real(*given))
    for top, left in [(0, 0), (12, 17), (20, 40), (5, 8)]:
        part = open_sample(WindowRequest(data, (top, left, 20, 20)), reading).decode()
        assert torch.equal(part.nan_to_num(-1), whole[:, top : top + 20, left : left + 20].nan_to_num(-1))
    assert len(found) == 1


def test_percentiles_of_a_large_image_are_those_of_windows_all_over_it(tmp_path, monkeypatch):
    """For its windows and for the whole alike: 16 windows are read, once."""
    monkeypatch.setattr(itpn.data.stored, "PART", 16 * 8**2)
    path = write(tmp_path / "a.tif", BANDS, tile=(16, 16), compression="deflate")
    tops, lefts = (np.linspace(0, side - 8, 4).astype(int) for side in (40, 60))
    some = np.concatenate([BANDS[:, y : y + 8, x : x + 8].reshape(5, -1) for y in tops for x in lefts], axis=1)
    low, high = np.percentile(some, (2, 98), axis=1)[..., None, None]
    expected = ((BANDS - low) / (high - low)).clip(0, 1).astype(np.float32)
    read, real = [], StoredImage._read_stored
    monkeypatch.setattr(StoredImage, "_read_stored", lambda self, window: read.append(window) or real(self, window))
    reading = ReadSettings(stretch=(2, 98))
    for top, left in [(0, 0), (12, 17)]:
        part = open_sample(WindowRequest(path, (top, left, 20, 20)), reading).decode()
        assert np.allclose(part, expected[:, top : top + 20, left : left + 20])
    assert len(read) == 16 + 2
    assert None not in read
    assert np.allclose(open_sample(path, reading).decode(), expected)
    assert open_sample(path, reading).decode_some().shape == (5, 16 * 8**2)


def test_a_large_tiled_photograph_is_read_by_windows(tmp_path, monkeypatch):
    monkeypatch.setattr("itpn.data.samples.LARGE_FILE", 1000)
    pixels = RNG.integers(0, 255, (64, 96, 3)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "slide.tif", pixels, photometric="rgb", tile=(16, 16))
    sample = open_sample(tmp_path / "slide.tif")
    assert isinstance(sample, StoredImage)
    assert type_of(sample) == PHOTOGRAPH
    assert np.array_equal(sample.decode().numpy(), pixels.transpose(2, 0, 1))


def test_a_whole_image_that_is_too_large_is_refused_and_its_windows_are_read(tmp_path):
    path = write(tmp_path / "a.tif", BANDS, tile=(16, 16))
    image = open_sample(path, ReadSettings(max_pixels=2000))
    for read in (image.decode, lambda: image.decode_crop(0, 0, 10, 10, (5, 5))):
        with pytest.raises(UnreadableImage, match=r"60x40 pixels, more than the 2000 allowed .* --data.window-size"):
            read()
    assert np.array_equal(image.decode_window(3, 7, 20, 30).numpy(), BANDS[:, 3:23, 7:37])
    window = WindowRequest(path, (3, 7, 20, 30))
    assert np.array_equal(open_sample(window, ReadSettings(max_pixels=600)).decode().numpy(), BANDS[:, 3:23, 7:37])
    with pytest.raises(UnreadableImage, match=r"30x20 pixels, more than the 599 allowed \(--data.max-pixels\)$"):
        open_sample(window, ReadSettings(max_pixels=599))


def test_channels_count_in_the_size_of_a_window(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((70, 80, 90), np.float32))
    window = WindowRequest(tmp_path / "a.npy", (0, 0, 80, 90))
    with pytest.raises(UnreadableImage, match=r"90x80 pixels of 70 channels take .* GiB, more than the .* allowed"):
        open_sample(window, ReadSettings(max_pixels=7200)).decode()
    smaller = WindowRequest(tmp_path / "a.npy", (0, 0, 40, 50))
    assert open_sample(smaller, ReadSettings(max_pixels=17500)).decode().shape == (70, 40, 50)


def test_planes_that_are_one_block_are_not_unpacked_without_limit(tmp_path, monkeypatch):
    """Of a tile that is several planes deep, tifffile decodes the whole file."""
    stack = RNG.integers(0, 255, (32, 32, 32)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", stack, tile=(16, 16, 16), volumetric=True, compression="zlib")
    assert np.array_equal(itpn.read_image(tmp_path / "a.tif", page=20)[0].numpy(), stack[20])
    monkeypatch.setattr("itpn.data.formats.tiff.MAX_PIXELS", 1000)
    with pytest.raises(UserError, match=r"32 planes stored as one block take .* GiB: save each as a page"):
        itpn.read_image(tmp_path / "a.tif", page=20)


# --- open files


def count_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def no_garbage_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="Linux tells which files are open")
@pytest.mark.usefixtures("no_garbage_collection")
def test_files_are_closed(tmp_path):
    """At once, not by the garbage collector: workers read thousands in between."""
    paths = [write(tmp_path / "tiles.tif", BANDS, tile=(16, 16)), write(tmp_path / "plain.tif", BANDS)]
    np.save(tmp_path / "a.npy", BANDS)
    paths += [tmp_path / "a.npy"]
    bands = BandsOf(tuple(write(tmp_path / f"B0{number}.tif", BANDS[number]) for number in range(3)))
    for data in (*paths, *(path.read_bytes() for path in paths), bands):
        open_sample(data).decode()  # what libraries open once
        before = count_open_files()
        open_sample(data).decode_crop(0, 0, 10, 10, (10, 10))
        assert count_open_files() == before
        if isinstance(data, bytes):
            held = sys.getrefcount(data)
            open_sample(data).decode()
            assert sys.getrefcount(data) == held


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="Linux tells which files are open")
@pytest.mark.usefixtures("no_garbage_collection")
def test_of_files_with_windows_the_last_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("itpn.data.samples._open_files", OpenFiles(2))
    opened: list[Path] = []
    monkeypatch.setattr("itpn.data.samples.open_file", lambda path, *own: opened.append(path) or open_file(path, *own))
    paths = [write(tmp_path / f"{number}.tif", BANDS + number, tile=(16, 16)) for number in range(4)]
    before = count_open_files()
    for number in (0, 0, 1, 0, 2, 0, 3, 1):
        window = open_sample(WindowRequest(paths[number], (3, 7, 20, 30)))
        assert np.array_equal(window.decode().numpy(), BANDS[:, 3:23, 7:37] + number)
    del window
    assert [path.stem for path in opened] == ["0", "1", "2", "3", "1"]
    assert count_open_files() == before + 2
    write(paths[1], BANDS[:, :30], tile=(16, 16))  # another image of this name
    assert open_sample(WindowRequest(paths[1], (0, 0, 30, 60))).decode().shape == (5, 30, 60)
    paths[1].unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        open_sample(WindowRequest(paths[1], (0, 0, 30, 60)))


def test_bands_with_windows_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("itpn.data.samples._open_files", OpenFiles(2))
    bands = BandsOf(tuple(write(tmp_path / f"B0{number}.tif", BANDS[number], tile=(16, 16)) for number in range(3)))
    opened: list[Path] = []
    monkeypatch.setattr(
        "itpn.data.formats.bands.open_file", lambda path, *own: opened.append(path) or open_file(path, *own)
    )
    for _ in range(3):
        assert np.array_equal(open_sample(WindowRequest(bands, (3, 7, 20, 30))).decode().numpy(), BANDS[:3, 3:23, 7:37])
    assert opened == [*bands.paths]


@pytest.mark.parametrize("kind", ["png", "jpg", "tif"])
def test_a_file_that_is_not_read_in_parts_is_read_once_a_window(tmp_path, monkeypatch, kind):
    image = Image.fromarray(RNG.integers(0, 255, (20, 30, 3)).astype(np.uint8))
    image.save(path := tmp_path / f"a.{kind}", **({"compression": "tiff_lzw"} if kind == "tif" else {}))
    reads: list[str] = []
    monkeypatch.setattr("itpn.data.samples.read_file", lambda path: reads.append(path) or Path(path).read_bytes())
    monkeypatch.setattr("itpn.data.readers.read_file", lambda path: reads.append(path) or Path(path).read_bytes())
    windows, _ = cut_windows(FileReader([str(path)]), 10, 0, ReadSettings())
    assert reads == []  # by the header
    assert windows.sizes.tolist() == [[20, 30]]
    window = open_sample(windows[1][1])
    assert len(reads) <= 1
    assert torch.equal(window.decode(), decode_image(path.read_bytes())[:, :10, 10:20])


def test_a_tiled_tiff_of_8_bits_is_read_in_parts(tmp_path):
    pixels = RNG.integers(0, 255, (64, 96, 3)).astype(np.uint8)
    tifffile.imwrite(path := tmp_path / "a.tif", pixels, photometric="rgb", tile=(16, 16), compression="zlib")
    assert not isinstance(open_sample(path), StoredImage)
    windows, whole = cut_windows(FileReader([str(path)]), 16, 0, ReadSettings(max_pixels=1000))
    assert whole == []
    window = open_sample(windows[1][1], ReadSettings(max_pixels=1000))
    assert window.image.reads_windows
    assert np.array_equal(window.decode().numpy(), pixels.transpose(2, 0, 1)[:, :16, 16:32])


@pytest.mark.parametrize("mode", ["1", "inverted", "L", "LA", "RGBA", "P", "CMYK"])
def test_windows_of_a_tiff_show_what_the_whole_shows(tmp_path, mode):
    pixels = Image.fromarray(RNG.integers(0, 255, (20, 30, 3)).astype(np.uint8))
    path = tmp_path / "a.tif"
    if mode == "inverted":
        tifffile.imwrite(path, np.asarray(pixels.convert("L")), photometric="miniswhite", rowsperstrip=4)
    else:
        pixels.convert(mode).save(path)
    whole = open_sample(path).decode()
    for data in (path, path.read_bytes()):
        assert torch.equal(open_sample(WindowRequest(data, (3, 7, 10, 20))).decode(), whole[:, 3:13, 7:27])


# --- photographs that declare a value for pixels without data


TAG = (42113, "s", 0, "0", True)


def write_photo(path: Path, pixels: np.ndarray, nodata: bool = True) -> Path:
    kind = "rgb" if pixels.ndim == 3 else "minisblack"
    tifffile.imwrite(path, pixels, photometric=kind, extratags=[TAG] * nodata)
    return path


@pytest.fixture
def aerial() -> np.ndarray:
    """RGB without data on the left, and with a shadow without red."""
    pixels = RNG.integers(1, 255, (40, 60, 3)).astype(np.uint8)
    pixels[:, :5] = 0
    pixels[10:20, 10:20, 0] = 0
    return pixels


@pytest.mark.parametrize("tifffile_is_there", [True, False])
def test_a_photograph_with_pixels_without_data(tmp_path, aerial, monkeypatch, tifffile_is_there):
    if not tifffile_is_there:
        monkeypatch.setattr("itpn.data.formats.reader.find_spec", lambda name: None)
    path = write_photo(tmp_path / "a.tif", aerial)
    expected = aerial.transpose(2, 0, 1).copy()
    expected[0, 10:20, 10:20] = 1  # for 0 says that there is no data
    for data in (path, path.read_bytes()):
        image = open_sample(data)
        assert type_of(image) == ImageType(3, "uint8")
        assert image.file.nodata == 0
        assert np.array_equal(image.decode().numpy(), expected)
        assert np.array_equal(image.decode_crop(3, 2, 20, 30, (5, 5)).numpy(), expected[:, 3:23, 2:32])
    statistics = compute_statistics(FileReader([str(path)]), PLAIN)
    assert statistics.nodata == 0
    assert statistics.nodata_fraction == pytest.approx(5 / 60)
    assert statistics.minimum == (1, expected[1, :, 5:].min(), expected[2, :, 5:].min())


@pytest.mark.parametrize("kind", ["tagged", "other tag", "grey tagged", "tif", "png", "jpg", "transparent", "palette"])
def test_photographs_mix_with_one_that_has_pixels_without_data(tmp_path, aerial, kind):
    settings = ReadSettings(type=ImageType(3, "uint8"), nodata=0, example="first.tif has")
    shown, path = aerial, tmp_path / "a.tif"
    if kind == "grey tagged":
        write_photo(path, aerial[..., 1])
        shown = np.stack([aerial[..., 1]] * 3, axis=-1)
    elif kind == "other tag":
        tifffile.imwrite(path, 255 - aerial, photometric="rgb", extratags=[(42113, "s", 0, "255", True)])
        shown = 255 - aerial
    elif kind in ("tagged", "tif"):
        write_photo(path, aerial, kind == "tagged")
    else:
        mode = {"transparent": "RGBA", "palette": "P"}.get(kind, "RGB")
        Image.fromarray(aerial).convert(mode).save(path := tmp_path / f"a.{'jpg' if kind == 'jpg' else 'png'}")
        shown = decode_image(path.read_bytes()).numpy().transpose(1, 2, 0)
    expected = np.where(shown == 0, 1, shown)
    expected[(shown == 0).all(axis=2)] = 0  # whether the file declares it or not
    if kind == "other tag":
        expected[:, :5] = 0
    expected = expected.transpose(2, 0, 1)
    for data in (path, path.read_bytes()):
        image = open_sample(data, settings, "a")
        assert type_of(image) == settings.type
        assert np.array_equal(image.decode().numpy(), expected)
        assert np.array_equal(image.decode_crop(3, 2, 20, 30, (20, 30)).numpy(), expected[:, 3:23, 2:32])
        window = open_sample(WindowRequest(data, (3, 2, 20, 30)), settings, "a")
        assert np.array_equal(window.decode().numpy(), expected[:, 3:23, 2:32])
        assert not image.warnings


@pytest.mark.parametrize("large", [False, True])
def test_among_photographs_no_data_counts_and_that_is_said(tmp_path, aerial, large, monkeypatch):
    if large:
        monkeypatch.setattr("itpn.data.samples.LARGE_FILE", 1000)
    image = open_sample(write_photo(tmp_path / "a.tif", aerial), ReadSettings(type=PHOTOGRAPH))
    assert isinstance(image, StoredImage) == large
    assert np.array_equal(image.decode().numpy(), aerial.transpose(2, 0, 1))
    assert "declares 0 for pixels without data" in image.warnings["nodata"]
    plain = open_sample(write_photo(tmp_path / "b.tif", aerial, False), ReadSettings(type=PHOTOGRAPH))
    assert not plain.warnings


@pytest.mark.parametrize("kind", ["palette", "miniswhite"])
def test_numbers_that_are_no_brightness_are_not_read_in_parts(tmp_path, kind):
    """A large scanned map in a palette would become its indices."""
    pixels = RNG.integers(0, 4, (80, 80)).astype(np.uint8)
    options = {"colormap": RNG.integers(0, 2**16, (3, 256)).astype(np.uint16)} if kind == "palette" else {}
    tifffile.imwrite(path := tmp_path / "a.tif", pixels, photometric=kind, tile=(16, 16), **options)
    with pytest.raises(UnreadableImage, match="80x80 pixels, more than the 1000 allowed"):
        open_for_tiles(path, ReadSettings(max_pixels=1000))
    file = open_file(path)
    assert not file.grey_or_rgb
    tifffile.imwrite(tmp_path / "b.tif", pixels, photometric="minisblack", tile=(16, 16))
    assert open_for_tiles(tmp_path / "b.tif", ReadSettings(max_pixels=1000)).reads_windows


def test_stains_do_not_mix_with_photographs(tmp_path, aerial):
    """Three channels of 8 bits are no photograph, and a grey image among them is a mistake."""
    np.save(tmp_path / "stains.npy", aerial.transpose(2, 0, 1))
    kind = type_of(open_sample(tmp_path / "stains.npy"))
    Image.fromarray(aerial[..., 0]).save(tmp_path / "mask.png")
    with pytest.raises(MixedImages, match=r"(?s)stains.npy has 3 channels of uint8, and mask.png has 8 bits"):
        open_sample(tmp_path / "mask.png", ReadSettings(type=kind, example="stains.npy has"), "mask.png")


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_an_image_without_data_is_named(tmp_path, dtype):
    """What a network makes of it means nothing."""
    pixels = np.full((2, 40, 40), -9, dtype)
    image = open_sample(write(tmp_path / "a.tif", pixels), ReadSettings(nodata=-9))
    image.decode()
    assert image.warnings == {"empty": "no pixel has a value: all are NaN, infinite or without data"}
    pixels[0, 3, 5] = 1
    image = open_sample(write(tmp_path / "b.tif", pixels), ReadSettings(nodata=-9))
    image.decode()
    assert not image.warnings
