"""Results at their places on the ground: class maps as GeoTIFF, objects as GeoJSON and GeoPackage (`itpn[geo]`)."""

import json
import struct
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from itpn.data.decode import TIFF_HEADERS
from itpn.data.file_types import find_envi_header
from itpn.data.formats.reading import JPEG2000
from itpn.data.readers import read_head
from itpn.system.writing import open_whole, write_whole

GEO_KEYS = 34735  # the TIFF tag of a coordinate reference system
ROWS = 512  # of a raster that are written at a time, and the side of its tiles
DIGITS = 9  # of degrees: a tenth of a millimetre
NOWHERE = "it has no longitude and latitude where its coordinates say that it is: its results are not georeferenced"
MISSING = "is georeferenced, and its results are not: pip install 'itpn[geo]'"

Ring = list[tuple[float, float]]
Polygons = list[list[Ring]]  # each a ring and those of its holes


@dataclass(frozen=True)
class Georeference:
    """Where the pixels of an image are.

    Attributes:
        crs: rasterio's coordinate reference system.
        transform: from (column, row) to the CRS, which may turn and shear; the first pixel's corner is (0, 0).
    """

    crs: Any
    transform: Any


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
                crs, transform, size = file.crs, file.transform, (file.width, file.height)
        except RasterioError:  # which another library has read
            return None, None
    earthly = crs is not None and (crs.is_geographic or crs.is_projected)  # others have no longitude and latitude
    known = earthly and not transform.is_identity and not transform.is_degenerate
    if not known:
        return None, None
    place = Georeference(crs, transform)
    return (place, None) if is_on_earth(place, *size) else (None, NOWHERE)


def is_on_earth(place: Georeference, width: int, height: int) -> bool:
    """Whether the corners of an image have a longitude and latitude."""
    from rasterio.warp import transform

    ((corners,),) = to_ground([[[(0, 0), (width, 0), (width, height), (0, height)]]], place)
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


def write_raster(
    path: Path, labels: np.ndarray, place: Georeference, colours: Sequence[tuple[int, int, int]], nodata: int = 255
) -> None:
    """Write classes of pixels, uint8 [H, W], as a GeoTIFF of the same grid, a few rows at a time."""
    import rasterio
    from rasterio.windows import Window

    height, width = labels.shape
    options: dict[str, Any] = {"driver": "GTiff", "count": 1, "dtype": "uint8", "nodata": nodata}
    options |= {"height": height, "width": width, "crs": place.crs, "transform": place.transform}
    options |= {"tiled": True, "blockxsize": ROWS, "blockysize": ROWS, "compress": "deflate", "BIGTIFF": "IF_SAFER"}
    with open_whole(path) as partial, rasterio.open(partial.name, "w", **options) as file:
        file.write_colormap(1, {number: (*colour, 255) for number, colour in enumerate(colours)})
        for top in range(0, height, ROWS):
            rows = labels[top : top + ROWS]
            file.write(rows, 1, window=Window(0, top, width, len(rows)))


# --- objects


@dataclass(frozen=True)
class Feature:
    """An object in pixels of its image: x to the right, y down, from the corner of the first pixel.

    Attributes:
        box: as polygons.
        mask: its polygons; None without a mask.
    """

    name: str
    score: float
    box: Polygons
    mask: Polygons | None = None


def make_feature(
    name: str, score: float, box: Sequence[float], mask: tuple[int, int, np.ndarray] | None = None
) -> Feature:
    """An object as polygons.

    Args:
        box: x0, y0, x1, y1.
        mask: top, left and bool [h, w].
    """
    x0, y0, x1, y1 = box
    around = [[[(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]]]
    return Feature(name, score, around, None if mask is None else trace(*mask) or None)


def trace(top: int, left: int, pixels: np.ndarray) -> Polygons:
    """The polygons around the pixels of a mask, bool [h, w], along their edges."""
    from rasterio.features import shapes

    if not pixels.size:
        return []
    found = shapes(pixels.astype(np.uint8), mask=pixels, connectivity=4)
    return [[[(x + left, y + top) for x, y in ring] for ring in shape["coordinates"]] for shape, _ in found]


def write_geojson(path: Path, features: Sequence[Feature], image: str, place: Georeference) -> None:
    """Write objects as RFC 7946 has it: longitude and latitude of WGS 84, exterior rings counterclockwise."""
    from rasterio.warp import transform_geom

    collected = []
    for one in features:
        polygons = to_ground(one.mask or one.box, place)
        geometry = transform_geom(place.crs, "EPSG:4326", {"type": "MultiPolygon", "coordinates": polygons})
        known = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
        known = [[[(round(x, DIGITS), round(y, DIGITS)) for x, y, *_ in ring] for ring in rings] for rings in known]
        known = turn_rings(known)
        shape: dict[str, Any] = {"type": "MultiPolygon", "coordinates": known}
        if len(known) == 1:
            shape = {"type": "Polygon", "coordinates": known[0]}
        properties = {"class": one.name, "score": one.score, "image": image}
        collected.append({"type": "Feature", "geometry": shape, "properties": properties})
    write_whole(path, json.dumps({"type": "FeatureCollection", "features": collected}).encode())


def write_geopackage(path: Path, features: Sequence[Feature], image: str, place: Georeference) -> None:
    """Write objects in the CRS of their image: a layer ``boxes``, and ``polygons`` where they have masks."""
    from pyogrio.raw import write

    layers = {"boxes": [one.box for one in features]}
    if any(one.mask is not None for one in features):
        layers["polygons"] = [one.mask or one.box for one in features]
    columns: list[Any] = [
        np.array([one.name for one in features], object),
        np.array([one.score for one in features], float),
        np.array([image] * len(features), object),
    ]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".geopackage") as folder:
        partial = Path(folder, "objects.gpkg")
        for layer, shapes in layers.items():
            known = np.array([to_wkb(turn_rings(to_ground(shape, place))) for shape in shapes], object)
            write(
                *(str(partial), known, columns, ["class", "score", "image"]),
                layer=layer,
                driver="GPKG",
                geometry_type="MultiPolygon",
                crs=place.crs.to_wkt(),
            )
        partial.replace(path)


def to_ground(polygons: Polygons, place: Georeference) -> Polygons:
    """Pixels to the CRS of their image."""
    a, b, c, d, e, f = place.transform[:6]
    return [[[(a * x + b * y + c, d * x + e * y + f) for x, y in ring] for ring in rings] for rings in polygons]


def turn_rings(polygons: Polygons) -> Polygons:
    """With exterior rings counterclockwise and holes clockwise, wherever the axes of pixels point."""
    return [list(turn(rings)) for rings in polygons]


def turn(rings: list[Ring]) -> Iterator[Ring]:
    for number, ring in enumerate(rings):
        x, y = np.array(ring).T
        counterclockwise = float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum()) > 0
        yield ring if counterclockwise == (number == 0) else ring[::-1]


def to_wkb(polygons: Polygons) -> bytes:
    """A MultiPolygon as well-known binary."""
    parts = [struct.pack("<BII", 1, 6, len(polygons))]
    for rings in polygons:
        parts.append(struct.pack("<BII", 1, 3, len(rings)))
        parts += [struct.pack("<I", len(ring)) + np.array(ring, "<f8").tobytes() for ring in rings]
    return b"".join(parts)
