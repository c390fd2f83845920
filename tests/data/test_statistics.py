"""Statistics of a data set's pixels, and the normalization that is made of them."""

import io
import json
import re
import tarfile

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import itpn.data.stored
from itpn.cli import main
from itpn.data.distribution import Distribution
from itpn.data.files import find_images
from itpn.data.image_type import PHOTOGRAPH, ImageType, Pixels, check_value_range, to_option, to_pairs
from itpn.data.normalize import Normalize
from itpn.data.readers import FileReader
from itpn.data.samples import find_type, open_sample
from itpn.data.shard_images import ShardImages
from itpn.data.statistics import compute_statistics
from itpn.data.statistics_file import as_reader, read_statistics, write_statistics
from itpn.data.stored import ReadSettings
from itpn.errors import UserError

RNG = np.random.default_rng(1)


def make_set(folder, dtype, count=5, channels=3):
    """Images of values that differ from channel to channel; their pixels [channels, all]."""
    pixels = []
    for number in range(count):
        values = RNG.normal(100 * (1 + np.arange(channels)), 10, (20 + number, 30, channels))
        values = values.astype(dtype)
        np.save(folder / f"{number}.npy", values)
        pixels.append(values.reshape(-1, channels).T)
    return [str(path) for path in sorted(folder.glob("*.npy"))], np.concatenate(pixels, axis=1)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32, np.int32])
def test_numbers_are_those_of_numpy(tmp_path, dtype):
    paths, pixels = make_set(tmp_path, dtype)
    found = compute_statistics(FileReader(paths), ReadSettings())
    assert found.type == ImageType(3, np.dtype(dtype).name)
    assert (found.images, found.sampled, found.smallest, found.largest) == (5, 5, (20, 30), (24, 30))
    exact = pixels.astype(np.float64)
    assert np.allclose(found.mean, exact.mean(axis=1))
    assert np.allclose(found.std, exact.std(axis=1))
    assert found.minimum == tuple(exact.min(axis=1))
    assert found.maximum == tuple(exact.max(axis=1))
    for percent, values in found.percentiles.items():
        # of integers one of the values; numpy goes between two
        wanted = np.percentile(exact, float(percent), axis=1, method="lower" if dtype != np.float32 else "linear")
        if dtype == np.int32:
            wanted = np.percentile(exact, float(percent), axis=1)
        assert np.allclose(values, wanted), percent
    low, high = (np.array(values) for values in zip(*found.value_range, strict=True))
    scaled = ((exact - low[:, None]) / (high - low)[:, None]).clip(0, 1)
    assert np.allclose(found.scaled_mean, scaled.mean(axis=1))
    assert np.allclose(found.scaled_std, scaled.std(axis=1))


def test_each_pixel_counts_alike_in_percentiles_of_deep_numbers():
    """Of images of all sizes, whose values differ; and no more values are kept than the limit."""
    own = Distribution(np.dtype(np.float32), 1000)
    for number in range(20):
        own.add(np.full(100, number, np.float32))
        own.add(np.full(900, 100 + number, np.float32))
    kept = own._values
    assert 500 < kept.size <= 1000
    assert np.mean(kept < 100) == pytest.approx(0.1, abs=0.04)
    assert own.percentile([5, 50])[0] < 20 < 100 < own.percentile([5, 50])[1]
    mean, _ = own.scaled(0, 1000)
    assert mean == pytest.approx(own.mean / 1000, abs=0.005)


def test_memory_of_many_channels_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("itpn.data.statistics.ALL_VALUES", 2**16)
    limits = []
    monkeypatch.setattr(
        "itpn.data.statistics.Distribution", lambda dtype, limit: limits.append(limit) or Distribution(dtype, limit)
    )
    paths, _ = make_set(tmp_path, np.float32, channels=16)
    compute_statistics(FileReader(paths), ReadSettings())
    assert limits == [2**12] * 16


