"""Results at their places on the ground: class maps as GeoTIFF, objects as GeoJSON and GeoPackage (`itpn[geo]`)."""

import json
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from itpn.data.formats.georeference import Georeference
from itpn.system.writing import open_whole, write_whole

ROWS = 512  # of a raster that are written at a time, and the side of its tiles
DIGITS = 9  # of degrees: a tenth of a millimetre

Ring = list[tuple[float, float]]
Polygons = list[list[Ring]]  # each a ring and those of its holes


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
    return [[place.to_ground(ring) for ring in rings] for rings in polygons]


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
