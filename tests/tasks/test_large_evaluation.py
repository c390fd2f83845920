"""Evaluation of large images: they are opened, never decoded as a whole, and read tile by tile with their masks."""

import io
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from rich.console import Console
from torch import nn

import itpn.data.formats.tiff
import itpn.data.mask_files
import itpn.tasks.evaluation_bar
from itpn.cli import main
from itpn.data.annotations import find_objects, read_objects
from itpn.data.decode import EncodedImage
from itpn.data.formats.tiff import TiffImage
from itpn.data.labelmaps import read_to_evaluate
from itpn.data.mask_checks import MaskRules
from itpn.data.stored import StoredImage
from itpn.metrics.segmentation import compare
from itpn.tasks.configs import (
    DetectionConfig,
    DetectionDataConfig,
    DetectionModelConfig,
    SegmentationConfig,
    SegmentationDataConfig,
    SegmentationModelConfig,
)
from itpn.tasks.data import RunData, read_samples
from itpn.tasks.detection.evaluation import DetectionEvaluator
from itpn.tasks.evaluation import evaluate
from itpn.tasks.evaluation_bar import EvaluationBar
from itpn.tasks.large import tiling_of_run
from itpn.tasks.segmentation.evaluation import SegmentationEvaluator
from itpn.tasks.segmentation.inference import segment_tiles
from itpn.tasks.tiling import Tile

CPU = torch.device("cpu")
HEIGHT, WIDTH, SIDE = 600, 640, 96
LIMIT = 128**2  # pixels: --data.max-pixels
TILED = {"tile": (64, 64), "compression": "deflate", "photometric": "minisblack"}
DEEP = {"dtype": "uint16", "value_range": ("0", "4000"), "mean": (0.5,), "std": (0.2,)}


class Blurs(nn.Module):
    """Stands in for a segmenter: three classes by the brightness around a pixel."""

    num_classes = 3

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        mean = nn.functional.avg_pool2d(images[:, :1], 5, 1, 2, count_include_pad=False)
        return {"out": torch.cat([-4 * mean, torch.full_like(mean, 1.5), 4 * mean], 1)}


