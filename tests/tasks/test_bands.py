"""Images in one file a band: joined by their names, for every command as if they were one file."""

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from itpn.cli import main
from itpn.data.annotations import read_objects
from itpn.data.bands import name_image, split_bands
from itpn.data.decode import UnreadableImage
from itpn.data.files import find_images
from itpn.data.labelled import find_labelled
from itpn.data.readers import FileReader
from itpn.data.samples import WindowRequest, open_sample
from itpn.data.stored import PLAIN, ReadSettings, StoredImage
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
        window = open_sample(WindowRequest(data, (7, 5, 20, 30)), PLAIN, name)
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
    image = open_sample(data, ReadSettings(nodata=-9))
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


@pytest.fixture
def classes(tmp_path):
    """Two folders of classes, each of two images beside each other and one in a folder of its own."""
    for number in range(6):
        write(tmp_path / "classes" / "ab"[number % 2], number, below=number > 3)
    tifffile.imwrite(tmp_path / "classes/a/preview.tif", draw(0))
    return tmp_path / "classes"


def test_class_folders_of_bands(classes, tmp_path, capsys):
    """A classifier is trained, evaluated and used on images in one file a band; the checkpoint knows the bands."""
    given = ["--data.root", str(classes), "--data.img-size", "32", "--model.name", "itpn_nano", "--model.scratch"]
    given += ["--data.val-fraction", "0.34", "--output-dir", str(tmp_path / "runs"), *SHORT]
    assert main(["train", "classifier_small", *given, *GIVEN]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "4 images (2 classes, 2 more to evaluate on)" in said
    assert "not read: 1 not among --data.bands" in said
    weights = str(tmp_path / "runs/classifier_small/default/model.safetensors")
    out = tmp_path / "evaluated"
    evaluate = ["evaluate", "classifier_small", "--checkpoint", weights, "--data.root", str(classes)]
    assert main([*evaluate, "--data.num-workers", "0", "--out", str(out)]) == 0
    assert json.loads((out / "evaluation.json").read_text())["images"] == 2  # those that were held out
    assert main(["predict", weights, str(classes / "b"), "--out", str(tmp_path / "found")]) == 0
    rows = csv.DictReader((tmp_path / "found/predictions.csv").open())
    assert [*dict.fromkeys(row["image"] for row in rows)] == [str(classes / "b" / f"T{number}") for number in (1, 3, 5)]


def test_a_band_that_a_class_lacks(classes, capsys):
    (classes / "b/T3_B11.tif").unlink()
    given = ["--data.root", str(classes), "--model.name", "itpn_nano", "--model.scratch", *GIVEN]
    assert main(["train", "classifier_small", *given]) == 2
    assert f"image {classes}/b/T3 has no band B11.tif" in capsys.readouterr().err


def test_bands_are_not_for_shards(classes, tmp_path):
    (tmp_path / "train.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"--data.bands is for images in files, not for tar shards"):
        find_labelled([str(tmp_path / "train.tar")], bands=NAMES)


def annotate(folder: Path, names: Sequence[str]) -> None:
    """COCO's annotations of the images of ``scenes``, by these names: a box each, of two classes."""
    images = [{"id": n, "file_name": name, "height": HEIGHT, "width": WIDTH} for n, name in enumerate(names)]
    boxes = [{"image_id": n, "category_id": 1 + n % 2, "bbox": [n, 5, 20, 10]} for n in range(len(names))]
    classes = [{"id": 1, "name": "boat"}, {"id": 2, "name": "buoy"}]
    content = json.dumps({"images": images, "annotations": boxes, "categories": classes})
    (folder / "annotations").mkdir()
    for split in ("train", "val"):
        (folder / "annotations" / f"instances_{split}.json").write_text(content)


@pytest.mark.parametrize("form", ["T{}", "T{}.tif", "T{}_B8A.tif", "T{}_"])
def test_annotations_name_an_image_or_one_of_its_files(scenes, form):
    annotate(scenes, [form.format(number) for number in range(4)])
    images = read_objects(str(scenes), "train", log=pytest.fail, bands=NAMES)
    assert [images.files.name(index) for index in range(4)] == [str(scenes / "images" / f"T{n}") for n in range(4)]
    name, data, *_ = images[2]
    assert np.array_equal(open_sample(data, PLAIN, name).decode(), draw(2))
    assert [one["bbox"] for one in images.objects_of(2)] == [[2, 5, 20, 10]]


@pytest.mark.parametrize("form", ["T{}", "T{}/B11.tif"])
def test_annotations_of_images_in_folders_of_their_own(scenes, form):
    annotate(scenes, [form.format(number) for number in (4, 5)])
    images = read_objects(str(scenes), "train", log=pytest.fail, bands=NAMES)
    name, data, *_ = images[1]
    assert name == str(scenes / "images/T5")
    assert np.array_equal(open_sample(data, PLAIN, name).decode(), draw(5))


def test_annotations_that_list_every_band(scenes):
    annotate(scenes, [f"T{number}_{band}" for number in range(4) for band in NAMES])
    lines: list[str] = []
    images = read_objects(str(scenes), "train", log=lines.append, bands=NAMES)
    assert (len(images), len(images.objects_of(0))) == (4, 3)
    assert any("listed with two ids, whose objects were joined: 8" in line for line in lines)


def test_annotated_images_that_lack_a_band_or_all(scenes):
    (scenes / "images/T1_B11.tif").unlink()
    annotate(scenes, ["T0", "T9"])
    lines: list[str] = []
    assert len(read_objects(str(scenes), "train", log=lines.append, bands=NAMES)) == 1
    assert any(line.strip().startswith("images not on disk: 1 (") and line.endswith("/T9)") for line in lines)
    shutil.rmtree(scenes / "annotations")
    annotate(scenes, ["T0", "T1_B02.tif"])
    with pytest.raises(UserError, match=f"image {scenes}/images/T1 has no band B11.tif"):
        read_objects(str(scenes), "train", bands=NAMES)


@pytest.mark.parametrize("listed", [False, True])
def test_yolo_labels_have_the_name_of_the_image(scenes, listed):
    shutil.rmtree(scenes / "masks")
    (scenes / "labels").mkdir()
    for number in range(6):
        (scenes / "labels" / f"T{number}.txt").write_text(f"{number % 2} 0.5 0.5 0.25 0.5\n")
    (scenes / "list.txt").write_text("".join(f"images/T{number}_{band}\n" for number in range(4) for band in NAMES))
    where = "list.txt" if listed else "images"
    (scenes / "data.yaml").write_text(f"names: [boat, buoy]\ntrain: {where}\nval: {where}\n")
    lines: list[str] = []
    images = read_objects(str(scenes), "train", log=lines.append, bands=NAMES)
    assert lines == ([] if listed else [f"{scenes}/data.yaml: not read: 1 not among --data.bands in {scenes}/images"])
    assert len(images) == (4 if listed else 6)
    for index in range(len(images)):
        ((known,), name) = images.objects_of(index), images.files.name(index)
        assert name == str(scenes / "images" / f"T{index}")
        assert (known["label"], known["bbox"]) == (index % 2, [18, 10, 12, 20])


def test_pascal_voc_and_label_images_of_bands(scenes):
    images = read_objects(str(scenes), "train", log=lambda line: None, bands=NAMES)  # `masks` of one integer an object
    assert (len(images), images.files.name(5)) == (6, str(scenes / "images/T5"))
    voc = scenes / "voc"
    shutil.copytree(scenes / "images", voc / "JPEGImages")
    (voc / "Annotations").mkdir()
    box = "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>20</xmax><ymax>30</ymax></bndbox>"
    for number in range(6):
        text = f"<annotation><object><name>boat</name>{box}</object></annotation>"
        (voc / "Annotations" / f"T{number}.xml").write_text(text)
    images = read_objects(str(voc), "train", log=lambda line: None, bands=NAMES)
    assert [len(images.objects_of(index)) for index in range(len(images))] == [1] * 6


def test_a_detector_of_bands(scenes, capsys):
    """Trained, evaluated and used on images in one file a band, by annotations that name one of the files."""
    annotate(scenes, [f"T{number}_B02.tif" for number in range(4)])
    out = scenes / "runs"
    given = ["--data.root", str(scenes), "--data.img-size", "64", "--model.name", "itpn_nano", "--model.scratch"]
    assert main(["train", "detector_nano", *given, "--output-dir", str(out), *SHORT, *GIVEN]) == 0
    weights = str(out / "detector_nano/default/model.safetensors")
    evaluate = ["evaluate", "detector_nano", "--checkpoint", weights, "--data.root", str(scenes)]
    assert main([*evaluate, "--data.num-workers", "0", "--out", str(scenes / "evaluated")]) == 0
    found = scenes / "found"
    assert main(["predict", weights, str(scenes / "images/T4"), "--out", str(found)]) == 0
    (said,) = json.loads((found / "predictions.json").read_text())
    assert said["image"] == str(scenes / "images/T4")


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
