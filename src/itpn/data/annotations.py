"""Annotations of objects, and the mistakes in them, found before anything is trained."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from faster_coco_eval.core import mask as rle

from itpn.data.decode import MAX_PIXELS
from itpn.data.files import describe_file
from itpn.data.layouts import Coco, Mistakes, read_coco, read_voc, read_yolo
from itpn.data.objects import DetectionImages, encode_outline
from itpn.data.readers import FileReader, PackedStrings
from itpn.errors import UserError

Tell = Callable[[str], None]

LAYOUTS = (
    "COCO's (annotations/instances_*.json, or a folder for each set with its JSON inside), YOLO's (data.yaml) or "
    "Pascal VOC's (JPEGImages and Annotations)"
)


def find_objects(
    root: str,
    val_root: str | None = None,
    mistakes: Literal["summary", "skip", "error"] = "summary",
    tell: Tell = print,
    max_pixels: int = MAX_PIXELS,
) -> tuple[DetectionImages, DetectionImages | None]:
    """Find the images to train on and those to evaluate on, with the same classes.

    Args:
        mistakes: what is done about annotations that cannot be right: see `itpn.config.ObjectsConfig`.
        max_pixels: larger images are left out.
        tell: takes the summary, a line at a time.

    Returns:
        The second is None where there are none.

    Raises:
        UserError: nothing of a known layout, no images, no objects, a mistake if it is an error, or classes to evaluate
            on that there are none of to train on.
    """
    train = read_objects(root, "train", mistakes, tell, max_pixels=max_pixels)
    assert train is not None
    val = None
    if val_root is not None or Path(root).is_dir():  # or else the one file is to train on
        val = read_objects(val_root or root, "val", mistakes, tell, val_root is None, max_pixels)
    if val is None:
        return train, None
    unknown = [name for name in val.classes if name not in train.classes]
    used = {known["label"] for index in range(len(val)) for known in val.objects_of(index)}
    if lost := [name for name in unknown if val.classes.index(name) in used]:
        raise UserError(
            f"class {', '.join(lost[:3])} of the images to evaluate on is not among those to train on in {root}: the "
            "same names are needed in both"
        )
    return train, val.rename(train.classes)


def read_objects(
    root: str,
    split: str,
    mistakes: Literal["summary", "skip", "error"] = "summary",
    tell: Tell = print,
    optional: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> DetectionImages | None:
    """The images of one set, checked.

    Returns:
        None if there is no such set and it is ``optional``.
    """
    if not root:
        raise UserError(f"--data.root is an empty name: give a folder of {LAYOUTS}")
    folder = Path(root)
    if not folder.is_dir() and not (folder.is_file() and folder.suffix.lower() == ".json"):
        raise UserError(
            f"{root} is neither a folder nor a JSON file{describe_file(root)}"
            if folder.exists()
            else f"{root} does not exist: give a folder of {LAYOUTS}"
        )
    found = Mistakes()
    for read in (read_coco, read_yolo, read_voc) if folder.is_dir() else (read_coco,):
        parts = read(folder, split, found, max_pixels)
        if parts is not None:
            break
    else:
        if optional:
            return None
        raise UserError(
            f"no annotations to {'train' if split == 'train' else 'evaluate'} on in {root}: give a folder of {LAYOUTS}"
        )
    coco, path_of, source = parts
    try:
        images = check(coco, path_of, source, found, max_pixels)
    except RecursionError as error:
        raise UserError(f"{source} has values nested too deeply to be annotations") from error
    found.report(source, mistakes, tell)
    if not len(images):
        raise UserError(f"{source} has no images" + (f" that can be used: {found.lines()[0]}" if found.counts else ""))
    if split == "train" and not len(images.with_objects()):
        raise UserError(f"{source} has no objects" + (f" that can be used: {found.lines()[0]}" if found.counts else ""))
    return images


# --- mistakes


def check(
    coco: Coco, path_of: Callable[[str], Path], source: str, mistakes: Mistakes, max_pixels: int = MAX_PIXELS
) -> DetectionImages:
    """What can be used of annotations; the rest is counted in ``mistakes``.

    Raises:
        UserError: classes that are none.
    """
    names, ids = _check_categories(coco["categories"], source, mistakes)
    images: dict[Any, dict[str, Any]] = {}
    for entry in coco["images"]:
        if not isinstance(entry, dict) or any(key not in entry for key in ("id", "file_name")):
            mistakes.add("images without id or file_name", str(entry)[:60])
            continue
        if not all(isinstance(entry.get(key), int) and entry[key] > 0 for key in ("height", "width")):
            mistakes.add("images without height or width", str(entry["file_name"]))
        elif entry["height"] * entry["width"] > max_pixels:
            mistakes.add(
                "images of more pixels than --data.max-pixels",
                f"{entry['file_name']}: {entry['width']}x{entry['height']}",
            )
        elif not _is_id(entry["id"]):
            mistakes.add("images whose id is no whole number", f"{entry['id']!r}")
        elif entry["id"] in images:
            mistakes.add("images whose id another one has", f"{entry['id']}: {entry['file_name']}")
        elif not (path := path_of(str(entry["file_name"]))).is_file():
            mistakes.add("images not on disk", str(path))
        else:
            images[entry["id"]] = {**entry, "path": str(path), "objects": []}
    listed = {entry["id"] for entry in coco["images"] if isinstance(entry, dict) and _is_id(entry.get("id"))}
    numbers = {id_: number for number, id_ in enumerate(ids)}
    seen: set[Any] = set()
    for one in coco["annotations"]:
        if not isinstance(one, dict) or any(key not in one for key in ("image_id", "category_id")):
            mistakes.add("objects without image_id or category_id", str(one)[:60])
            continue
        what = one.get("where") or f"annotation {one.get('id', '?')}"
        if one.get("id") is not None:
            if repr(one["id"]) in seen:
                mistakes.add("objects whose id another one has", what)
                continue
            seen.add(repr(one["id"]))
        known_id = _is_id(one["image_id"])
        image = images.get(one["image_id"]) if known_id else None
        if image is None:
            if not known_id or one["image_id"] not in listed:
                mistakes.add("objects of an image that is not listed", f"{what}: image {one['image_id']}")
            continue  # those of an image that cannot be used go with it
        if not _is_id(one["category_id"]) or one["category_id"] not in numbers:
            mistakes.add("objects of an unknown class", f"{what}: class {one.get('label', one['category_id'])}")
            continue
        known = _check_object(one, image, what, mistakes)
        if known is not None:
            image["objects"].append({**known, "label": numbers[one["category_id"]]})
    entries = list(images.values())
    sizes = np.array([[e["height"], e["width"]] for e in entries], dtype=np.int64).reshape(-1, 2)
    return DetectionImages(
        FileReader([e["path"] for e in entries]),
        PackedStrings([json.dumps(e["objects"]) for e in entries]),
        sizes,
        np.array([e["id"] for e in entries], dtype=np.int64),
        names,
        ids,
    )


def _check_categories(
    categories: list[Any], source: str, mistakes: Mistakes
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and ids, in the order of the ids, which may have gaps, as COCO's have."""
    try:
        if not all(isinstance(entry["name"], str) for entry in categories):
            raise TypeError
        pairs = sorted((entry["id"], entry["name"]) for entry in categories)
    except (TypeError, KeyError) as error:
        raise UserError(f"{source} has categories without id or name") from error
    ids, names = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if not pairs:
        raise UserError(f"{source} has no classes" + (f": {mistakes.lines()[0]}" if mistakes.counts else ""))
    if not all(_is_id(id_) for id_ in ids):
        raise UserError(f"{source} has categories whose ids are no whole numbers")
    for what, values in {"id": ids, "name": names}.items():
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise UserError(f"{source} has two categories of {what} {twice[0]}")
    return tuple(names), tuple(ids)


