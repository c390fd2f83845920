"""A sample set drawn on the spot, "shapes", so that readers and tasks can be tried without a download.

A scene is one or two textured grounds with a few textured, shaded, partly hidden shapes on them. Texture and
colour say nothing about a shape's class: only its outline does. Shapes are drawn from their signed distance,
which gives anti-aliased edges, shading and soft shadows alike at any image size.
"""

import colorsys
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from itpn.errors import UserError, refusal
from itpn.system.writing import write_whole

Array = npt.NDArray[Any]  # float32, unless said
Mask = npt.NDArray[np.bool_]
ScenePaths = tuple[Path, Path, Path, Path]  # of one scene: in imagefolder, in coco, in ade20k, its mask there

CLASSES = ("disk", "ring", "triangle", "square", "star", "cross")
GROUNDS = ("clouds", "stripes", "checks", "dots")
SPLITS = ("train", "val")
MIN_SIZE = 32  # pixels: in smaller images the smallest shapes lose their form
VERSION = 1  # of the drawing: raise it when the same arguments give other files


@dataclass(frozen=True)
class Instance:
    """One shape: its class, the pixels where it is seen, bool [H, W], and their box (x0, y0, x1, y1)."""

    category: str
    mask: Mask
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """An image, uint8 [H, W, 3]; its grounds, uint8 [H, W], see `labels`; its shapes, the hindmost first."""

    image: npt.NDArray[np.uint8]
    ground: npt.NDArray[np.uint8]
    instances: list[Instance]

    @property
    def labels(self) -> npt.NDArray[np.uint8]:
        """uint8 [H, W] as in ADE20K: 0 where two grounds blend, then `GROUNDS` from 1, then `CLASSES`."""
        labels = self.ground.copy()
        for instance in self.instances:
            labels[instance.mask] = 1 + len(GROUNDS) + CLASSES.index(instance.category)
        return labels


@dataclass(frozen=True)
class ShapesFolders:
    """Where `write_shapes` has put each layout: what `--data.root` takes for each task."""

    imagefolder: Path
    coco: Path
    ade20k: Path