@pytest.mark.parametrize(
    ("value_range", "expected"),
    [
        (("dtype",), [(0, 65535)] * 2),
        (("0", "1000"), [(0, 1000)] * 2),
        (("0", "500", "100", "600"), [(0, 500), (100, 600)]),
        (("0%", "100%"), None),
    ],
)
def test_value_ranges(tmp_path, value_range, expected):
    paths, pixels = make_set(tmp_path, np.uint16, channels=2)
    found = compute_statistics(FileReader(paths), ReadSettings(), value_range)
    expected = expected or list(zip(pixels.min(axis=1), pixels.max(axis=1), strict=True))
    assert [*found.value_range] == expected


def test_no_data_enters_nothing(tmp_path):
    paths, pixels = make_set(tmp_path, np.float32)
    values = np.load(paths[0])
    first = values.copy()
    values[:5] = np.nan
    np.save(paths[0], values)
    found = compute_statistics(FileReader(paths), ReadSettings())
    kept = np.concatenate([first[5:].reshape(-1, 3).T, pixels[:, first[..., 0].size :]], axis=1).astype(np.float64)
    assert np.allclose(found.mean, kept.mean(axis=1))
    assert found.nodata_fraction == pytest.approx(1 - kept.size / pixels.size)


@pytest.mark.parametrize("settings", [ReadSettings(), ReadSettings(type=ImageType(2, "uint16"), example="x has")])
def test_what_geotiffs_declare_enters_nothing(tmp_path, settings):
    for number in range(3):
        pixels = np.full((2, 20, 30), 500 + number, np.uint16)
        pixels[:, :5] = 0
        tag = (42113, "s", 0, "0", True)
        options = {"photometric": "minisblack", "planarconfig": "separate", "extratags": [tag]}
        tifffile.imwrite(tmp_path / f"{number}.tif", pixels, **options)
    found = compute_statistics(FileReader([str(tmp_path / f"{number}.tif") for number in range(3)]), settings)
    assert (found.nodata, found.nodata_fraction, found.minimum) == (0, 0.25, (500, 500))


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_a_value_for_no_data_that_a_later_file_declares(tmp_path, dtype):
    """It is that of all images: of those before it, too."""
    for number in range(3):
        pixels = np.full((2, 20, 30), 500 + number, dtype)
        pixels[:, :5] = 7
        options = {"extratags": [(42113, "s", 0, "7", True)]} if number == 1 else {}
        path = tmp_path / f"{number}.tif"
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="separate", **options)
    found = compute_statistics(FileReader([str(tmp_path / f"{number}.tif") for number in range(3)]), ReadSettings())
    assert (found.nodata, found.nodata_fraction, found.minimum, found.maximum) == (7, 0.25, (500, 500), (502, 502))
    assert not found.warnings


def test_a_value_that_stands_for_no_data(tmp_path):
    paths, _ = make_set(tmp_path, np.int16)
    values = np.load(paths[0])
    values[:5] = -9999
    np.save(paths[0], values)
    assert "give --data.nodata -9999" in compute_statistics(FileReader(paths), ReadSettings()).notes[0]
    found = compute_statistics(FileReader(paths), ReadSettings(nodata=-9999))
    assert min(found.minimum) > 0
    assert found.nodata == -9999
    assert not found.notes


def test_no_value_at_all(tmp_path):
    np.save(tmp_path / "a.npy", np.full((20, 30, 2), np.nan, np.float32))
    with pytest.raises(UserError, match=r"no pixel of the 1 images that were read .* has a value"):
        compute_statistics(FileReader([str(tmp_path / "a.npy")]), ReadSettings())


def test_a_sample_is_spread_out_and_passes_over_corrupt_files(tmp_path):
    paths, _ = make_set(tmp_path, np.uint16, count=9)
    (tmp_path / "4.npy").write_bytes(b"corrupt")
    assert compute_statistics(FileReader(paths), ReadSettings(), sample=3).sampled == 3