def draw(height: int, width: int, channels: int = 2) -> np.ndarray:
    """Blurred noise, uint16 [C, H, W]."""
    rng = np.random.default_rng(height)
    small = rng.random((channels, height // 30 + 2, width // 30 + 2), np.float32)
    image = np.stack([np.asarray(Image.fromarray(one).resize((width, height))) for one in small])
    return (4000 * image.clip(0, 1)).astype(np.uint16)


def write_scene(root: Path, name: str, height: int, width: int, mask: str = ".tif") -> tuple[np.ndarray, np.ndarray]:
    """An image and its mask, which an evaluator knows a part of."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    pixels = draw(height, width)
    labels = (pixels[0] > 1700).astype(np.uint8) + (pixels[0] > 2300)
    labels[: height // 3] = (np.arange(width) // 50 % 3).astype(np.uint8)
    labels[height // 2 : height // 2 + 9] = 255
    tifffile.imwrite(root / "images" / f"{name}.tif", pixels, planarconfig="separate", **TILED)
    if mask == ".tif":
        tifffile.imwrite(root / "masks" / f"{name}.tif", labels, **TILED)
    else:
        Image.fromarray(labels).save(root / "masks" / f"{name}{mask}")
    return pixels, labels


def make_config(root: Path, **data) -> SegmentationConfig:
    own = {"num_workers": 0, "max_pixels": LIMIT, "img_size": 64, "short_side": 64, **DEEP, **data}
    return SegmentationConfig(
        model=SegmentationModelConfig(in_chans=2), data=SegmentationDataConfig(root=str(root), **own)
    )


def make_evaluator(root: Path, **data) -> SegmentationEvaluator:
    config = make_config(root, **data)
    rules = MaskRules(log=lambda line: None, max_pixels=config.data.max_pixels)
    images, _ = read_to_evaluate(str(root), None, None, None, rules=rules)
    return SegmentationEvaluator(config, images)


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """Pixels of each window that is read; a decoding of a large file as a whole fails."""
    read: list[int] = []
    real, decode = TiffImage.read, StoredImage.decode

    def count(self, page=0, window=None):
        height, width = window[2:] if window else (self.height, self.width)
        read.append(height * width)
        return real(self, page, window)

    def refuse(self):
        assert self.height * self.width <= LIMIT
        return decode(self)

    monkeypatch.setattr(TiffImage, "read", count)
    monkeypatch.setattr(StoredImage, "decode", refuse)
    monkeypatch.setattr(itpn.data.mask_files, "BLOCK", LIMIT)
    monkeypatch.setattr(itpn.data.mask_files, "ROWS", 16)
    return read


@pytest.mark.parametrize(("window", "mask"), [(None, ".tif"), (SIDE, ".tif"), (SIDE, ".png")])
def test_scenes_above_the_limit_are_evaluated_in_tiles(tmp_path, sizes, window, mask):
    """With the numbers that decoding them as a whole gives, by the merging of `itpn predict`."""
    large = write_scene(tmp_path, "large", HEIGHT, WIDTH, mask)
    small = write_scene(tmp_path, "small", 70, 90)
    limit = {"max_pixels": HEIGHT * WIDTH // 4 + 1} if mask == ".png" else {}
    evaluator = make_evaluator(tmp_path, window_size=window, window_overlap=16, **limit)
    (scores,), skipped = evaluate(evaluator, [Blurs()], CPU, 0, 1)
    assert skipped == []
    confusion = torch.zeros(3, 3, dtype=torch.int64)
    for pixels, labels in (large, small):
        image, target = torch.from_numpy(pixels), torch.from_numpy(labels)
        grid = evaluator.tiling.grid(*labels.shape)
        assert (grid is None) == (len(labels) == 70)
        if grid is None:
            confusion += compare(evaluator.segment(Blurs(), evaluator.normalize, image), target, 3)
            continue

        def segment(part: torch.Tensor) -> torch.Tensor:
            return evaluator.segment.probabilities(Blurs(), evaluator.normalize, part)

        for part, own in segment_tiles(segment, lambda tile, image=image: tile.cut(image), grid, grid):
            confusion += compare(own, part.cut(target), 3)
    assert torch.equal(scores.confusion, confusion)
    assert scores.images == 2
    assert (confusion > 0).sum() >= 8
    assert max(sizes) <= max(SIDE * WIDTH, LIMIT)  # a row of tiles


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["corrupt", "no parts", "other size", "mask lost"])
def test_a_large_image_that_cannot_be_read_is_skipped(tmp_path, fault, workers, monkeypatch):
    write_scene(tmp_path, "a", HEIGHT, WIDTH)
    write_scene(tmp_path, "b", HEIGHT + 20, WIDTH)
    evaluator = make_evaluator(tmp_path, num_workers=workers)
    path = tmp_path / "images" / "b.tif"
    if fault == "corrupt":
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            start, size = page.dataoffsets[50], page.databytecounts[50]
        content = path.read_bytes()
        path.write_bytes(content[:start] + b"\xff" * size + content[start + size :])
    elif fault == "no parts":
        monkeypatch.setattr(itpn.data.formats.tiff, "CHUNK", 64**2)
        strip = {"rowsperstrip": HEIGHT + 20, "compression": "deflate", "photometric": "minisblack"}
        tifffile.imwrite(path, draw(HEIGHT + 20, WIDTH), planarconfig="separate", **strip)
    elif fault == "other size":
        write_scene(tmp_path / "other", "b", HEIGHT, WIDTH)
        (tmp_path / "other" / "masks" / "b.tif").replace(tmp_path / "masks" / "b.tif")
    else:
        (tmp_path / "masks" / "b.tif").unlink()
    (scores, ema), skipped = evaluate(evaluator, [Blurs(), Blurs()], CPU, 0, 1)
    assert (scores.images, ema.images) == (1, 1)
    ((name, reason),) = skipped
    assert name.endswith("b.tif")
    words = {
        "no parts": "allowed (--data.max-pixels); it cannot be read in parts: convert it",
        "other size": "640x620 pixels, and 640x600 in",
        "mask lost": "No such file",
    }
    assert words.get(fault, "") in reason
    assert reason


def test_a_large_photograph_that_has_no_parts_is_skipped(tmp_path):
    """Of the reason that it has in training; one in a tiled TIFF is cut, though no windows are given."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    pixels = (draw(300, 330, 3) >> 4).astype(np.uint8).transpose(1, 2, 0)
    labels = (pixels[..., 0] > 100).astype(np.uint8) + (pixels[..., 0] > 150)
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    tifffile.imwrite(tmp_path / "images" / "b.tif", pixels, **{**TILED, "photometric": "rgb"})
    for name in "ab":
        tifffile.imwrite(tmp_path / "masks" / f"{name}.tif", labels, **TILED)
    config = SegmentationConfig(
        data=SegmentationDataConfig(root=str(tmp_path), num_workers=0, max_pixels=LIMIT, img_size=64, dtype="photo")
    )
    images, _ = read_to_evaluate(str(tmp_path), None, None, None, rules=MaskRules(log=str, max_pixels=LIMIT))
    (scores,), ((name, reason),) = evaluate(SegmentationEvaluator(config, images), [Blurs()], CPU, 0, 1)
    assert scores.images == 1
    assert name.endswith("a.png")
    assert "330x300 pixels, more than the 16384 allowed (--data.max-pixels)" in reason


# --- objects


class FindsSquares(nn.Module):
    """Stands in for a detector: it finds each white square of a grid, as far as it is visible."""

    roi_heads = Namespace(nms_thresh=0.5)

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        (white,) = (image[0] > 0.5 for image in images)
        rows, cols = (find_runs(white.any(dim=axis)) for axis in (1, 0))
        boxes = torch.tensor([(x0, y0, x1, y1) for y0, y1 in rows for x0, x1 in cols], dtype=torch.float32)
        count = len(boxes)
        return [
            {"boxes": boxes.reshape(-1, 4), "labels": torch.ones(count, dtype=torch.int64), "scores": torch.rand(count)}
        ]


def find_runs(values: torch.Tensor) -> list[tuple[int, int]]:
    edges = nn.functional.pad(values.int(), (1, 1)).diff().nonzero()[:, 0].tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def write_squares(root: Path, height: int = 330, stated: int = 330) -> None:
    pixels = np.zeros((height, 330), np.uint16)
    boxes = [[number % 30 * 11, number // 30 * 11, 8, 8] for number in range(900)]
    for x, y, width, high in boxes:
        pixels[y : y + high, x : x + width] = 4000
    known = [
        {"id": n + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 64, "iscrowd": 0}
        for n, box in enumerate(boxes)
    ]
    image = {"id": 1, "file_name": "grid.tif", "height": stated, "width": 330}
    content = {"images": [image], "annotations": known, "categories": [{"id": 1, "name": "square"}]}
    (root / "annotations").mkdir(exist_ok=True)
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir(exist_ok=True)
        tifffile.imwrite(root / f"{split}2017" / "grid.tif", pixels, **TILED)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


@pytest.mark.parametrize("window", [None, 80])
def test_objects_above_the_limit_are_evaluated_in_tiles(tmp_path, sizes, window):
    write_squares(tmp_path)
    images = read_objects(str(tmp_path), "val")
    data = {**DEEP, "num_workers": 0, "img_size": 80, "window_size": window, "max_pixels": LIMIT}
    config = DetectionConfig(model=DetectionModelConfig(in_chans=1), data=DetectionDataConfig(**data))
    evaluator = DetectionEvaluator(config, images, False)
    (scores,), skipped = evaluate(evaluator, [FindsSquares()], CPU, 0, 1)
    assert scores.metrics["box"]["ap"] == pytest.approx(1)
    assert skipped == []
    assert max(sizes) <= 80 * 330
    samples = read_samples(config, RunData(images), 8, evaluator.tiling)
    assert [tuple(one.shape) for one in samples] == [(1, 80, 80)]
    assert torch.equal(
        samples[0][0], torch.from_numpy(tifffile.imread(tmp_path / "val2017" / "grid.tif")[125:205, 125:205])
    )


def test_a_large_image_of_another_size_than_its_annotations_is_skipped(tmp_path):
    write_squares(tmp_path, stated=331)
    images = read_objects(str(tmp_path), "val")
    data = {**DEEP, "num_workers": 0, "img_size": 80}
    config = DetectionConfig(model=DetectionModelConfig(in_chans=1), data=DetectionDataConfig(**data))
    with pytest.raises(Exception, match="330x330 pixels, and 330x331 in the annotations"):
        evaluate(DetectionEvaluator(config, images, False), [FindsSquares()], CPU, 0, 1)


def test_the_limit_is_of_images_to_train_on(tmp_path):
    write_squares(tmp_path)
    with pytest.raises(Exception, match=r"images of more pixels than --data\.max-pixels"):
        find_objects(str(tmp_path), max_pixels=LIMIT)
    train, val = find_objects(str(tmp_path))
    assert (len(train), len(val)) == (1, 1)


# --- commands


def test_large_scenes_from_training_to_prediction(tmp_path, sizes, monkeypatch, capsys):
    """All of a run: windows, samples that are drawn, validation; then evaluation and prediction, above the limit."""
    for split in ("train", "val"):
        for name in ("images", "masks"):
            (tmp_path / "data" / name / split).mkdir(parents=True)
        write_scene(tmp_path / split, split, HEIGHT, WIDTH)
        for name in ("images", "masks"):
            (tmp_path / split / name / f"{split}.tif").replace(tmp_path / "data" / name / split / f"{split}.tif")
    monkeypatch.setattr(EncodedImage, "decode", pytest.fail)
    root = ["--data.root", str(tmp_path / "data"), "--data.num-workers", "0"]
    options = ["--model.scratch", "--model.name", "itpn_nano", "--model.head-width", "16", "--data.img-size", "64"]
    options += ["--data.window-size", str(SIDE), "--data.window-overlap", "16", "--data.max-pixels", str(LIMIT)]
    options += ["--trainer.max-steps", "2", "--data.batch-size", "2", "--output-dir", str(tmp_path / "runs")]
    assert main(["train", "segmenter_nano", *root, *options, "--name", "a"]) == 0
    (model,) = tmp_path.glob("runs/*/a/model.safetensors")
    summary = json.loads((model.parent / "summary.json").read_text())
    assert 0 <= summary["metrics"]["val_miou"] <= 1
    assert len(list(model.parent.glob("predictions/*.png"))) >= 2
    capsys.readouterr()
    command = ["evaluate", "segmenter_nano", "--checkpoint", str(model), *root, "--data.max-pixels", str(LIMIT)]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "tiles" not in capsys.readouterr().err  # no bar where there is no terminal
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (found["images"], found["images_skipped"]) == (1, 0)
    assert found["miou"] == pytest.approx(summary["metrics"]["val_miou"], abs=1e-6)
    scene = str(tmp_path / "data" / "images" / "val" / "val.tif")
    limited = ["--data.max-pixels", str(LIMIT)]
    assert main(["predict", str(model), scene, "--out", str(tmp_path / "predicted"), *limited]) == 0
    assert "skipped" not in capsys.readouterr().err
    assert max(sizes) <= max(SIDE * WIDTH, LIMIT)
    labels = np.asarray(Image.open(tmp_path / "predicted" / "0000-val-labels.png"))
    known = tifffile.imread(tmp_path / "data" / "masks" / "val" / "val.tif")
    confusion = compare(torch.from_numpy(labels.copy()), torch.from_numpy(known), 3)
    iou = confusion.diag() / (confusion.sum(0) + confusion.sum(1) - confusion.diag())
    assert float(iou.nanmean()) == pytest.approx(found["miou"], abs=1e-6)


def test_a_bar_in_a_terminal(tmp_path, monkeypatch):
    """Of images, and of the tiles of a large one; nothing elsewhere."""
    write_scene(tmp_path, "large", HEIGHT, WIDTH)
    write_scene(tmp_path, "small", 70, 90)
    evaluator = make_evaluator(tmp_path)
    for terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=80)
        monkeypatch.setattr(itpn.tasks.evaluation_bar, "Output", lambda stderr, console=console: console)
        with EvaluationBar(2) as bar:
            evaluate(evaluator, [Blurs()], CPU, 0, 1, bar)
            assert bar._bar.tasks[0].finished
        assert all(word in out.getvalue() for word in ("images", "2/2", "tiles")) == terminal
        assert bool(out.getvalue()) == terminal


def test_samples_of_large_images_are_tiles_of_their_middle(tmp_path, sizes):
    pixels, _ = write_scene(tmp_path, "large", HEIGHT, WIDTH)
    small, _ = write_scene(tmp_path, "small", 70, 90)
    evaluator = make_evaluator(tmp_path)
    config = make_config(tmp_path)
    tiling = tiling_of_run(config.data, 64)
    samples = read_samples(config, RunData(evaluator.images), 6, tiling)
    middle = Tile((HEIGHT - 64) // 2, (WIDTH - 64) // 2, 64, 64)
    assert torch.equal(samples[0], middle.cut(torch.from_numpy(pixels)))
    assert samples[0].untyped_storage().nbytes() == samples[0].numel() * 2  # no more is kept
    assert torch.equal(samples[1], torch.from_numpy(small))
