""" "Shapes", a generated data set for all tasks, so that they can be tried without a download."""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from itpn.data.scenes import CLASSES, GROUNDS, SPLITS, Array, Instance, Mask, check_size, draw_scene
from itpn.errors import UserError, refusal
from itpn.system.writing import write_whole

ScenePaths = tuple[Path, Path, Path, Path]  # of one scene: in imagefolder, in coco, in ade20k, its mask there

VERSION = 1  # of the drawing: increase it when the same arguments give other files


@dataclass(frozen=True)
class ShapesFolders:
    """The folders of `write_shapes`, one a layout: the `--data.root` of each task."""

    imagefolder: Path
    coco: Path
    ade20k: Path


def write_shapes(
    root: str | os.PathLike[str],
    *,
    train: int = 1200,
    val: int = 300,
    img_size: int | tuple[int, int] = 96,
    seed: int = 0,
) -> ShapesFolders:
    """Write ``train`` and ``val`` images in each of three layouts; the same arguments give the same bytes.

    ``imagefolder/{train,val}/<class>/`` has images of one shape, classes in turn. ``coco/`` (``train2017``,
    ``val2017``, ``annotations``) and ``ade20k/`` (``images``, ``annotations``, ``classes.txt``, whose first
    line is label 1) have the same scenes of one to five shapes. A complete set is left unchanged; a set that lacks
    files is written again; nothing is deleted.

    Args:
        img_size: side, or (height, width), in pixels.

    Raises:
        UserError: a count below the number of classes, a side below `MIN_SIZE`, a negative seed, or a folder
            that has other data or a set made with other arguments, or that cannot be made.
    """
    size = check_size(img_size)
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

    # The marker is written first, so that the files of an interrupted run are recognized.
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
    """Draw and write the images of a split; returns (name of the file in ``coco/``, its shapes) of each."""
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
    """The content of a file; empty if it is missing or not a JSON object."""
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


def _polygons(mask: Mask) -> list[list[int]] | None:
    """COCO polygons [x0, y0, x1, y1, ...] along pixel edges, one for each connected region; filled, they are the mask.

    None if the mask has a hole: COCO fills the union of polygons, so that it has no holes.
    """
    padded = np.pad(mask, 1)
    # Edges with the region on their right: (y, x, direction), direction 0..3 = right, down, left, up. A dict, not a
    # set, because of its order: the same mask gives the same polygons.
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
    """COCO's uncompressed run lengths: column by column, starting with zeros."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}