def make_shards(folder, compressed=False):
    """Three shards of 2, 3 and 4 images of one value each: 0, 1, ... 8."""
    number = 0
    for shard, count in enumerate((2, 3, 4)):
        with tarfile.open(folder / f"{shard}.tar", "w:gz" if compressed else "w") as tar:
            for _ in range(count):
                file = io.BytesIO()
                np.save(file, np.full((8, 9, 2), number, np.uint16))
                member = tarfile.TarInfo(f"{number}.npy")
                member.size = file.tell()
                file.seek(0)
                tar.addfile(member, file)
                number += 1
    return find_images([folder])


@pytest.mark.parametrize("compressed", [False, True])
def test_of_shards_a_sample_is_spread_over_all(tmp_path, compressed):
    reader = as_reader(make_shards(tmp_path, compressed))
    assert isinstance(reader, ShardImages)
    found = compute_statistics(reader, ReadSettings(), sample=3)
    assert (found.images, found.sampled) == (9, 3)
    assert (found.minimum, found.maximum, found.mean) == ((0, 0), (8, 8), (4, 4))
    assert [reader.name(index) for index in (0, 2, 8)] == ["0.tar/0.npy", "1.tar/2.npy", "2.tar/8.npy"]
    assert reader[0][1] == reader[0][1]  # backwards too


