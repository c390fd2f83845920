"""`itpn predict` on images of any size: in tiles, by parts of the file, with bounded memory, at their places."""

import json
import math
import subprocess
import sys
import warnings
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import rasterio
import rasterio.warp
import tifffile
import torch
from PIL import Image
from rasterio.transform import Affine, from_origin
from torch import nn

import itpn
import itpn.data.formats.georeference
import itpn.tasks.overview
import itpn.tasks.source_images
from itpn.cli import main
from itpn.data.annotations import read_objects
from itpn.data.decode import UnreadableImage
from itpn.data.formats.georeference import NOWHERE, Georeference, find_georeference
from itpn.data.mask_pieces import Piece
from itpn.data.readers import FileReader
from itpn.data.samples import open_sample
from itpn.data.stored import PLAIN, ReadSettings
from itpn.errors import UserError
from itpn.metrics.segmentation import PixelScores, compare
from itpn.tasks.configs import (
    DetectionConfig,
    DetectionDataConfig,
    DetectionModelConfig,
    SegmentationConfig,
    SegmentationDataConfig,
    SegmentationModelConfig,
)
from itpn.tasks.detection.evaluation import DetectionEvaluator
from itpn.tasks.detection.merging import Objects
from itpn.tasks.detection.module import DetectionModule
from itpn.tasks.detection.network import build_detector
from itpn.tasks.detection.prediction import ObjectFiles
from itpn.tasks.evaluation import evaluate
from itpn.tasks.finetuning.network import resolve_with_head
from itpn.tasks.large import find_tiling, usual_side
from itpn.tasks.overview import Overview
from itpn.tasks.pixels import make_normalize
from itpn.tasks.segmentation.inference import make_segmentation
from itpn.tasks.segmentation.module import SegmentationModule
from itpn.tasks.segmentation.network import build_segmenter
from itpn.tasks.source_images import NO_DATA, SourceImage
from itpn.tasks.tiling import Grid

SIDE = 64  # of the networks' images
CLASSES = ("field", "road", "water")
DEEP = {"dtype": "uint16", "value_range": ("0", "4000"), "mean": (0.5,) * 4, "std": (0.2,) * 4, "nodata": 0.0}
TURNED = Affine(9.0, 2.5, 500000.0, -1.5, -8.0, 5700000.0)  # turned and sheared, in metres of UTM 32 north
UTM = "EPSG:32632"


def save_segmenter(path: Path, **data) -> SegmentationModule:
    """Random weights, by which no class wins everywhere."""
    torch.manual_seed(0)
    channels = 4 if "dtype" in data else 3
    config = SegmentationConfig(
        model=SegmentationModelConfig(name="itpn_nano", scratch=True, patch_size=16, head_width=16, in_chans=channels),
        data=SegmentationDataConfig(img_size=SIDE, **data),
    )
    config, _ = resolve_with_head(config, None)
    model, _ = build_segmenter(config, CLASSES, None)
    module = SegmentationModule(model.eval(), config, "test", CLASSES)
    image = draw_bands(SIDE, SIDE)[:channels]
    with torch.no_grad():
        logits = model(module.normalize(torch.from_numpy(image if channels == 4 else image >> 4)[None]))["out"]
        model.classifier.bias -= logits.mean(dim=(0, 2, 3))
    module.save(path, {})
    return module


