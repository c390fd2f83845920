"""`itpn predict` on images of any size: in tiles, by parts of the file, with bounded memory, at their places."""

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import rasterio
import rasterio.warp
import torch
from PIL import Image
from rasterio.transform import Affine

import itpn
import itpn.tasks.georeference
import itpn.tasks.large
from itpn.cli import main
from itpn.data.samples import open_sample
from itpn.errors import UserError
from itpn.tasks.configs import (
    SegmentationConfig,
    SegmentationDataConfig,
    SegmentationModelConfig,
)
from itpn.tasks.detection.merging import Objects, Piece
from itpn.tasks.detection.prediction import ObjectFiles
from itpn.tasks.finetuning.network import resolve_with_head
from itpn.tasks.georeference import Georeference
from itpn.tasks.large import NO_DATA, Overview, SourceImage, find_tiling
from itpn.tasks.pixels import make_normalize
from itpn.tasks.segmentation.inference import make_segmentation
from itpn.tasks.segmentation.module import SegmentationModule
from itpn.tasks.segmentation.network import build_segmenter
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


# --- reading


@pytest.mark.parametrize("layout", ["tiles", "strips", "photograph"])
@pytest.mark.parametrize("band", [2**28, 0])
def test_tiles_have_the_pixels_of_the_image(tmp_path, layout, band, monkeypatch):
    """By rows of tiles, or by single ones where a row is too large."""
    monkeypatch.setattr(itpn.tasks.large, "BAND", band)
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


@pytest.mark.parametrize("step", [2, 3, 7])
def test_an_overview_is_every_nth_pixel(step, monkeypatch):
    whole = torch.arange(150 * 210).reshape(1, 150, 210)
    monkeypatch.setattr(itpn.tasks.large, "OVERVIEW", math.ceil(210 / step))
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

def memory(what):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) / 1024

for image in [sys.argv[3], *sys.argv[3:]]:  # the first loads libraries
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    assert main(["predict", sys.argv[1], image, "--out", sys.argv[2], "--window-size", "500"]) == 0
    print("peak in MB:", memory("VmHWM"))
"""


def test_memory_does_not_grow_with_the_image(tmp_path):
    """10 megapixels, 82 MB as stored and 123 MB as probabilities, take as much as 2.6 megapixels."""
    save_segmenter(tmp_path / "model.safetensors", **DEEP)
    images = [write_geotiff(tmp_path / f"{side}.tif", draw_bands(side, side)) for side in (1600, 3200)]
    command = [sys.executable, "-c", PREDICT, tmp_path / "model.safetensors", tmp_path / "out", *images]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    _, small, large = (float(line.split(": ")[1]) for line in run.stdout.splitlines() if line.startswith("peak"))
    assert large < small + 40


# --- objects


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

    def where(col: float, row: float) -> tuple[float, float]:
        """The corner of a pixel, by rasterio."""
        return rasterio.transform.xy(TURNED, row, col, offset="ul")

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