# over 60 lines: each draw of random numbers depends on those before, and reads in their order
def draw_scene(
    seed: int, split: str, index: int, *, img_size: int | tuple[int, int] = 96, category: str | None = None
) -> Scene:
    """Draw scene ``index`` of a split; it depends on the arguments alone, not on what was drawn before.

    Args:
        img_size: side, or (height, width), in pixels.
        category: draw this one shape, large (classification); by default one to five of any class, the first
            of which goes through `CLASSES` with the index, so that each occurs in the smallest set.

    Raises:
        UserError: an unknown split or class, a negative seed or index, a side below `MIN_SIZE`.
    """
    height, width = _check_size(img_size)
    if split not in SPLITS or category not in (None, *CLASSES):
        raise UserError(f"no split {split!r} or class {category!r}: there are {SPLITS} and {CLASSES}")
    if seed < 0 or index < 0:
        raise UserError(f"seed and index must not be negative, not {seed} and {index}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index, category is None])
    # Lengths are in units of the shorter side, random draws too: another size shows the same scene.
    pixel = 1 / min(height, width)
    x, y = np.meshgrid(*((np.arange(n, dtype=np.float32) + 0.5) * pixel for n in (width, height)))  # [H, W]
    light = _draw_direction(rng)
    canvas, ground, hue = _draw_grounds(rng, x, y, pixel)

    masks: list[Mask] = []
    areas: list[int] = []
    names: list[str] = []
    for number in range(1 if category else rng.integers(1, 6)):
        name = category or (CLASSES[index % len(CLASSES)] if number == 0 else str(rng.choice(CLASSES)))
        for _ in range(4):  # tries to find a place that leaves enough of every earlier shape to be recognised
            radius = rng.uniform(0.2, 0.4) if category else rng.uniform(0.12, 0.28)
            centre = [rng.uniform(0.75 * radius, n * pixel - 0.75 * radius) for n in (width, height)]
            axis, stretch = _draw_direction(rng), rng.uniform(0.85, 1.0)
            columns, rows = (  # a window that holds the shape and its shadow
                slice(max(int((c - 1.4 * radius) / pixel), 0), int((c + 1.4 * radius) / pixel) + 2) for c in centre
            )
            dx, dy = x[rows, columns] - centre[0], y[rows, columns] - centre[1]
            distance = _distance(name, dx, dy, radius, axis, stretch)
            mask = np.zeros((height, width), bool)
            mask[rows, columns] = distance < 0
            if all((m & ~mask).sum() > 0.4 * area for m, area in zip(masks, areas, strict=True)):
                break
        else:
            continue
        masks = [m & ~mask for m in masks] + [mask]
        areas.append(int(mask.sum()))
        names.append(name)

        window = canvas[rows, columns]
        reach = 0.16 * radius * light
        shadow = _distance(name, dx + reach[0], dy + reach[1], radius, axis, stretch)
        window *= 1 - 0.5 * _smoothstep(0.4 - shadow / (0.35 * radius))[..., None]
        texture = _draw_texture(str(rng.choice(["plain", "gradient", *GROUNDS])), rng, dx, dy, pixel, radius)
        # A hue away from the grounds', lest the shape vanish into them.
        first, second = _draw_colours(rng, hue + rng.uniform(0.2, 0.8), saturation=(0.5, 0.95), value=(0.45, 1))
        bevel = 0.72 + 0.28 * _smoothstep(-distance / (0.25 * radius))
        shade = bevel * (1 + 0.22 * (dx * light[0] + dy * light[1]) / radius)
        colour = (first + (second - first) * texture[..., None]) * shade[..., None]
        window += (colour - window) * np.clip(0.5 - distance / pixel, 0, 1)[..., None]

    canvas *= (0.95 + 0.25 * ((x - x.mean()) * light[0] + (y - y.mean()) * light[1]))[..., None]
    canvas += 0.01 * rng.standard_normal((height, width, 1), dtype=np.float32)  # grain
    image = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
    return Scene(image, ground, [Instance(n, m, _box(m)) for n, m in zip(names, masks, strict=True)])


def write_shapes(
    root: str | os.PathLike[str],
    *,
    train: int = 1200,
    val: int = 300,
    img_size: int | tuple[int, int] = 96,
    seed: int = 0,
) -> ShapesFolders:
    """Write ``train`` and ``val`` images in each of three layouts; the same arguments give the same bytes.

    ``imagefolder/{train,val}/<class>/`` has one shape an image, classes in turn. ``coco/`` (``train2017``,
    ``val2017``, ``annotations``) and ``ade20k/`` (``images``, ``annotations``, ``classes.txt``, whose first
    line is label 1) share scenes of one to five shapes. A set that is already there is left as it is, one that
    lacks files is written anew; nothing is ever deleted.

    Args:
        img_size: side, or (height, width), in pixels.

    Raises:
        UserError: a count below the number of classes, a side below `MIN_SIZE`, a negative seed, or a folder
            that holds other data or a set made with other arguments, or that cannot be made.
    """
    size = _check_size(img_size)
    if min(train, val) < len(CLASSES):
        raise UserError(f"train and val must be at least {len(CLASSES)}, one a class, not {train} and {val}")
    if seed < 0:
        raise UserError(f"the seed must not be negative, not {seed}")
    root = Path(root)
    folders = ShapesFolders(root / "imagefolder", root / "coco", root / "ade20k")
    counts = {"train": train, "val": val}
    scenes = {split: [_scene_paths(folders, split, index) for index in range(counts[split])] for split in SPLITS}
    indices = {split: folders.coco / "annotations" / f"instances_{split}2017.json" for split in SPLITS}
    names = folders.ade20k / "classes.txt"
    everything = [names, *indices.values(), *(path for rows in scenes.values() for row in rows for path in row)]

    # The marker stands from the start, so that what a broken-off run left is known for ours.
    marker = root / "shapes.json"
    arguments = {**counts, "img_size": list(size), "seed": seed, "version": VERSION}
    found = _read_json(marker)
    complete = found.pop("complete", False)
    if found != arguments and (found or any(folder.exists() for folder in vars(folders).values())):
        raise UserError(f"{root} holds other data or a sample set made with other arguments: name another folder")
    if complete and all(path.exists() for path in everything):
        return folders
    try:
        for folder in {path.parent for path in everything}:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refusal(f"cannot make folders under {root}", error) from error
    _write_json(marker, {**arguments, "complete": False})
    for split, rows in scenes.items():
        _write_json(indices[split], _coco_index(_write_scenes(rows, seed, split, size), size))
    names.write_text("\n".join(GROUNDS + CLASSES) + "\n", encoding="utf-8")
    _write_json(marker, {**arguments, "complete": True})
    return folders


def _write_scenes(
    rows: Sequence[ScenePaths], seed: int, split: str, size: tuple[int, int]
) -> list[tuple[str, list[Instance]]]:
    """Draw and write the images of a split; returns what is in each, by the name of its file in ``coco/``."""
    annotated = []
    for index, (object_jpg, coco_jpg, ade_jpg, ade_png) in enumerate(rows):
        category = CLASSES[index % len(CLASSES)]
        object_jpg.write_bytes(_encode(draw_scene(seed, split, index, img_size=size, category=category).image))
        scene = draw_scene(seed, split, index, img_size=size)
        jpeg = _encode(scene.image)
        coco_jpg.write_bytes(jpeg)
        ade_jpg.write_bytes(jpeg)
        Image.fromarray(scene.labels).save(ade_png)
        annotated.append((coco_jpg.name, scene.instances))
    return annotated


def _check_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if min(height, width) < MIN_SIZE:
        raise UserError(f"sample images must be at least {MIN_SIZE} pixels a side, not {height}x{width}")
    return height, width


# Drawing


def _star(x: Array, y: Array, points: int, inner: float) -> Array:
    """Distance to a star with tips at radius 1; to a regular polygon when ``inner`` is cos(pi / points)."""
    half = np.pi / points
    radius = np.hypot(x, y)
    angle = np.abs((np.arctan2(y, x) + half) % (2 * half) - half)  # folded into half a tip
    edge = np.array([1 - inner * np.cos(half), inner * np.sin(half)], np.float32)
    edge /= np.hypot(*edge)
    return (radius * np.cos(angle) - 1) * edge[1] + radius * np.sin(angle) * edge[0]


def _cross(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.minimum(x, y) - 0.3, np.maximum(x, y) - 0.95)


_OUTLINES: dict[str, Callable[[Array, Array], Array]] = {  # signed distances, negative inside, about 1 in radius
    "disk": lambda x, y: np.hypot(x, y) - 0.9,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.72) - 0.23,
    "triangle": lambda x, y: _star(x, y, 3, 0.5),
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.75,
    "star": lambda x, y: _star(x, y, 5, 0.45),
    "cross": _cross,
}


