"""Runs of every task on images of five bands of 16 bits, from the files to predictions."""

import csv
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import yaml
from PIL import Image
from safetensors import safe_open

import itpn
from itpn.checkpoints.files import read_checkpoint
from itpn.cli import main
from itpn.data.files import find_training_images
from itpn.data.image_type import ImageType, Pixels
from itpn.data.normalize import Normalize
from itpn.tasks.configs import (
    ClassificationConfig,
    ClassificationDataConfig,
    ClassificationModelConfig,
    DetectionConfig,
    DetectionDataConfig,
    PretrainingConfig,
    PretrainingDataConfig,
    SegmentationConfig,
    SegmentationDataConfig,
)
from itpn.tasks.pixels import adopt_pixels, resolve_pixels, stored_normalize
from itpn.tasks.spec import find_task

BANDS = 5
SHORT = (
    *("--data.batch-size", "4", "--data.num-workers", "0", "--trainer.max-steps", "2", "--trainer.accelerator", "cpu"),
    *("--trainer.visualize-every-n-steps", "1"),
)
SMALL = ("--data.img-size", "32", "--model.decoder-embed-dim", "32", "--model.decoder-depth", "1", *SHORT)


def draw(number: int, dtype: str = "uint16") -> tuple[np.ndarray, np.ndarray]:
    """Bands [5, 40, 48] with a brighter rectangle, and where that is [40, 48]."""
    rng = np.random.default_rng(number)
    inside = np.zeros((40, 48), bool)
    top, left = rng.integers(2, 16, 2)
    inside[top : top + 18, left : left + 22] = True
    pixels = rng.normal(1000 * (1 + np.arange(BANDS))[:, None, None], 50, (BANDS, 40, 48))
    return np.where(inside, 1.5 * pixels, pixels).astype(dtype), inside


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="separate", tile=(16, 16))


@pytest.fixture(scope="module")
def bands(tmp_path_factory):
    """The same images for every task: `plain`, `classes`, `masks` and `objects`."""
    root = tmp_path_factory.mktemp("bands")
    for split, count in {"train": 6, "val": 3}.items():
        objects = []
        for number in range(count):
            pixels, inside = draw(number + 100 * (split == "val"))
            write(root / f"classes/{split}/{('a', 'b')[number % 2]}/{number}.tif", pixels)
            write(root / f"masks/images/{split}/{number}.tif", pixels)
            write(root / f"objects/{split}/{number}.tif", pixels)
            if split == "train":
                write(root / f"plain/{number}.tif", pixels)
            mask = root / f"masks/annotations/{split}/{number}.png"
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(inside.astype(np.uint8)).save(mask)
            rows, cols = np.nonzero(inside)
            x, y = int(cols.min()), int(rows.min())
            w, h = int(cols.max()) - x + 1, int(rows.max()) - y + 1
            polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            one = {"id": number + 1, "image_id": number, "category_id": 1, "bbox": [x, y, w, h], "area": w * h}
            objects.append({**one, "iscrowd": 0, "segmentation": polygon})
        images = [{"id": n, "file_name": f"{n}.tif", "height": 40, "width": 48} for n in range(count)]
        coco = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "field"}]}
        (root / "objects/annotations").mkdir(parents=True, exist_ok=True)
        (root / f"objects/annotations/instances_{split}.json").write_text(json.dumps(coco))
    return root


@pytest.fixture(scope="module")
def pretrained(bands, tmp_path_factory):
    """The folder of a pre-training run on them."""
    out = tmp_path_factory.mktemp("runs")
    command = ["train", "itpn-pixel_nano", "--data.root", str(bands / "plain"), "--output-dir", str(out), *SMALL]
    assert main(command) == 0
    return out / "itpn-pixel_nano/default"


def read_preprocessing(run: Path) -> dict:
    with safe_open(run / "model.safetensors", "pt") as file:
        return json.loads(file.metadata()["preprocessing"])


