"""Real files of many formats, against the values that the library of each field gives (`shared/data/science_files`)."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import itpn
from itpn.data.formats.reader import open_file, read_size
from itpn.errors import UserError

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "science_files"
MANIFEST = FOLDER / "manifest.csv"
# what is not as stored: rescaled, magnitudes, bits, and upright
TYPES = {"ct_slope.dcm": "float32", "sar_complex64.tif": "float32", "mask_1bit_g4.tif": "uint8"}
UPRIGHT = {"exif_rotated.jpg": (3, 320, 200)}


def read_rows() -> list[dict[str, str]]:
    with open(MANIFEST, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


ROWS = read_rows() if MANIFEST.is_file() else []
pytestmark = pytest.mark.skipif(not ROWS, reason="needs ../shared/data/science_files")


def numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(";")]


def summarize(values: np.ndarray, function: Any) -> list[float]:
    return [float(function(own[~np.isnan(own)])) if not np.isnan(own).all() else float("nan") for own in values]


@pytest.mark.parametrize("row", ROWS, ids=[row["file"] for row in ROWS])
def test_a_real_file(row):
    path = FOLDER / row["file"]
    if row["file"] == "truncated.tif":
        with pytest.raises(UserError, match=r"truncated\.tif: cut off: it ends before its last pixels"):
            itpn.read_image(path)
        return
    image = open_file(path)
    sizes = dict(zip(row["stored_axes"], map(int, row["stored_shape"].split("x")), strict=True))
    size = UPRIGHT.get(row["file"], (int(row["channels"]), sizes["Y"], sizes["X"]))
    assert (image.channels, image.height, image.width) == size
    assert image.pages == int(row["frames"])
    pages = [itpn.read_image(path, page).numpy() for page in range(image.pages)]
    assert {page.dtype for page in pages} == {image.dtype} == {np.dtype(TYPES.get(row["file"], row["dtype"]))}
    values = np.stack(pages, axis=1).reshape(image.channels, -1).astype(np.float64)
    if row["nodata"] not in ("", "nan"):
        assert image.nodata == pytest.approx(float(row["nodata"]), rel=1e-6)
        values[np.isclose(values, float(row["nodata"]), rtol=1e-6, atol=0)] = np.nan
    assert np.isnan(values).sum() == int(row["not_valid_values"])
    near = 2 if row["file"] in ("histology.avif", "exif_rotated.jpg", "pyramid_tiled.ome.tif") else 0  # lossy
    for name, function in {"min": np.min, "max": np.max, "mean": np.mean}.items():
        assert summarize(values, function) == pytest.approx(numbers(row[name]), rel=1e-4, abs=near, nan_ok=True), name


@pytest.mark.parametrize("row", ROWS, ids=[row["file"] for row in ROWS])
def test_the_size_of_a_real_file(row):
    sizes = dict(zip(row["stored_axes"], map(int, row["stored_shape"].split("x")), strict=True))
    size = UPRIGHT.get(row["file"], (0, sizes["Y"], sizes["X"]))
    assert read_size(str(FOLDER / row["file"])) == size[1:]