def _distance(name: str, dx: Array, dy: Array, radius: float, axis: Array, stretch: float) -> Array:
    """Distance from the outline of a shape at the origin, turned to ``axis`` and narrowed across it."""
    along, across = dx * axis[0] + dy * axis[1], dy * axis[0] - dx * axis[1]
    return _OUTLINES[name](along / radius, across / (radius * stretch)) * (radius * stretch)


def _draw_grounds(rng: np.random.Generator, x: Array, y: Array, pixel: float) -> tuple[Array, Array, float]:
    """Two grounds that meet in a wavy line, often outside the image.

    Returns:
        canvas float32 [H, W, 3]; labels uint8 [H, W], 1 for the first of `GROUNDS`, 0 where two blend; mean hue.
    """
    across, along = _draw_direction(rng), _draw_direction(rng)
    offset, phase, wave = rng.uniform(-0.6, 0.6), rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.06)
    distance = (x - x.mean()) * across[0] + (y - y.mean()) * across[1] - offset
    distance += wave * np.sin(12 * (x * along[0] + y * along[1]) + phase)
    blend = np.clip(0.5 + distance / max(3 * pixel, 0.03), 0, 1)
    kinds = rng.permutation(len(GROUNDS))[:2]
    hue, difference = rng.uniform(), rng.uniform(-0.08, 0.08)
    layers = []
    for kind, ground_hue in zip(kinds, (hue - difference, hue + difference), strict=True):
        texture = _draw_texture(GROUNDS[kind], rng, x, y, pixel, 0.5)[..., None]
        first, second = _draw_colours(rng, ground_hue, saturation=(0.15, 0.5), value=(0.45, 0.95))
        layers.append(first + (second - first) * texture)
    canvas = layers[0] + (layers[1] - layers[0]) * blend[..., None]
    labels = np.where(blend == 0, kinds[0] + 1, np.where(blend == 1, kinds[1] + 1, 0))
    return canvas, labels.astype(np.uint8), hue


def _draw_texture(kind: str, rng: np.random.Generator, x: Array, y: Array, pixel: float, size: float) -> Array:
    """A pattern in 0..1, anti-aliased, at places x, y [H, W], for a surface of about ``size``."""
    axis = _draw_direction(rng)
    u, v = x * axis[0] + y * axis[1], y * axis[0] - x * axis[1]
    period = max(rng.uniform(0.25, 0.5) * size, 0.07)
    slope = 2 * np.pi * pixel / period  # of the sine, a pixel
    match kind:
        case "plain":
            return np.zeros_like(x)
        case "gradient":
            return _smoothstep(0.5 + u / (2 * size))
        case "clouds":
            return _draw_clouds(rng, *x.shape)
        case "stripes":
            return np.clip(0.5 + np.sin(u * (2 * np.pi / period)) / slope, 0, 1)
        case "checks":
            return np.clip(0.5 + np.sin(u * (np.pi / period)) * np.sin(v * (np.pi / period)) / slope, 0, 1)
        case "dots":
            u, v = (w / period - np.round(w / period) for w in (u, v))
            return np.clip(0.5 + (0.28 - np.hypot(u, v)) * period / pixel, 0, 1)
    raise ValueError(kind)