def test_of_shards_images_are_read_when_it_is_their_turn(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("itpn.data.shard_images.read_file", lambda path, start, size: read.append(path) or b"corrupt")
    source = make_shards(tmp_path)
    settings, name = find_type(source, ReadSettings())
    assert (settings.type, name) == (ImageType(2, "uint16"), "0.tar/0.npy")
    reader = as_reader(source)
    assert not read
    assert reader[4][1] == b"corrupt"
    assert read == [str(tmp_path / "1.tar")]


def test_shards_by_the_command(tmp_path, capsys):
    make_shards(tmp_path)
    (tmp_path / "2.tar").write_bytes((tmp_path / "2.tar").read_bytes()[:2500])  # two images, and a part of the third
    assert main(["stats", str(tmp_path), "--sample", "4"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"4 of [67] images, 9x8 px, 2 channels of uint16", out)
    assert "2.tar: corrupt shard" in " ".join(err.split())


def test_the_file_is_read_again(tmp_path):
    paths, _ = make_set(tmp_path, np.uint16)
    found = compute_statistics(FileReader(paths), ReadSettings())
    write_statistics(tmp_path / "stats.json", found)
    assert read_statistics(tmp_path / "stats.json") == found
    for content in ("[]", "{}", "x", '{"images": 1}'):
        (tmp_path / "stats.json").write_text(content)
        with pytest.raises(UserError, match="is not a file of `itpn stats`"):
            read_statistics(tmp_path / "stats.json")


@pytest.mark.parametrize(
    "wrong",
    [
        {"scaled_mean": [float("nan")] * 3},
        {"scaled_mean": ["a"] * 3},
        {"scaled_std": [0.1]},
        {"scaled_std": [0.1, 0, 0.1]},
        {"value_range": [[5, 5]] * 3},
        {"nodata": "x"},
        {"nodata_fraction": "x"},
        {"fingerprint": 5},
    ],
)
def test_numbers_that_are_none_of_images(tmp_path, wrong):
    paths, _ = make_set(tmp_path, np.uint16)
    write_statistics(tmp_path / "stats.json", compute_statistics(FileReader(paths), ReadSettings()))
    content = json.loads((tmp_path / "stats.json").read_text())
    (tmp_path / "stats.json").write_text(json.dumps(content | wrong))
    with pytest.raises(UserError, match="is not a file of `itpn stats`"):
        read_statistics(tmp_path / "stats.json")


@pytest.mark.parametrize("nodata", [-9999, 0.5, 70_000])
def test_no_data_that_no_pixel_can_be(tmp_path, nodata):
    paths, _ = make_set(tmp_path, np.uint16)
    with pytest.raises(UserError, match=f"--data.nodata is {nodata:g}, which no pixel of uint16 can be"):
        compute_statistics(FileReader(paths), ReadSettings(nodata=nodata))


def test_channels_that_tell_nothing(tmp_path):
    pixels = RNG.normal(size=(20, 30, 3)).astype(np.float32)
    pixels[..., 1], pixels[..., 2] = np.nan, 5
    np.save(tmp_path / "a.npy", pixels)
    found = compute_statistics(FileReader([str(tmp_path / "a.npy")]), ReadSettings())
    assert found.notes == ("channel 1 is without data in all images", "channel 2 is of one value in all images")
    write_statistics(tmp_path / "stats.json", found)
    assert read_statistics(tmp_path / "stats.json") == found


def test_channels_of_one_value_are_named_in_a_short_line(tmp_path):
    np.save(tmp_path / "a.npy", np.full((30, 40, 20), 7, np.uint16))
    found = compute_statistics(FileReader([str(tmp_path / "a.npy")]), ReadSettings())
    assert found.notes == ("channels 0, 1, 2, 3, 4, 5, 6, 7 and 12 more are of one value in all images",)


def test_what_training_refuses_does_not_count(tmp_path, monkeypatch):
    """An image too large to be decoded as a whole, unless parts of it are read."""
    paths, _ = make_set(tmp_path, np.uint16, channels=2)
    large = str(tmp_path / "large.npy")
    np.save(large, np.zeros((2, 100, 100), np.uint16))
    reader, reading = FileReader([large, *paths]), ReadSettings(max_pixels=5000)
    found = compute_statistics(reader, reading)
    assert found.sampled == len(paths)
    assert found.mean == compute_statistics(FileReader(paths), reading).mean
    assert f"cannot be read and left out: 1 of the images; the first is {large}: 100x100 pixels" in found.warnings[0]
    monkeypatch.setattr(itpn.data.stored, "PART", 2500)
    assert compute_statistics(reader, reading, in_parts=True).sampled == len(paths) + 1


def test_many_channels_are_sampled_by_their_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(itpn.data.stored, "PART_BYTES", 1000 * 50 * 16)
    np.save(tmp_path / "a.npy", RNG.integers(0, 9, (1000, 50, 50)).astype(np.uint8).transpose(1, 2, 0))
    image = open_sample(tmp_path / "a.npy", ReadSettings(axes="HWC"))
    assert image.decode_some().shape == (1000, 16 * 7**2)


@pytest.mark.parametrize(
    "wrong", [("1",), ("a", "b"), ("5", "5"), ("2", "1"), ("1%", "2"), ("0%", "101%"), ("nan", "1"), ("1", "2", "3")]
)
def test_wrong_ranges(wrong):
    with pytest.raises(UserError, match=r"--data\.value-range"):
        check_value_range(wrong)


def test_ranges_as_options():
    pairs = ((0.0, 1.5), (2.0, 3.0))
    assert to_pairs(to_option(pairs), 2) == pairs
    assert to_pairs(("0", "10000"), 3) == ((0.0, 10000.0),) * 3
    assert to_option(((0.0, 1.0), (0.0, 1.0))) == ("0", "1")
    with pytest.raises(UserError, match="a pair for each of 3 channels, not 4 values"):
        to_pairs(("0", "1", "2", "3"), 3)


# --- normalization


def test_photographs_are_normalized_as_ever():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    normalize = Normalize(Pixels(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1)))
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.1)))
    assert torch.equal(normalize(images), (images.float() / 255 - mean) / std)
    assert torch.equal(normalize.undo(normalize(images)), images)
    assert normalize.find_valid(images) is None


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_stored_pixels(dtype):
    images = torch.from_numpy(RNG.integers(0, 3000, (2, 2, 4, 5)).astype(dtype))
    ranges = ((0.0, 2000.0), (1000.0, 2000.0))
    nodata = None if dtype == "float32" else 7.0
    low, high = zip(*ranges, strict=True)
    normalize = Normalize(Pixels(ImageType(2, dtype), low, high, (0.5,), (0.25, 0.5), nodata))
    images[0, 0, 0, 0] = float("nan") if nodata is None else 7
    result = normalize(images)
    assert result.dtype == torch.float32
    for channel, (low, high) in enumerate(ranges):
        exact = ((images[:, channel].numpy().astype(np.float64) - low) / (high - low)).clip(0, 1)
        exact = (exact - 0.5) / (0.25, 0.5)[channel]
        if channel == 0:
            exact[0, 0, 0] = 0.0
        assert np.allclose(result[:, channel].numpy(), exact, atol=1e-6)
    assert int((~normalize.find_valid(images)).sum()) == 1
    inside = torch.from_numpy(RNG.integers(1000, 2000, (1, 2, 4, 5)).astype(dtype))
    assert torch.allclose(normalize.undo(normalize(inside)), inside.float(), atol=0.01)


