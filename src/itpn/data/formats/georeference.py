"""Where an image is on the ground (`itpn[geo]`)."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from itpn.data.decode import TIFF_HEADERS
from itpn.data.file_types import find_envi_header
from itpn.data.formats.reader import JPEG2000
from itpn.data.headers import read_tags
from itpn.data.orientation import FLIPPED_COLUMNS, FLIPPED_ROWS, ORIENTATION, SWAPPED, choose_orientation
from itpn.data.readers import read_head

GEO_KEYS = 34735  # the TIFF tag of a coordinate reference system
NOWHERE = "it has no longitude and latitude where its coordinates say that it is: its results are not georeferenced"
MISSING = "is georeferenced, and its results are not: pip install 'itpn[geo]'"


@dataclass(frozen=True)
class Georeference:
    """Where the pixels of an image are.

    Attributes:
        crs: rasterio's coordinate reference system.
        transform: from (column, row) to the CRS, which may turn and shear; the first pixel's corner is (0, 0).
    """

    crs: Any
    transform: Any

    def to_ground(self, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        """Coordinates in the CRS of points (column, row)."""
        a, b, c, d, e, f = self.transform[:6]
        return [(a * x + b * y + c, d * x + e * y + f) for x, y in points]


def find_georeference(path: Path) -> tuple[Georeference | None, str | None]:
    """Where an image file is on the ground, and why that cannot be told.

    Returns:
        The place, or None for a file without one; what to say where a library is missing, or the place is none.
    """
    driver = find_driver(path)
    if driver is None:
        return None, None
    if find_spec("rasterio") is None or find_spec("pyogrio") is None:
        return None, MISSING if has_geo_keys(path) else None
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            with rasterio.open(path, driver=driver) as file:
                crs, transform, width, height = file.crs, file.transform, file.width, file.height
        except RasterioError:  # which another library has read
            return None, None
    earthly = crs is not None and (crs.is_geographic or crs.is_projected)  # others have no longitude and latitude
    known = earthly and not transform.is_identity and not transform.is_degenerate
    if not known:
        return None, None
    place = Georeference(crs, transform)
    if not is_on_earth(place, width, height):
        return None, NOWHERE
    if driver == "GTiff":
        with open(path, "rb") as file:
            orientation = choose_orientation((read_tags(file, (ORIENTATION,)).get(ORIENTATION) or (1,))[0], None)
        place = unturn(place, orientation, height, width)
    return place, None


def unturn(place: Georeference, orientation: int, height: int, width: int) -> Georeference:
    """The place of an image that is turned when it is read.

    Args:
        place: of the stored pixels.
        height, width: of the stored pixels.
    """
    from rasterio import Affine

    if orientation in SWAPPED:
        height, width = width, height

    def store(column: float, row: float) -> tuple[float, float]:
        column = width - column if orientation in FLIPPED_COLUMNS else column
        row = height - row if orientation in FLIPPED_ROWS else row
        return (row, column) if orientation in SWAPPED else (column, row)

    (x, y), (x_right, y_right), (x_below, y_below) = place.to_ground([store(0, 0), store(1, 0), store(0, 1)])
    return Georeference(place.crs, Affine(x_right - x, x_below - x, x, y_right - y, y_below - y, y))


def is_on_earth(place: Georeference, width: int, height: int) -> bool:
    """Whether the corners of an image have a longitude and latitude."""
    from rasterio.warp import transform

    corners = place.to_ground([(0, 0), (width, 0), (width, height), (0, height)])
    try:
        lons, lats = transform(place.crs, "EPSG:4326", *zip(*corners, strict=True))
    except Exception:  # of GDAL, whose class is private
        return False
    return bool(np.isfinite(lons).all()) and max(map(abs, lats)) <= 90 + 1e-6


def find_driver(path: Path) -> str | None:
    """GDAL's name of a file's format; None for formats without places. Some of its others read from the network."""
    head = read_head(path, 12)
    if head[:4] in TIFF_HEADERS:
        return "GTiff"
    if head.startswith(JPEG2000):
        return "JP2OpenJPEG"
    return "ENVI" if find_envi_header(str(path)) else None


def has_geo_keys(path: Path) -> bool:
    """Whether a file is a GeoTIFF, without the libraries for one."""
    with open(path, "rb") as file:
        head = file.read(8)
        if head[:4] not in TIFF_HEADERS:
            return False
        try:
            directory = ImageFileDirectory_v2(head + (file.read(8) if 43 in head[2:4] else b""))
            file.seek(directory.next)
            directory.load(file)
        except Exception:  # a corrupt file, of which the reader of images tells
            return False
        return GEO_KEYS in directory