def _draw_clouds(rng: np.random.Generator, height: int, width: int) -> Array:
    """Smooth noise of three octaves, [height, width] in 0..1."""
    total = np.zeros((height, width), np.float32)
    for cells, weight in ((3, 0.6), (6, 0.3), (12, 0.15)):
        grid = rng.random((cells, cells), dtype=np.float32)
        total += weight * np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))
    return np.clip((total - 0.25) / 0.55, 0, 1)


def _draw_colours(
    rng: np.random.Generator, hue: float, *, saturation: tuple[float, float], value: tuple[float, float]
) -> tuple[Array, Array]:
    """Two related colours, each [3] in 0..1, one lighter than the other."""
    s, v = rng.uniform(*saturation), rng.uniform(*value)
    shift = rng.uniform(0.18, 0.4) * (-1 if v > 0.65 else 1)
    near = (hue + rng.uniform(-0.08, 0.08)) % 1, s * rng.uniform(0.6, 1), v + shift
    first, second = colorsys.hsv_to_rgb(hue % 1, s, v), colorsys.hsv_to_rgb(*near)
    return np.array(first, np.float32), np.array(second, np.float32)


def _draw_direction(rng: np.random.Generator) -> Array:
    angle = rng.uniform(0, 2 * np.pi)
    return np.array([np.cos(angle), np.sin(angle)], np.float32)


def _smoothstep(t: Array) -> Array:
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


# Writing


def _scene_paths(folders: ShapesFolders, split: str, index: int) -> ScenePaths:
    """The files of an index: image of one shape; scene for COCO; scene and labels for ADE20K."""
    ade_split, ade_name = {"train": "training", "val": "validation"}[split], f"ADE_{split}_{index + 1:08d}"
    return (
        folders.imagefolder / split / CLASSES[index % len(CLASSES)] / f"{index // len(CLASSES):04d}.jpg",
        folders.coco / f"{split}2017" / f"{index + 1:012d}.jpg",
        folders.ade20k / "images" / ade_split / f"{ade_name}.jpg",
        folders.ade20k / "annotations" / ade_split / f"{ade_name}.png",
    )


def _read_json(path: Path) -> dict[str, Any]:
    """What the file says; nothing when it is missing or not ours."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content).encode())


def _encode(image: Array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)  # full colour: the images are small
    return buffer.getvalue()


def _coco_index(scenes: list[tuple[str, list[Instance]]], size: tuple[int, int]) -> dict[str, Any]:
    """The content of ``instances_*.json`` for scenes given as (file name, instances)."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (name, instances) in enumerate(scenes, start=1):
        images.append({"id": image_id, "file_name": name, "height": size[0], "width": size[1], "license": 1})
        for instance in instances:
            x0, y0, x1, y1 = instance.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1 + CLASSES.index(instance.category),
                    "segmentation": _polygons(instance.mask) or _run_lengths(instance.mask),
                    "area": int(instance.mask.sum()),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "iscrowd": 0,
                }
            )
    return {
        "info": {"description": "Shapes, a generated sample set", "version": str(VERSION)},
        "licenses": [{"id": 1, "name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}],
        "categories": [{"id": 1 + i, "name": n, "supercategory": "shape"} for i, n in enumerate(CLASSES)],
        "images": images,
        "annotations": annotations,
    }


def _box(mask: Mask) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _polygons(mask: Mask) -> list[list[int]] | None:
    """COCO polygons [x0, y0, x1, y1, ...] along pixel edges, one a connected region: exactly the mask when filled.

    None when the mask has a hole: COCO fills the union of polygons, which cannot leave one out.
    """
    padded = np.pad(mask, 1)
    # Edges with the region on their right: (y, x, direction), direction 0..3 = right, down, left, up. A dict
    # and no set, for its order: the same mask gives the same polygons.
    beyond = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])
    starts = ((0, 0), (0, 1), (1, 1), (1, 0))
    edges: dict[tuple[int, int, int], None] = {}
    for direction, (other, start) in enumerate(zip(beyond, starts, strict=True)):
        edges.update(((y, x, direction), None) for y, x in (np.argwhere(mask & ~other) + start).tolist())

    polygons = []
    while edges:
        first = y, x, direction = next(iter(edges))
        polygon: list[int] = []
        twice_area = 0
        while first in edges:
            step_y, step_x = ((0, 1), (1, 0), (0, -1), (-1, 0))[direction]
            y, x = y + step_y, x + step_x
            twice_area += x * step_y - y * step_x
            before = direction
            # Right before left, so that regions that touch in a corner stay apart.
            direction = next(d % 4 for d in (before + 1, before, before + 3) if (y, x, d % 4) in edges)
            del edges[y, x, direction]
            if direction != before:
                polygon += [x, y]
        if twice_area < 0:
            return None
        polygons.append(polygon)
    return polygons


def _run_lengths(mask: Mask) -> dict[str, Any]:
    """COCO's uncompressed run lengths: column by column, the first run counts zeros."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}