# --- the command


def test_the_command(tmp_path, capsys):
    make_set(tmp_path, np.uint16, channels=2)
    assert main(["stats", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "5 of 5 images, 30x20 to 30x24 px, 2 channels of uint16" in out
    assert "--data.mean " in out
    stored = json.loads((tmp_path / "stats.json").read_text())
    assert (stored["channels"], stored["dtype"], len(stored["mean"])) == (2, "uint16", 2)


def test_photographs_have_statistics_too(tmp_path, capsys):
    Image.new("L", (30, 20), 51).save(tmp_path / "a.png")
    assert main(["stats", str(tmp_path), "--out", str(tmp_path / "b.json")]) == 0
    assert read_statistics(tmp_path / "b.json").type == PHOTOGRAPH
    assert "--data.mean 0.2 0.2 0.2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--value-range", "5"], "--data.value-range must be dtype, LOW HIGH or PLOW% PHIGH%, not 5"),
        (["--out", "no/such/folder/stats.json"], "no/such/folder"),
    ],
)
def test_mistakes(tmp_path, capsys, words, expected):
    make_set(tmp_path, np.uint16)
    assert main(["stats", str(tmp_path), *words]) in (1, 2)
    assert expected in capsys.readouterr().err


def test_a_log_is_told_when_it_takes_long(tmp_path, capsys, monkeypatch):
    make_set(tmp_path, np.uint16)
    assert main(["stats", str(tmp_path)]) == 0
    assert "so far" not in capsys.readouterr().err
    monkeypatch.setattr("itpn.tasks.statistics.PATIENCE", -1)
    assert main(["stats", str(tmp_path)]) == 0
    assert capsys.readouterr().err.count("reading mean, std and value range of the images: 1 of 5 so far") == 1


def test_files_that_are_not_read_whole_are_named(tmp_path, capsys):
    make_set(tmp_path, np.uint16)
    np.save(tmp_path / "0.npy", np.zeros((4, 20, 30, 3), np.uint16))
    (tmp_path / "4.npy").write_bytes(b"corrupt")
    assert main(["stats", str(tmp_path)]) == 0
    err = capsys.readouterr().err
    assert "0.npy: it has several pages, of which the first is read" in err
    assert "cannot be read and left out: 1 of the images; the first is" in err
    assert "4.npy: not an image of a known format" in err


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path, capsys, monkeypatch):
    make_set(tmp_path, np.uint16)
    monkeypatch.setattr("itpn.tasks.statistics.compute_statistics", lambda *_: pytest.fail("it was computed"))
    (tmp_path / "stats.json").mkdir()
    assert main(["stats", str(tmp_path)]) == 2
    assert "stats.json cannot be written: Is a directory" in capsys.readouterr().err
    assert main(["stats", str(tmp_path / "0.npy")]) == 2
    assert "is no folder, into which the numbers could be written: give --out FILE" in capsys.readouterr().err


def test_a_mixture_is_named(tmp_path, capsys):
    make_set(tmp_path, np.uint16)
    np.save(tmp_path / "z.npy", np.zeros((20, 30, 4), np.uint16))
    assert main(["stats", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "0.npy has 3 channels of uint16" in err
    assert "z.npy has 4 channels of uint16" in err
    assert err.count("\n") == 1