def draw_bands(height: int, width: int) -> np.ndarray:
    """Blurred noise of four bands, uint16 [4, H, W], without data in a corner."""
    rng = np.random.default_rng(0)
    bands = [
        np.asarray(Image.fromarray(rng.random((height // 20 + 2, width // 20 + 2), np.float32)).resize((width, height)))
        for _ in range(4)
    ]
    image = (1 + 3999 * np.stack(bands).clip(0, 1)).astype(np.uint16)
    image[:, : height // 5, width // 2 :] = 0  # no data
    return image


def write_geotiff(path: Path, image: np.ndarray, transform: Affine = TURNED, crs: str = UTM, **options) -> Path:
    size = {"count": len(image), "height": image.shape[1], "width": image.shape[2]}
    tiles = {"tiled": True, "blockxsize": 64, "blockysize": 64, "nodata": 0, "compress": "deflate"}
    options = {"dtype": image.dtype, "crs": crs, "transform": transform, **size, **tiles, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", driver="GTiff", **options) as file:
            file.write(image)
    return path


# --- which images are cut


def test_what_is_cut():
    """Photographs only where windows were given, in training or now; other images above twice training's size."""
    usual = find_tiling(None, None, {}, 100)
    assert (usual.size, usual.overlap) == (100, 25)
    assert usual.grid(200, 200) is None
    assert usual.grid(201, 50) == Grid(201, 50, 100, 25)
    assert usual.grid(5000, 5000, whole=True) is None
    trained = {"window_size": 512, "window_overlap": 64}
    windows = find_tiling(None, None, trained, 100)
    assert windows.grid(512, 512) is None
    assert windows.grid(512, 513, whole=True) == Grid(512, 513, 512, 64)
    assert find_tiling(None, 10, trained, 100).grid(600, 600) == Grid(600, 600, 512, 10)
    assert find_tiling(300, None, trained, 100).grid(600, 600) == Grid(600, 600, 300, 75)
    with pytest.raises(UserError, match="must be at most half of the windows' side of 300 pixels, not 151"):
        find_tiling(300, 151, {}, 100)


def test_a_tile_shows_as_much_as_an_image_of_training(tmp_path):
    """The median short side; what cannot be read is passed over."""
    for number, size in enumerate([(40, 90), (200, 50), (70, 70)]):
        Image.new("L", size).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"none")
    paths = [str(tmp_path / f"{number}.png") for number in range(4)]
    assert usual_side(FileReader(paths), PLAIN) == 50
    assert usual_side(FileReader(paths[3:]), PLAIN) is None


# --- reading


@pytest.mark.parametrize("layout", ["tiles", "strips", "photograph"])
@pytest.mark.parametrize("band", [2**28, 0])
def test_tiles_have_the_pixels_of_the_image(tmp_path, layout, band, monkeypatch):
    """By rows of tiles, or by single ones where a row is too large."""
    monkeypatch.setattr(itpn.tasks.source_images, "KEPT_BYTES", band)
    whole, path = draw_bands(150, 210), tmp_path / "image.tif"
    if layout == "photograph":
        whole = (whole[:3] >> 4).astype(np.uint8)
        Image.fromarray(whole.transpose(1, 2, 0)).save(path)
    else:
        options = {} if layout == "tiles" else {"tiled": False, "blockysize": 8, "blockxsize": None}
        write_geotiff(path, whole, **options)
    image, grid = SourceImage("image", open_sample(path), path), Grid(150, 210, 64, 16)
    assert torch.equal(image.whole(), torch.from_numpy(whole))
    overview, read = Overview(150, 210), []
    for tile in grid:
        pixels = overview.watch(image.read)(tile)
        assert torch.equal(pixels, torch.from_numpy(whole[:, tile.slices[0], tile.slices[1]]))
        read.append(pixels)
    assert torch.equal(overview.pixels, torch.from_numpy(whole))


def test_tiles_of_an_image_that_is_too_large_as_a_whole(tmp_path):
    whole = draw_bands(150, 210)
    write_geotiff(tmp_path / "image.tif", whole)
    settings = ReadSettings(max_pixels=5000)
    image = SourceImage("image", open_sample(tmp_path / "image.tif", settings), tmp_path / "image.tif", settings)
    assert not image.fits
    for tile in Grid(150, 210, 64, 16):
        assert torch.equal(image.read(tile), torch.from_numpy(whole[:, tile.slices[0], tile.slices[1]]))
    with pytest.raises(UnreadableImage, match="210x150 pixels, more than the 5000 allowed"):
        image.whole()


@pytest.mark.parametrize("step", [2, 3, 7])
def test_an_overview_is_every_nth_pixel(step, monkeypatch):
    whole = torch.arange(150 * 210).reshape(1, 150, 210)
    monkeypatch.setattr(itpn.tasks.overview, "OVERVIEW", math.ceil(210 / step))
    overview = Overview(150, 210)
    for tile in Grid(150, 210, 64, 16):
        overview.add(tile, whole[:, tile.slices[0], tile.slices[1]])
    assert overview.step == step
    assert torch.equal(overview.pixels, whole[:, ::step, ::step])


# --- classes of pixels


def test_a_georeferenced_image_in_tiles(tmp_path, capsys):
    """Its classes are those of its tiles, in a GeoTIFF of the same grid, with no data where the source has none."""
    module = save_segmenter(tmp_path / "model.safetensors", **DEEP)
    image, out = draw_bands(200, 330), tmp_path / "out"
    source = write_geotiff(tmp_path / "scene.tif", image)
    assert main(["predict", str(tmp_path / "model.safetensors"), str(source), "--out", str(out)]) == 0
    assert "330x200 pixels are predicted in 28 tiles of 64 px that overlap by 16 px" in capsys.readouterr().err
    (answer,) = json.loads((out / "predictions.json").read_text())
    with rasterio.open(out / answer["raster"]) as result, rasterio.open(source) as original:
        assert (result.crs, result.transform, result.shape) == (original.crs, original.transform, original.shape)
        assert (result.nodata, result.dtypes, result.count) == (NO_DATA, ("uint8",), 1)
        assert result.profile["compress"] == "deflate"
        assert result.profile["tiled"]
        for row, col in [(0, 0), (137, 20), (199, 329)]:
            assert result.xy(row, col) == original.xy(row, col)
        labels = result.read(1)
    with Image.open(out / answer["labels"]) as png:
        assert np.array_equal(np.asarray(png), labels)
    missing = (image == 0).all(axis=0)
    assert missing.any()
    assert np.array_equal(labels == NO_DATA, missing)
    assert sum(answer["fractions"].values()) == pytest.approx(1)
    known = {CLASSES[n]: pytest.approx((labels == n).sum() / (~missing).sum()) for n in range(3) if (labels == n).any()}
    assert answer["fractions"] == known
    assert len(known) > 1

    # at the middle of tiles it is what the network says of these
    segment, normalize = make_segmentation(module.config), make_normalize(module.config)
    for tile in Grid(200, 330, SIDE, SIDE // 4):
        own = segment(module.model, normalize, torch.from_numpy(image[:, tile.slices[0], tile.slices[1]])).numpy()
        middle = (slice(20, 44), slice(20, 44))
        inside = labels[tile.slices][middle]
        assert np.array_equal(inside[inside != NO_DATA], own[middle][inside != NO_DATA])


def test_one_tile_is_the_image_as_a_whole(tmp_path):
    """Exactly, with the file's options and without."""
    save_segmenter(tmp_path / "model.safetensors")
    pixels = (draw_bands(90, 70)[:3] >> 4).astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    labels = []
    for number, options in enumerate([[], ["--window-size", "90"], ["--data.window-size", "89"]]):
        out = tmp_path / str(number)
        command = ["predict", str(tmp_path / "model.safetensors"), str(tmp_path / "photo.png"), "--out", str(out)]
        assert main([*command, *options]) == 0
        labels.append(np.asarray(Image.open(out / "0000-photo-labels.png")))
    assert np.array_equal(labels[0], labels[1])
    assert not np.array_equal(labels[0], labels[2])  # two tiles
    assert not list(tmp_path.glob("*/*.tif"))


PREDICT = """
import sys
from pathlib import Path
from itpn.cli import main
from itpn.data.annotations import read_objects

def memory(what):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) / 1024

for image in sys.argv[3:]:  # the first loads libraries
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    assert main(["predict", sys.argv[1], image, "--out", sys.argv[2], "--window-size", "400"]) == 0
    print("peak in MB:", memory("VmHWM"))
"""


def test_memory_does_not_grow_with_the_image(tmp_path):
    """5.8 megapixels, 46 MB as stored and 69 MB as probabilities, take as much as a quarter of them."""
    save_segmenter(tmp_path / "model.safetensors", **DEEP)
    images = [write_geotiff(tmp_path / f"{side}.tif", draw_bands(side, side)) for side in (450, 1200, 2400)]
    command = [sys.executable, "-c", PREDICT, tmp_path / "model.safetensors", tmp_path / "out", *images]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    _, small, large = (float(line.split(": ")[1]) for line in run.stdout.splitlines() if line.startswith("peak"))
    assert large < small + 60


@pytest.mark.parametrize("missing", ["rasterio", "pyogrio"])
def test_without_the_extra_a_note_says_what_is_not_written(tmp_path, monkeypatch, capsys, missing):
    save_segmenter(tmp_path / "model.safetensors", **DEEP)
    write_geotiff(tmp_path / "scene.tif", draw_bands(90, 70))
    tifffile.imwrite(tmp_path / "plain.tif", draw_bands(90, 70), photometric="minisblack", planarconfig="separate")
    monkeypatch.setattr(
        itpn.data.formats.georeference, "find_spec", lambda name: None if name == missing else find_spec(name)
    )
    command = ["predict", str(tmp_path / "model.safetensors"), "--out", str(tmp_path / "out")]
    assert main([*command, str(tmp_path / "plain.tif")]) == 0
    assert "itpn[geo]" not in capsys.readouterr().err
    assert main([*command, str(tmp_path / "scene.tif")]) == 0
    said = capsys.readouterr().err
    assert "scene.tif: is georeferenced, and its results are not: pip install 'itpn[geo]'" in said
    assert not list(tmp_path.glob("out/*-labels.tif"))
    assert list(tmp_path.glob("out/*-labels.png"))


def test_evaluation_is_of_what_is_predicted(tmp_path):
    """mIoU of large images in tiles is that of the class maps that `itpn predict` writes."""
    save_segmenter(tmp_path / "model.safetensors", **DEEP)
    for name in ("images", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(200, 330), (150, 150)]):
        image = draw_bands(height, width).clip(1)
        write_geotiff(tmp_path / "data" / "images" / f"{number}.tif", image)
        Image.fromarray(rng.integers(0, 3, (height, width), np.uint8)).save(
            tmp_path / "data" / "masks" / f"{number}.png"
        )
    (tmp_path / "data" / "classes.txt").write_text("\n".join(CLASSES))
    model, metrics = str(tmp_path / "model.safetensors"), {}
    for side in ("64", "100"):
        windows, out = ["--data.window-size", side, "--data.window-overlap", "20"], tmp_path / side
        assert main(["predict", model, str(tmp_path / "data" / "images"), "--out", str(out), *windows]) == 0
        data = ["--data.root", str(tmp_path / "data"), "--data.num-workers", "0", "--out", str(out)]
        assert main(["evaluate", "segmenter_nano", "--checkpoint", model, *data, *windows]) == 0
        confusion = torch.zeros(3, 3, dtype=torch.int64)
        for number in range(2):
            found, known = (
                torch.from_numpy(np.array(Image.open(path)))
                for path in (out / f"000{number}-{number}-labels.png", tmp_path / "data" / "masks" / f"{number}.png")
            )
            confusion += compare(found, known, 3)
        metrics[side] = json.loads((out / "evaluation.json").read_text())["miou"]
        assert metrics[side] == pytest.approx(PixelScores(confusion, 2).metrics["miou"], abs=1e-6)
    assert metrics["64"] != metrics["100"]


# --- objects


class FindsSquares(nn.Module):
    """Stands in for a detector: it finds each white square of a grid, as far as it is visible."""

    roi_heads = Namespace(nms_thresh=0.5)

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        assert len(images) == 1
        white = images[0][0] > 0.5
        rows, cols = (find_runs(white.any(dim=axis)) for axis in (1, 0))
        boxes = [(x0, y0, x1, y1) for y0, y1 in rows for x0, x1 in cols if white[y0:y1, x0:x1].all()]
        found = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        return [{"boxes": found, "labels": torch.ones(len(found), dtype=torch.int64), "scores": torch.rand(len(found))}]


def find_runs(values: torch.Tensor) -> list[tuple[int, int]]:
    edges = torch.nn.functional.pad(values.int(), (1, 1)).diff().nonzero()[:, 0].tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize(("window", "photograph"), [(None, False), (64, False), (64, True)])
def test_objects_of_large_images_are_evaluated(tmp_path, window, photograph):
    """400 squares in an image of many tiles are all found once, and counted, though a tile's limit is 100."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    pixels = np.zeros((220, 220, 3), np.uint8)
    boxes = [[number % 20 * 11, number // 20 * 11, 8, 8] for number in range(400)]
    for x, y, width, height in boxes:
        pixels[y : y + height, x : x + width] = 255
    if photograph:
        Image.fromarray(pixels).save(tmp_path / "val2017" / "grid.png")
    else:
        tifffile.imwrite(tmp_path / "val2017" / "grid.tif", pixels[..., 0].astype(np.uint16) * 257)
    name = "grid.png" if photograph else "grid.tif"
    known = [
        {"id": n + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 64, "iscrowd": 0}
        for n, box in enumerate(boxes)
    ]
    content = {
        "images": [{"id": 1, "file_name": name, "height": 220, "width": 220}],
        "annotations": known,
        "categories": [{"id": 1, "name": "square"}],
    }
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    images = read_objects(str(tmp_path), "val")
    kind = {} if photograph else {"dtype": "uint16", "value_range": ("0", "65535")}
    data = DetectionDataConfig(num_workers=0, mean=(0.5,), std=(0.5,), img_size=60, window_size=window, **kind)
    config = DetectionConfig(model=DetectionModelConfig(in_chans=3 if photograph else 1), data=data)
    evaluator = DetectionEvaluator(config, images, False)
    assert len(evaluator.tiling.grid(220, 220, photograph)) > 9
    (scores,), _ = evaluate(evaluator, [FindsSquares()], torch.device("cpu"), 0, 1)
    assert scores.metrics["box"]["ap"] == pytest.approx(1)


def test_a_detector_on_a_large_georeferenced_image(tmp_path):
    """Random weights: whatever it finds is in all files, and drawn."""
    torch.manual_seed(0)
    config = DetectionConfig(
        model=DetectionModelConfig(
            name="itpn_nano", scratch=True, patch_size=16, head_width=16, rpn_post_nms_top_n_train=40, in_chans=4
        ),
        data=DetectionDataConfig(img_size=SIDE, **DEEP),
    )
    config, _ = resolve_with_head(config, None)
    model, _ = build_detector(config, CLASSES, True, None)
    DetectionModule(model.eval(), config, "test", CLASSES).save(tmp_path / "model.safetensors", {})
    source, out = write_geotiff(tmp_path / "scene.tif", draw_bands(200, 330)), tmp_path / "out"
    command = ["predict", str(tmp_path / "model.safetensors"), str(source), "--out", str(out), "--min-score", "0"]
    assert main(command) == 0
    (answer,) = json.loads((out / "predictions.json").read_text())
    assert answer["size"] == [200, 330]
    assert answer["objects"]
    assert all(one["mask"]["size"] == [200, 330] for one in answer["objects"])
    features = json.loads((out / answer["geojson"]).read_text())["features"]
    assert [one["properties"]["score"] for one in features] == [one["score"] for one in answer["objects"]]
    boxes = pyogrio.raw.read(out / answer["geopackage"], layer="boxes")[2]
    for one, shape in zip(answer["objects"], boxes, strict=True):
        x0, y0, x1, y1 = one["box"]
        corners = [where(*corner) for corner in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))]
        assert np.allclose(sorted({*read_points(shape)}), sorted({*corners}), rtol=0, atol=1e-6)
    with Image.open(next(out.glob("0000-*.png"))) as drawn:
        assert drawn.width >= 330


@pytest.mark.parametrize("corner", [(5e9, 5e9), (5e5, 5e6)])
def test_coordinates_beyond_the_earth(tmp_path, corner):
    """No results at places, and a line that says why: GDAL cannot tell a longitude and latitude."""
    options = {"driver": "GTiff", "width": 30, "height": 20, "count": 1, "dtype": "uint8", "crs": UTM}
    with rasterio.open(tmp_path / "a.tif", "w", transform=from_origin(*corner, 10, 10), **options) as file:
        file.write(np.zeros((1, 20, 30), np.uint8))
    place, reason = find_georeference(tmp_path / "a.tif")
    assert (place is None) == (corner == (5e9, 5e9))
    assert reason == (None if place else NOWHERE)


def test_tiles_without_a_value_are_named(tmp_path, capsys):
    save_segmenter(tmp_path / "model.safetensors", **DEEP)
    write_geotiff(tmp_path / "scene.tif", np.zeros_like(draw_bands(200, 200)))
    command = ["predict", str(tmp_path / "model.safetensors"), str(tmp_path / "scene.tif"), "--window-size", "64"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "scene.tif: no pixel has a value: all are NaN, infinite or without data" in capsys.readouterr().err


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_images_are_where_their_stored_pixels_are(tmp_path, orientation):
    pixels = np.arange(1500, dtype=np.uint16).reshape(30, 50)
    with tifffile.TiffFile(write_geotiff(tmp_path / "plain.tif", pixels[None])) as file:
        places = [tag for tag in file.pages[0].tags if tag.code > 30000]
        tags = [(tag.code, tag.dtype, tag.count, tag.value, True) for tag in places]
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, extratags=[*tags, (274, "H", 1, orientation, True)], metadata=None)
    turned = itpn.read_image(path)[0]
    place, _ = find_georeference(path)
    with rasterio.open(path) as file:
        stored = file.read(1)
        for row, column in ((0, 0), (3, 7), (turned.shape[0] - 1, 2)):
            y, x = np.argwhere(stored == int(turned[row, column]))[0]
            assert np.allclose(place.to_ground([(column + 0.5, row + 0.5)])[0], file.xy(y, x))


def test_objects_are_where_they_are(tmp_path):
    """Corners of boxes and masks in both files are where rasterio has the image's pixels, also turned and sheared."""
    place = Georeference(rasterio.crs.CRS.from_string(UTM), TURNED)
    pixels = np.ones((4, 6), bool)
    pixels[1:3, 2:4] = False  # a hole
    pixels[3, 0] = False
    objects = Objects(
        torch.tensor([[10.0, 20, 16, 24], [100, 150, 130, 170]]),
        torch.tensor([1, 2]),
        torch.tensor([0.9, 0.6]),
        [Piece(20, 10, pixels), Piece(150, 100, np.ones((20, 30), bool))],
    )
    files = ObjectFiles(tmp_path, ["house", "tree"], 0.5)
    files.add("scene.tif", (200, 300), objects, torch.zeros(3, 200, 300, dtype=torch.uint8), 1, place)
    files.finish()
    (answer,) = json.loads((tmp_path / "predictions.json").read_text())

    collection = json.loads((tmp_path / answer["geojson"]).read_text())
    assert set(collection) == {"type", "features"}
    house, tree = collection["features"]
    assert tree["properties"] == {"class": "tree", "score": pytest.approx(0.6), "image": "scene.tif"}
    corners = [where(col, row) for col, row in [(100, 150), (130, 150), (130, 170), (100, 170)]]
    lons, lats = rasterio.warp.transform(UTM, "EPSG:4326", *zip(*corners, strict=True))
    ring = tree["geometry"]["coordinates"][0]
    assert {(round(x, 7), round(y, 7)) for x, y in ring} == {
        (round(x, 7), round(y, 7)) for x, y in zip(lons, lats, strict=True)
    }
    assert 8 < ring[0][0] < 10  # longitude first
    assert ring[0] == ring[-1]
    assert area(ring) > 0
    outer, hole = house["geometry"]["coordinates"]
    assert area(outer) > 0 > area(hole)

    layers = {name for name, _ in pyogrio.list_layers(tmp_path / answer["geopackage"])}
    assert layers == {"boxes", "polygons"}
    counts = []
    for layer in ("boxes", "polygons"):
        meta, _, shapes, columns = pyogrio.raw.read(tmp_path / answer["geopackage"], layer=layer)
        assert rasterio.crs.CRS.from_string(meta["crs"]) == place.crs
        assert list(meta["fields"]) == ["class", "score", "image"]
        assert columns[0].tolist() == ["house", "tree"]
        assert columns[1].tolist() == pytest.approx([0.9, 0.6])
        assert np.allclose(sorted({*read_points(shapes[1])}), sorted({*corners}), rtol=0, atol=1e-6)
        counts.append(len(read_points(shapes[0])))
    assert counts == [5, 5 + 2 + 5]  # the box; the mask, with a corner that is not in it, and the hole


def where(col: float, row: float) -> tuple[float, float]:
    """The corner of a pixel, by rasterio."""
    return rasterio.transform.xy(TURNED, row, col, offset="ul")


def area(ring) -> float:
    x, y = np.array(ring).T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2)


def read_points(wkb: bytes) -> list[tuple[float, float]]:
    """Of a MultiPolygon of one polygon, all rings."""
    (rings,) = np.frombuffer(wkb, "<u4", 1, 9 + 5)
    points, place = [], 9 + 9
    for _ in range(rings):
        (count,) = np.frombuffer(wkb, "<u4", 1, place)
        points += map(tuple, np.frombuffer(wkb, "<f8", 2 * count, place + 4).reshape(-1, 2).tolist())
        place += 4 + 16 * count
    return points