def test_pretraining_takes_channels_and_statistics_from_the_images(bands, pretrained):
    config = yaml.safe_load((pretrained / "config.yaml").read_text())
    assert (config["model"]["in_chans"], config["data"]["dtype"]) == (BANDS, "uint16")
    stored = read_preprocessing(pretrained)
    assert (stored["channels"], stored["dtype"]) == (BANDS, "uint16")
    assert stored["value_range"] == config["data"]["value_range"]
    pixels = np.concatenate([draw(n)[0].reshape(BANDS, -1) for n in range(6)], axis=1).astype(np.float64)
    low, high = (np.array(stored["value_range"], float)[start::2, None] for start in (0, 1))
    scaled = ((pixels - low) / (high - low)).clip(0, 1)
    assert np.allclose(stored["mean"], scaled.mean(axis=1), rtol=1e-4)
    assert np.allclose(stored["std"], scaled.std(axis=1), rtol=1e-4)
    assert list((pretrained / "reconstructions").glob("*.png"))


def test_a_resumed_run_keeps_the_statistics(bands, tmp_path, capsys):
    root = tmp_path / "images"
    for number in range(6):
        write(root / f"{number}.tif", draw(number)[0])
    command = ["train", "itpn-pixel_nano", "--data.root", str(root), "--output-dir", str(tmp_path), *SMALL]
    assert main(command) == 0
    before = read_preprocessing(tmp_path / "itpn-pixel_nano/default")
    for number in range(6):
        write(root / f"{number}.tif", draw(number)[0] // 2)  # other statistics
    assert main([*command, "--trainer.max-steps", "3"]) == 0
    assert read_preprocessing(tmp_path / "itpn-pixel_nano/default") == before
    assert main([*command, "--trainer.max-steps", "3", "--data.value-range", "0", "9000"]) == 2
    assert "choose another --name" in capsys.readouterr().err


def test_no_data_does_not_change_in_a_run(bands, tmp_path, capsys):
    """What the images have left open is a setting of the run too."""
    command = ["train", "itpn-pixel_nano", "--data.root", str(bands / "plain"), "--output-dir", str(tmp_path), *SMALL]
    assert main(command) == 0
    assert main([*command, "--trainer.max-steps", "3", "--data.nodata", "5"]) == 2
    assert "holds a run with --data.nodata None, not 5.0" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--data.value-range 0 200", "--data.value-range-per-image"])
def test_what_photographs_do_not_heed_is_refused(tmp_path, capsys, option):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    command = ["train", "itpn-pixel_nano", "--data.root", str(tmp_path), "--output-dir", str(tmp_path / "out"), *SMALL]
    assert main([*command, *option.split()]) == 2
    assert f"{option.split()[0]} is not for photographs of 8 bits: leave it out" in capsys.readouterr().err


def read_run(command, tmp_path):
    assert main(command) == 0
    return read_preprocessing(tmp_path / "out/itpn-pixel_nano/default")


@pytest.fixture
def train(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    return root, ["train", "itpn-pixel_nano", "--data.root", str(root), "--output-dir", str(tmp_path / "out"), *SMALL]


def test_photographs_with_a_value_for_no_data(tmp_path, train):
    """Given for borders of orthophotos: they are the images' own type of three channels, as where files declare it."""
    root, command = train
    for number in range(4):
        pixels = np.random.default_rng(number).integers(1, 255, (40, 40, 3), np.uint8)
        pixels[:, :10] = 0
        Image.fromarray(pixels).save(root / f"{number}.png")
    stored = read_run([*command, "--data.nodata", "0"], tmp_path)
    assert (stored["channels"], stored["dtype"], stored["nodata"]) == (3, "uint8", 0)
    assert min(stored["mean"]) > 0.45  # without the border, which is a quarter


@pytest.mark.parametrize("mixed", [False, True])
def test_what_files_declare_holds_where_no_statistics_are_read(tmp_path, train, mixed):
    root, command = train
    tag = (42113, "s", 0, "0", True)
    for number in range(4):
        pixels = np.random.default_rng(number).integers(1, 255, (40, 40, 3), np.uint8)
        if mixed and number == 2:
            Image.fromarray(pixels).save(root / "2.png")
            continue
        stored = pixels if mixed else pixels[..., 0].astype(np.uint16)
        kind = "rgb" if mixed else "minisblack"
        tifffile.imwrite(root / f"{number}.tif", stored, photometric=kind, extratags=[tag])
    known = ["--data.mean", "0.5", "--data.std", "0.2", "--data.value-range", "0", "255"]
    assert read_run([*command, *known], tmp_path)["nodata"] == 0


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_axes_of_labelled_arrays(tmp_path, capsys, task):
    """Whose shape does not tell them, sizes included."""
    for split in ("train", "val"):
        for folder in ("images", "labels", "masks"):
            (tmp_path / folder / split).mkdir(parents=True)
        for number in range(3):
            pixels = np.random.default_rng(number).random((64, 64, 64), np.float32)
            np.save(tmp_path / f"images/{split}/{number}.npy", pixels[:, :56])
            Image.fromarray(np.eye(64, 56, dtype=np.uint8)).save(tmp_path / f"masks/{split}/{number}.png")
            (tmp_path / f"labels/{split}/{number}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    name, options = "segmenter_nano", []
    if task == "detection":
        shutil.rmtree(tmp_path / "masks")
        (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [thing]\n")
        name, options = "detector_nano", ["--model.masks", "False"]
    command = ["train", name, "--data.root", str(tmp_path), "--output-dir", str(tmp_path / "out"), *SHORT, *options]
    small = ["--model.scratch", "--model.name", "itpn_nano", "--model.patch-size", "8", "--data.img-size", "32"]
    assert main([*command, *small, "--data.axes", "HWC"]) == 0
    assert "left out" not in "".join(capsys.readouterr())


def test_nan_as_the_declared_value_is_none(tmp_path, train, capsys):
    root, command = train
    for number in range(4):
        pixels = np.random.default_rng(number).random((40, 40)).astype(np.float32)
        pixels[:, :10] = np.nan
        tifffile.imwrite(root / f"{number}.tif", pixels, extratags=[(42113, "s", 0, "nan", True)])
    assert main(["stats", str(root)]) == 0
    assert read_run(command, tmp_path)["nodata"] is None
    assert main([*command, "--name", "given", "--data.nodata", "nan"]) == 2
    assert "--data.nodata must be finite, not nan" in capsys.readouterr().err


def test_photographs_do_not_take_the_mean_of_other_images():
    """Of a checkpoint of three channels of 16 bits; of one of photographs they do."""
    for dtype in ("uint16", "photo"):
        config = ClassificationConfig(
            model=ClassificationModelConfig(name="itpn_nano", scratch=True),
            data=ClassificationDataConfig(dtype="photo"),
        )
        stored = {"dtype": dtype, "channels": 3, "mean": [0.5, 0.4, 0.3], "std": [0.1]}
        found = adopt_pixels(config, stored).data
        assert (found.mean == (0.5, 0.4, 0.3)) == (dtype == "photo")
        assert (found.std == (0.1,)) == (dtype == "photo")


def test_a_validation_image_of_another_type_is_named_beside_the_training_images(bands, tmp_path, capsys):
    """Not as the first of the validation images, which would have the right type then."""
    shutil.copytree(bands / "classes", tmp_path / "classes")
    for path in (tmp_path / "classes/val").rglob("*.tif"):
        write(path, tifffile.imread(path)[:3])
    command = ["train", "classifier_small", "--data.root", str(tmp_path / "classes"), "--output-dir", str(tmp_path)]
    assert main([*command, "--model.scratch", "--model.name", "itpn_nano", "--data.img-size", "32", *SHORT]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"0\.tif has 5 channels of uint16, and \S*0\.tif has 3 channels of uint16: all images", error)


def test_statistics_of_the_command_are_used(bands, tmp_path, capsys):
    root = tmp_path / "images"
    for number in range(6):
        write(root / f"{number}.tif", draw(number)[0])
    assert main(["stats", str(root)]) == 0
    stored = json.loads((root / "stats.json").read_text())
    stored["scaled_mean"] = [0.25] * BANDS
    (root / "stats.json").write_text(json.dumps(stored))
    capsys.readouterr()
    command = ["train", "itpn-pixel_nano", "--data.root", str(root), "--output-dir", str(tmp_path), *SMALL]
    assert main(command) == 0
    assert f"are those of {root}/stats.json" in "".join(capsys.readouterr())
    assert read_preprocessing(tmp_path / "itpn-pixel_nano/default")["mean"] == [0.25] * BANDS
    write(root / "another.tif", draw(9)[0])
    assert main([*command, "--name", "again"]) == 0
    assert "stats.json is of other images: not used" in capsys.readouterr().out


LABELLED = {
    "classes": lambda root: ClassificationConfig(data=ClassificationDataConfig(root=(root,), label_fraction=0.5)),
    "masks": lambda root: SegmentationConfig(data=SegmentationDataConfig(root=root, label_fraction=0.5)),
    "objects": lambda root: DetectionConfig(data=DetectionDataConfig(root=root, label_fraction=0.5)),
    "windows": lambda root: SegmentationConfig(
        data=SegmentationDataConfig(root=root, window_size=32, window_overlap=8)
    ),
    "undivided": lambda root: SegmentationConfig(data=SegmentationDataConfig(root=root, val_fraction=0.5)),
}


@pytest.mark.parametrize("kind", LABELLED)
def test_statistics_of_the_command_are_those_of_a_part_of_the_images(bands, tmp_path, kind):
    """Of the same root, divided into splits, beside masks, cut into windows, and of few labels."""
    root = tmp_path / "root"
    shutil.copytree(bands / (kind if kind in ("classes", "objects") else "masks"), root)
    train = next(path for path in root.rglob("train") if path.parent.name != "annotations")
    if kind == "undivided":
        for place in (root / "images", root / "annotations"):
            shutil.rmtree(place / "val")
            for path in (place / "train").iterdir():
                path.rename(place / path.name)
            (place / "train").rmdir()
        train = root / "images"
    assert main(["stats", str(root)]) == 0
    config = LABELLED[kind](f"{root}/")
    data = find_task(config.task).find_data(config)

    def resolve() -> str:
        return " ".join(resolve_pixels(config, data.train)[1])

    assert f"are those of {root}/stats.json" in resolve()
    first = min(train.rglob("*.tif"))
    content = first.read_bytes()
    first.write_bytes(content + b"more")
    assert "stats.json is of other images: not used" in resolve()
    first.write_bytes(content)
    assert f"are those of {root}/stats.json" in resolve()
    write(train / ("a/new.tif" if kind == "classes" else "new.tif"), draw(20)[0])
    assert "stats.json is of other images: not used" in resolve()


def test_statistics_of_shards_are_those_of_all(tmp_path):
    """Not of the first ones; and a stats.json is used as long as the shards are the same."""
    (tmp_path / "shards").mkdir()
    for shard in range(3):
        with tarfile.open(tmp_path / f"shards/{shard}.tar", "w") as tar:
            for number in range(2):
                write(tmp_path / "image.tif", (draw(number)[0] * (1 + shard)).astype(np.uint16))
                tar.add(tmp_path / "image.tif", f"{number}.tif")
    root = str(tmp_path / "shards")
    source = find_training_images((root,))
    config = PretrainingConfig(data=PretrainingDataConfig(root=(root,)))
    found, notes = resolve_pixels(config, source)
    assert "are those of 6 of 6 images" in notes[0]
    assert float(found.data.value_range[1]) > 3 * 1500
    assert main(["stats", root]) == 0
    again, notes = resolve_pixels(config, source)
    assert f"are those of {root}/stats.json" in notes[0]
    assert again == found
    (tmp_path / "shards/2.tar").rename(tmp_path / "shards/3.tar")
    assert "stats.json is of other images: not used" in resolve_pixels(config, find_training_images((root,)))[1][0]


FINE_TUNING = {
    "classifier_nano": ("classes", ("--data.img-size", "32")),
    "segmenter_nano": ("masks", ("--data.img-size", "32")),
    "detector_nano": ("objects", ("--data.img-size", "32", "--data.crop-prob", "0")),
}


@pytest.mark.parametrize("recipe", FINE_TUNING)
def test_fine_tuning(bands, pretrained, tmp_path, capsys, recipe):
    folder, options = FINE_TUNING[recipe]
    name = recipe if recipe != "classifier_nano" else "classifier_small"
    where = ["--data.root", str(bands / folder)]
    start = ["--model.checkpoint", str(pretrained / "model.safetensors"), "--output-dir", str(tmp_path)]
    assert main(["train", name, *where, *start, *options, *SHORT, "--evaluation.batch-size", "1"]) == 0
    out = capsys.readouterr()
    run = tmp_path / name / "default"
    stored, known = read_preprocessing(run), read_preprocessing(pretrained)
    for key in ("mean", "std", "value_range", "dtype", "channels", "nodata"):
        assert stored[key] == known[key], key
    assert "patch_embed" not in "".join(out)  # the first layer fits
    weights = str(run / "model.safetensors")
    assert main(["evaluate", name, "--checkpoint", weights, *where, "--data.num-workers", "0"]) == 0
    summary = json.loads((run / "summary.json").read_text())["metrics"]
    evaluated = json.loads((run / "evaluation/evaluation.json").read_text())
    assert evaluated["images"] == 3
    compared = [name for name in evaluated if f"val_{name}" in summary]
    assert compared
    for name in compared:
        assert evaluated[name] == pytest.approx(summary[f"val_{name}"], abs=1e-6)
    images = bands / folder / ("images/val" if folder == "masks" else "val")
    assert main(["predict", weights, str(images), "--out", str(tmp_path / "out")]) == 0
    with (tmp_path / "out/predictions.csv").open() as file:
        assert recipe == "detector_nano" or len({row["image"] for row in csv.DictReader(file)}) == 3
    capsys.readouterr()
    Image.new("RGB", (48, 40)).save(tmp_path / "photo.png")
    assert main(["predict", weights, str(tmp_path / "photo.png"), "--out", str(tmp_path / "no")]) == 2
    assert "takes 5 channels of uint16, and " in capsys.readouterr().err


def test_another_number_of_channels_is_adapted(bands, pretrained, tmp_path, capsys):
    """Fine-tuning on three of the bands: the first layer as timm adapts it, new statistics."""
    for split in ("train", "val"):
        for number in range(3):
            write(tmp_path / f"images/{split}/{number}.tif", draw(number)[0][:3])
            (tmp_path / f"annotations/{split}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw(number)[1].astype(np.uint8)).save(tmp_path / f"annotations/{split}/{number}.png")
    start = ["--model.checkpoint", str(pretrained / "model.safetensors"), "--output-dir", str(tmp_path)]
    assert main(["train", "segmenter_nano", "--data.root", str(tmp_path), *start, "--data.img-size", "32", *SHORT]) == 0
    stored = read_preprocessing(tmp_path / "segmenter_nano/default")
    assert (stored["channels"], len(stored["mean"])) == (3, 3)


def test_a_file_of_another_type_ends_a_run(bands, tmp_path, capsys):
    for number in range(5):
        write(tmp_path / f"images/{number}.tif", draw(number)[0])
    write(tmp_path / "images/5.tif", draw(5)[0][:4])
    options = ["--data.root", str(tmp_path / "images"), "--output-dir", str(tmp_path), *SMALL]
    (tmp_path / "known.py").write_text(
        "from itpn.tasks.recipe_files import read_recipe\n"
        "config = read_recipe('itpn-pixel_nano')[1]\n"
        "config.model.in_chans, config.data.dtype, config.data.value_range = 5, 'uint16', ('0', '9000')\n"
        "config.data.mean, config.data.std = (0.3,), (0.2,)\n"
    )
    for recipe in ("itpn-pixel_nano", str(tmp_path / "known.py")):  # whose first image is read, or not
        assert main(["train", recipe, *options]) == 2
        err = capsys.readouterr().err
        assert "0.tif has 5 channels of uint16" in err
        assert "5.tif has 4 channels of uint16" in err
        assert "Traceback" not in err


def test_the_type_of_pixels_is_a_setting_without_an_option(bands, pretrained, tmp_path, capsys):
    """Images decide it; it is stored, and kept by a config.yaml that is trained again."""
    config = pretrained / "config.yaml"
    before = yaml.safe_load(config.read_text())["data"]
    assert before["dtype"] == "uint16"
    options = ["--data.root", str(bands / "plain"), "--output-dir", str(tmp_path), "--name", "again"]
    assert main(["train", str(config), *options]) == 0
    again = tmp_path / "itpn-pixel_nano/again/config.yaml"
    assert yaml.safe_load(again.read_text())["data"] == before
    capsys.readouterr()
    assert main(["train", "itpn-pixel_nano", *options, "--data.dtype", "uint16"]) == 2
    assert "unknown option --data.dtype" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "itpn-pixel_nano", "--help"])
    shown = capsys.readouterr().out
    assert "--data.axes" in shown
    assert "--data.dtype" not in shown


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model.in-chans", "3"], "--model.in-chans is 3, and .* has 5 channels of uint16: leave it out"),
        (["--data.mean", "0.1", "0.2"], r"--data.mean needs one number or one per channel \(5\), not 2"),
        (["--data.value-range", "1", "2", "3", "4"], "a pair for each of 5 channels, not 4 values"),
        (["--data.color-jitter", "0.4"], "--data.color-jitter is for RGB photographs, not for images of 5 channels"),
        (["--data.window-size", "32", "--data.window-overlap", "32"], "--data.window-overlap must be below"),
    ],
)
def test_settings_that_images_do_not_fit(bands, tmp_path, capsys, options, expected):
    common = ["--data.root", str(bands / "plain"), "--output-dir", str(tmp_path), *SMALL]
    assert main(["train", "itpn-pixel_nano", *common, *options]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert re.search(expected, err), err


def test_windows_are_trained_on(bands, tmp_path, capsys):
    write(tmp_path / "images/scene.tif", np.concatenate([np.concatenate([draw(n)[0]] * 4, 2) for n in range(5)], 1))
    options = ["--data.root", str(tmp_path / "images"), "--output-dir", str(tmp_path), *SMALL]
    assert main(["train", "itpn-pixel_nano", *options, "--data.max-pixels", "20000"]) == 2
    assert "192x200 pixels, more than the 20000 allowed" in capsys.readouterr().err
    windows = ["--data.window-size", "48", "--data.window-overlap", "8", "--data.max-pixels", "20000"]
    assert main(["train", "itpn-pixel_nano", *options, *windows]) == 0
    assert "25 windows of 1 image" in capsys.readouterr().out


def test_patches_without_data_are_no_targets(tmp_path, capsys):
    """A run whose images have data in one corner only, and none at all in two: a finite loss that falls."""
    for number in range(6):
        pixels = draw(number, "float32")[0]
        pixels[:, 24:] = np.nan
        pixels[:, :, 24:] = np.nan
        if number < 2:
            pixels[:] = np.nan
        write(tmp_path / f"images/{number}.tif", pixels)
    options = ["--data.root", str(tmp_path / "images"), "--output-dir", str(tmp_path), *SMALL]
    assert main(["train", "itpn-pixel_nano", *options, "--trainer.log-every-n-steps", "1"]) == 0
    assert "of the pixels without data" in capsys.readouterr().out
    with (tmp_path / "itpn-pixel_nano/default/metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert losses
    assert all(np.isfinite(losses))


def test_percentiles_of_each_image(bands, tmp_path):
    options = ["--data.root", str(bands / "plain"), "--output-dir", str(tmp_path), *SMALL]
    assert main(["train", "itpn-pixel_nano", *options, "--data.value-range-per-image"]) == 0
    run = tmp_path / "itpn-pixel_nano/default"
    stored = read_preprocessing(run)
    assert (stored["value_range_per_image"], stored["value_range"]) == (True, ["0.1%", "99.9%"])
    assert main(["predict", str(run / "model.safetensors"), str(bands / "plain"), "--out", str(tmp_path / "out")]) == 0


def test_features_are_those_of_the_normalized_image(bands, pretrained, tmp_path):
    from safetensors.torch import load_file

    import itpn
    from itpn.data.augment import center_crop
    from itpn.tasks.features import mean_features

    weights = pretrained / "model.safetensors"
    out = tmp_path / "features.safetensors"
    assert main(["predict", str(weights), str(bands / "plain"), "--features", str(out)]) == 0
    stored = read_preprocessing(pretrained)
    pixels = center_crop(itpn.read_image(bands / "plain/0.tif"), (32, 32)).float()
    low, high = (
        torch.tensor([float(v) for v in stored["value_range"][start::2]]).reshape(-1, 1, 1) for start in (0, 1)
    )
    mean, std = (torch.tensor(stored[name]).reshape(-1, 1, 1) for name in ("mean", "std"))
    x = ((pixels - low) / (high - low)).clamp(0, 1).sub(mean) / std
    expected = mean_features(itpn.load(weights), x[None])["features"]
    assert torch.allclose(load_file(out)["features"][0], expected[0], atol=1e-5)


def test_a_value_given_for_no_data_stays(tmp_path):
    """Of floats, too; and a stats.json that knows nothing of it is not used."""
    for number in range(6):
        pixels = draw(number, "float32")[0]
        pixels[:, 30:] = -9999
        write(tmp_path / f"images/{number}.tif", pixels)
    assert main(["stats", str(tmp_path / "images")]) == 0
    options = ["--data.root", str(tmp_path / "images"), "--output-dir", str(tmp_path), "--data.nodata", "-9999", *SMALL]
    assert main(["train", "itpn-pixel_nano", *options]) == 0
    stored = read_preprocessing(tmp_path / "itpn-pixel_nano/default")
    assert stored["nodata"] == -9999
    assert min(float(value) for value in stored["value_range"]) > 0
    assert main(["train", "itpn-pixel_nano", *options, "--trainer.max-steps", "3"]) == 0


def test_a_run_from_a_checkpoint_resumes(bands, pretrained, tmp_path):
    start = ["--model.checkpoint", str(pretrained / "model.safetensors"), "--output-dir", str(tmp_path)]
    command = ["train", "itpn-pixel_nano", "--data.root", str(bands / "plain"), *start, *SMALL]
    assert main(command) == 0
    assert main([*command, "--trainer.max-steps", "3"]) == 0


def test_a_run_with_percentiles_resumes_with_other_files(bands, tmp_path):
    root = tmp_path / "images"
    for number in range(6):
        write(root / f"{number}.tif", draw(number)[0])
    percents = ["--data.value-range", "1%", "99%"]
    command = ["train", "itpn-pixel_nano", "--data.root", str(root), "--output-dir", str(tmp_path), *percents, *SMALL]
    assert main(command) == 0
    write(root / "another.tif", draw(9)[0] * 3)
    assert main([*command, "--trainer.max-steps", "3"]) == 0


def test_photographs_from_weights_of_deep_images(pretrained, photos, tmp_path, bands):
    """Mean and std of other images are not theirs."""
    for number in range(6):
        write(tmp_path / f"deep/{number}.tif", draw(number)[0][:3])
    common = ["--output-dir", str(tmp_path), *SMALL]
    assert main(["train", "itpn-pixel_nano", "--data.root", str(tmp_path / "deep"), "--name", "deep", *common]) == 0
    weights = str(tmp_path / "itpn-pixel_nano/deep/model.safetensors")
    for name in ("a", "b"):
        for path in sorted(photos.glob("*.png"))[:4]:
            (tmp_path / "classes" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "classes" / name / path.name).write_bytes(path.read_bytes())
    options = ["--data.root", str(tmp_path / "classes"), "--model.checkpoint", weights, "--data.img-size", "32"]
    assert main(["train", "classifier_small", *options, "--output-dir", str(tmp_path), *SHORT]) == 0
    stored = read_preprocessing(tmp_path / "classifier_small/default")
    assert stored["mean"] == [0.485, 0.456, 0.406]


def test_the_order_of_axes_is_kept(tmp_path):
    """Of arrays whose shape does not tell it; prediction and evaluation have no such option."""
    for number in range(6):
        (tmp_path / "images").mkdir(exist_ok=True)
        np.save(tmp_path / f"images/{number}.npy", np.random.default_rng(number).random((40, 40, 40), np.float32))
    options = ["--data.root", str(tmp_path / "images"), "--output-dir", str(tmp_path), "--data.axes", "HWC", *SMALL]
    assert main(["train", "itpn-pixel_nano", *options]) == 0
    weights = str(tmp_path / "itpn-pixel_nano/default/model.safetensors")
    assert main(["predict", weights, str(tmp_path / "images"), "--out", str(tmp_path / "out")]) == 0


def test_the_page_prepares_images_for_exported_files(bands, pretrained, tmp_path, monkeypatch):
    """What the documents show for use outside of itpn computes what itpn does."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs/scientific_images.md").read_text()
    code = re.search(r"## Outside itpn.*?```python\n(.*?)```", page, re.DOTALL)[1]
    weights = str(pretrained / "model.safetensors")
    assert main(["export", weights, "--task", "pyramid", "--out", "model.onnx"]) == 0
    write(tmp_path / "scene.tif", draw(7)[0][:, :32, :32])
    shown: dict = {}
    exec(code, shown)
    images = torch.from_numpy(shown["pixels"])[None]
    normalize = stored_normalize(read_checkpoint(weights), BANDS)
    with torch.no_grad():
        maps = itpn.load(weights, task="pyramid").eval()(normalize(images)).values()
    for own, expected in zip(shown["outputs"], maps, strict=True):
        assert np.allclose(own, expected, atol=1e-4)
    stored = {"value_range": ["10", "200"], "nodata": 50, "mean": [0.3], "std": [0.2]}
    integers = np.arange(0, 300, dtype=np.uint16).reshape(3, 10, 10)
    floats = np.where(integers == 50, np.nan, integers).astype(np.float32)
    for pixels in (integers, floats):
        kind = ImageType(3, pixels.dtype.name)
        normalize = Normalize(
            Pixels(kind, (10,), (200,), tuple(stored["mean"]), tuple(stored["std"]), stored["nodata"])
        )
        assert np.allclose(shown["prepare"](pixels, stored), normalize(torch.from_numpy(pixels)), atol=1e-5)
    photo = np.arange(75, dtype=np.uint8).reshape(3, 5, 5)
    normalize = Normalize(Pixels(mean=(0.5, 0.4, 0.3), std=(0.2, 0.1, 0.3)))
    stored = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.1, 0.3]}
    assert np.allclose(shown["prepare"](photo, stored), normalize(torch.from_numpy(photo)), atol=1e-5)