def _check_object(one: dict[str, Any], image: dict[str, Any], what: str, mistakes: Mistakes) -> dict[str, Any] | None:
    """An object as it is kept, its box inside the image; None if it is of no use."""
    height, width = image["height"], image["width"]
    crowd = one.get("iscrowd", 0)
    if crowd not in (0, 1, None) or isinstance(crowd, float):
        mistakes.add("objects whose iscrowd is neither 0 nor 1", f"{what}: {crowd!r}")
        return None
    box = one.get("bbox")
    kept: dict[str, Any] = {"iscrowd": int(bool(crowd))}
    outlined_area: float | None = None
    outline = one.get("segmentation")
    if outline:
        try:
            encoded = encode_outline(outline, height, width)
            if isinstance(outline, dict):
                rle.decode(encoded)  # or else runs that are not the image's are found out in training
            outlined_area = float(rle.area(encoded))
        except Exception as error:  # malformed in any of many ways
            plain = isinstance(error, ValueError) and str(error)
            reason = str(error).splitlines()[0] if plain else "in none of COCO's forms"
            mistakes.add("objects whose outline cannot be read", f"{what}: {reason}")
            return None
        if not outlined_area:
            mistakes.add("objects whose outline holds no pixel", what)
            return None
        kept["segmentation"] = outline
        if box is None:
            box = rle.toBbox(encoded).tolist()
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        mistakes.add("objects whose box is not four numbers", what)
        return None
    x, y, w, h = (float(value) for value in box)
    if w <= 0 or h <= 0:
        mistakes.add("boxes of no area", what)
        return None
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if x1 <= x0 or y1 <= y0:
        mistakes.add("boxes outside their image", what)
        return None
    if max(-x, -y, x + w - width, y + h - height) > 1:  # less is rounding
        mistakes.add("boxes partly outside their image, which were cut", what)
    if max(-x, -y, x + w - width, y + h - height) > 0:
        x, y, w, h = x0, y0, x1 - x0, y1 - y0
    said: Any = one.get("area")
    area = float(said) if _is_number(said) and said > 0 else outlined_area or w * h
    return kept | {"bbox": [x, y, w, h], "area": area}


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
