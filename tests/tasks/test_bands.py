"""Images in one file a band: joined by their names, for every command as if they were one file."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from itpn.cli import main
from itpn.data.bands import name_image, split_bands
from itpn.data.decode import UnreadableImage
from itpn.data.files import find_images
from itpn.data.readers import FileReader
from itpn.data.samples import WindowOf, open_sample
from itpn.data.stored import PLAIN, Reading, StoredImage
from itpn.data.windows import cut_windows
from itpn.errors import UserError
from itpn.training.config import read_yaml

NAMES = ("B02.tif", "B8A.tif", "B11.tif")
GIVEN = ("--data.bands", *NAMES)
SHORT = (
    "--data.batch-size",
    "4",
    "--data.num-workers",
    "0",
    "--trainer.max-steps",
    "1",
    "--trainer.accelerator",
    "cpu",
)
SMALL = ("--data.img-size", "32", "--model.decoder-embed-dim", "32", "--model.decoder-depth", "1", *SHORT)
HEIGHT, WIDTH = 40, 48


def draw(number: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    return rng.normal(1000 * (1 + np.arange(3))[:, None, None], 50, (3, HEIGHT, WIDTH)).astype(np.uint16)


def write(folder: Path, number: int, below: bool) -> None:
    """The bands of an image, in a folder of its own or beside others."""
    for name, band in zip(NAMES, draw(number), strict=True):
        path = folder / f"T{number}" / name if below else folder / f"T{number}_{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, band, tile=(16, 16))


@pytest.fixture
def scenes(tmp_path):
    """Four images in files beside each other, and two in folders of their own; masks for all."""
    for number in range(6):
        write(tmp_path / "images", number, below=number > 3)
        mask = (draw(number)[0] > 1000).astype(np.uint8)
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / "masks" / f"T{number}.png")
    tifffile.imwrite(tmp_path / "images" / "T0_preview.tif", draw(0))
    return tmp_path


@pytest.mark.parametrize("prefix", ["", "*", "*_"])
def test_files_that_begin_alike_make_an_image(scenes, prefix):
    folder = scenes / "images"
    if prefix == "*_":  # with what is between the names
        for number in (4, 5):
            shutil.rmtree(folder / f"T{number}")
    source = find_images([folder], bands=[prefix + name for name in NAMES])
    count = 4 if prefix == "*_" else 6
    assert [name_image(image) for image in source.images] == [str(folder / f"T{n}") for n in range(count)]
    assert split_bands(source.images[1]) == tuple(str(folder / f"T1_{name}") for name in NAMES)
    assert "not among --data.bands, and not read: 1" in source.notes
    files = FileReader(source.images)
    for number in range(count):
        name, data = files[number]
        image = open_sample(data, PLAIN, name)
        assert (name, files.name(number)) == (str(folder / f"T{number}"),) * 2
        assert str(image.type) == "3 channels of uint16"
        assert np.array_equal(image.decode(), draw(number))
        window = open_sample(WindowOf(data, (7, 5, 20, 30)), PLAIN, name)
        assert np.array_equal(window.decode(), draw(number)[:, 7:27, 5:35])
    windows, whole = cut_windows(files, 32, 8, PLAIN)
    assert (len(windows), whole) == (4 * count, [])  # tiled files are read by region


def test_the_order_of_bands_is_that_of_the_channels(scenes):
    source = find_images([scenes / "images" / "T4" / "B11.tif"], bands=["B11.tif", "B02.tif"])  # one file finds others
    _, data = FileReader(source.images)[0]
    assert np.array_equal(open_sample(data).decode(), draw(4)[[2, 0]])


@pytest.mark.parametrize("lost", NAMES)
def test_a_band_that_is_missing(scenes, lost, capsys):
    (scenes / "images" / f"T2_{lost}").unlink()
    assert main(["stats", str(scenes / "images"), *GIVEN]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"image {scenes}/images/T2 has no band {lost}: {scenes}/images/T2_{lost} is not there" in line


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((20, 24), np.uint16), "T0_B02.tif has 48x40 pixels of uint16, and T0_B11.tif 24x20 pixels of uint16"),
        (np.zeros((HEIGHT, WIDTH), np.float32), "and T0_B11.tif 48x40 pixels of float32: resample the bands"),
        (None, "band T0_B11.tif: "),
    ],
)
def test_bands_that_do_not_fit(scenes, pixels, words):
    path = scenes / "images" / "T0_B11.tif"
    path.write_bytes(b"no image") if pixels is None else tifffile.imwrite(path, pixels)
    _, data = FileReader(find_images([scenes / "images"], bands=NAMES).images)[0]
    with pytest.raises(UnreadableImage, match=words):
        open_sample(data)


def test_values_without_data_are_those_of_the_first_band(tmp_path):
    for name, value in {"B1.tif": "-9", "B2.tif": "0"}.items():
        pixels = np.array([[-9, 0], [5, 7]], np.int16)
        tifffile.imwrite(tmp_path / name, pixels, extratags=[(42113, "s", 0, value, True)])
    _, data = FileReader(find_images([tmp_path], bands=("B1.tif", "B2.tif")).images)[0]
    image = open_sample(data, Reading(nodata=-9))
    assert isinstance(image, StoredImage)
    assert image.file.nodata == -9
    assert image.decode().tolist() == [[[-9, 0], [5, 7]], [[-9, -9], [5, 7]]]


@pytest.mark.parametrize(
    ("bands", "words"),
    [
        (["B02.tif", "B02.tif"], "names B02.tif twice"),
        (["B02.tif", "*"], "takes the ends of file names"),
        (["B*.tif"], "takes the ends of file names"),
        (["x/B02.tif"], "takes the ends of file names"),
        (["B99.tif"], "no image in .* has a name that ends in B99.tif"),
    ],
)
def test_impossible_bands(scenes, bands, words):
    with pytest.raises(UserError, match=words):
        find_images([scenes / "images"], bands=bands)


def test_bands_are_for_tasks_that_look_for_images_in_folders(scenes, capsys):
    for recipe in ("classifier_small", "detector_small"):
        given = ["--data.root", str(scenes), "--model.scratch", "--model.name", "itpn_nano", *GIVEN]
        assert main(["train", recipe, *given]) == 2
        assert "--data.bands is for pre-training and segmentation: leave it out" in capsys.readouterr().err


def test_from_statistics_to_predictions(scenes, capsys):
    """Every command reads the images that one file each would be; those of a checkpoint know their bands."""
    folder, out = scenes / "images", scenes / "runs"
    assert main(["stats", str(folder), *GIVEN]) == 0
    stats = json.loads((folder / "stats.json").read_text())
    assert (stats["images"], stats["channels"], len(stats["mean"])) == (6, 3, 3)
    assert stats["mean"][2] == pytest.approx(np.mean([draw(n)[2] for n in range(6)]), rel=1e-4)

    assert main(["train", "itpn-pixel_nano", "--data.root", str(folder), "--output-dir", str(out), *GIVEN, *SMALL]) == 0
    run = out / "itpn-pixel_nano/default"
    assert "6 images" in capsys.readouterr().out
    assert read_yaml(run / "config.yaml").values["data"]["bands"] == list(NAMES)
    weights = str(run / "model.safetensors")
    assert main(["predict", weights, str(folder), "--out", str(scenes / "seen")]) == 0

    segmenter = ["--data.root", str(scenes), "--data.val-fraction", "0.4", "--data.img-size", "32", *SHORT]
    segmenter += ["--model.checkpoint", weights, "--output-dir", str(out), *GIVEN]
    assert main(["train", "segmenter_nano", *segmenter]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "4 images (2 classes of pixels, 2 more to evaluate on)" in said
    trained = str(out / "segmenter_nano/default/model.safetensors")
    evaluate = ["evaluate", "segmenter_nano", "--checkpoint", trained, "--data.root", str(scenes)]
    assert main([*evaluate, "--data.num-workers", "0"]) == 0

    found = scenes / "found"
    assert main(["predict", trained, str(folder / "T4"), str(folder / "T1_B02.tif"), "--out", str(found)]) == 0
    rows = list(csv.DictReader((found / "predictions.csv").open()))
    assert [row["image"] for row in rows] == [str(folder / "T4"), str(folder / "T1")]
    labels = next(found.glob("0000-*-labels.*"))
    assert Image.open(labels).size == (WIDTH, HEIGHT)
