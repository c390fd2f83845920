"""Annotations of objects: found and checked before training."""

import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from itpn.data.bands import has_files
from itpn.data.coco import read_coco
from itpn.data.decode import MAX_PIXELS
from itpn.data.files import check_root
from itpn.data.formats.arrays import Axes
from itpn.data.instances import read_instances
from itpn.data.invalid import InvalidAnnotations
from itpn.data.layouts import Coco, ImageRules
from itpn.data.numbers import is_int64, read_image_id, read_number, read_whole
from itpn.data.object_checks import check_object, refuse_corners
from itpn.data.objects import DetectionImages
from itpn.data.readers import FileReader, PackedStrings
from itpn.data.samples import NO_LIMIT
from itpn.data.voc import read_voc
from itpn.data.yolo import read_yolo
from itpn.errors import UserError

Log = Callable[[str], None]

LAYOUTS = (
    "COCO's (annotations/instances_*.json, or a folder for each set with its JSON inside), YOLO's (data.yaml), "
    "Pascal VOC's (JPEGImages and Annotations) or label images (images and masks of one integer an object)"
)


def find_objects(
    root: str,
    val_root: str | None = None,
    on_invalid: Literal["summary", "skip", "error"] = "summary",
    log: Log = print,
    max_pixels: int = MAX_PIXELS,
    bands: Sequence[str] = (),
    axes: Axes | None = None,
) -> tuple[DetectionImages, DetectionImages | None]:
    """Find the training and the validation images, with the same classes.

    Args:
        on_invalid: what to do about invalid annotations, see `itpn.tasks.configs.DetectionDataConfig`.
        max_pixels: larger images to train on are left out; those to evaluate on may be read in tiles.
        bands, axes: see :class:`itpn.data.layouts.ImageRules`.
        log: takes the summary, a line at a time.

    Returns:
        The training images; the validation images, or None if there are none.

    Raises:
        UserError: no known layout, no images, no objects, an invalid annotation if it is an error, or a class that is
            in the validation images alone.
    """
    logged: set[str] = set()
    train = read_objects(root, "train", on_invalid, log, max_pixels=max_pixels, logged=logged, bands=bands, axes=axes)
    assert train is not None
    val = None
    if val_root is not None or Path(root).is_dir():  # a single file is for training
        val = read_objects(val_root or root, "val", on_invalid, log, val_root is None, NO_LIMIT, logged, bands, axes)
    if val is None:
        return train, None
    unknown = [name for name in val.classes if name not in train.classes]
    used = {one["label"] for index in range(len(val)) for one in val.objects_of(index)}
    if lost := [name for name in unknown if val.classes.index(name) in used]:
        raise UserError(
            f"class {', '.join(lost[:3])} of the images to evaluate on is not among those to train on in {root}: the "
            "same names are needed in both"
        )
    return train, val.rename(train.classes)


def read_objects(
    root: str,
    split: str,
    on_invalid: Literal["summary", "skip", "error"] = "summary",
    log: Log = print,
    optional: bool = False,
    max_pixels: int = MAX_PIXELS,
    logged: set[str] | None = None,
    bands: Sequence[str] = (),
    axes: Axes | None = None,
) -> DetectionImages | None:
    """Read and check the images of one split.

    Args:
        logged: notes that were logged for another split and are not repeated.
        bands, axes: as of :func:`find_objects`.

    Returns:
        None if there is no such split and it is ``optional``.

    Raises:
        UserError: no annotations or images, no usable object, or no object to train on.
    """
    check_root(root, f"a folder of {LAYOUTS}", " nor a JSON file", lambda root: root.lower().endswith(".json"))
    folder = Path(root)
    invalid = InvalidAnnotations()
    undivided = split == "train" or not optional
    readers = (read_coco, read_yolo, read_voc, functools.partial(read_instances, undivided=undivided))
    for read in readers if folder.is_dir() else readers[:1]:
        parts = read(folder, split, invalid, ImageRules(max_pixels, bands, axes))
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
        images = check_annotations(coco, path_of, source, invalid, max_pixels)
    except RecursionError as error:
        raise UserError(f"{source} has values nested too deeply to be annotations") from error
    annotated = split == "train" or any(not one.get("iscrowd") for one in coco["annotations"] if isinstance(one, dict))
    lacking = "images" if not len(images) else "objects" if annotated and not len(images.with_objects()) else ""
    if lacking:
        raise invalid.explain_lack(source, lacking)
    invalid.report(source, on_invalid, log, logged)
    return images


def check_annotations(
    coco: Coco, path_of: Callable[[str], Path], source: str, invalid: InvalidAnnotations, max_pixels: int = MAX_PIXELS
) -> DetectionImages:
    """The usable annotations; the others are counted in ``invalid``.

    Ids of annotations are not used: they may be missing or repeated.

    Raises:
        UserError: invalid classes, or boxes that are given by their corners.
    """
    names, ids = _check_categories(coco, source, invalid)
    images, listed = _check_images(coco["images"], path_of, invalid, max_pixels)
    refuse_corners(coco["annotations"], images, source)
    class_index = {id_: index for index, id_ in enumerate(ids)}
    kept: dict[tuple[Any, ...], list[dict[str, Any]]] = {}  # by image, class and box
    for position, one in enumerate(coco["annotations"], start=1):
        if not isinstance(one, dict) or any(key not in one for key in ("image_id", "category_id")):
            invalid.add("objects without image_id or category_id", str(one)[:60])
            continue
        name = f"annotation {one['id']}" if "id" in one else f"number {position} of the annotations"
        what = one.get("where") or f"{name} of image {one['image_id']}"
        key = read_image_id(one["image_id"])
        image = None if key is None else images.get(key)
        if image is None:
            if key not in listed:
                invalid.add("objects of an image that is not listed", what)
            continue  # objects of an unusable image are left out with it
        label = class_index.get(read_whole(one["category_id"]))  # type: ignore[arg-type]  # None is not an id
        if label is None:
            invalid.add("objects of an unknown class", f"{what}: class {one.get('label', one['category_id'])}")
            continue
        checked = check_object(one, image, what, invalid)
        if checked is None:
            continue
        checked["label"] = label
        same = kept.setdefault((image["path"], label, *checked["bbox"]), [])
        if checked in same and "where" in one:  # lines of a file have no ids by which they differ
            invalid.add("objects that are annotated twice, and count once", what)
            continue
        same.append(checked)
        image["objects"].append(checked)
    entries = list({entry["path"]: entry for entry in images.values()}.values())
    sizes = np.array([[e["height"], e["width"]] for e in entries], dtype=np.int64).reshape(-1, 2)
    return DetectionImages(
        FileReader([e["path"] for e in entries]),
        PackedStrings([json.dumps(e["objects"]) for e in entries]),
        sizes,
        _image_ids(entries, invalid),
        names,
        ids,
    )


# --- classes


def _check_categories(coco: Coco, source: str, invalid: InvalidAnnotations) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and ids of the classes, sorted by id; ids may have gaps, as COCO's have."""
    pairs = []
    for entry in coco["categories"]:
        name, id_ = (entry.get("name"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        name = name.strip() if isinstance(name, str) else None if read_number(name) is None else str(name)
        if not name or id_ is None:
            raise UserError(f"{source} has categories without id or name: {str(entry)[:60]}")
        whole = read_whole(id_)
        if whole is None or not is_int64(whole):
            raise UserError(f"{source} has categories whose ids are no whole numbers: {id_!r} of {name}")
        pairs.append((whole, name, entry))
    if not pairs:
        raise UserError(f"{source} has no classes" + (f": {invalid.lines()[0]}" if invalid.counts else ""))
    root = _find_root(pairs, coco["annotations"])
    if root is not None:
        invalid.notes.append(
            f"category {root[0]} ({root[1]}) has no objects and is the supercategory of the others: it is not a class"
        )
    classes = sorted((id_, name) for id_, name, _ in pairs if root is None or id_ != root[0])
    ids, names = [id_ for id_, _ in classes], [name for _, name in classes]
    given: dict[str, list[Any]] = {"id": ids, "name": names}
    for what, values in given.items():
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise UserError(f"{source} has two categories of {what} {twice[0]}")
    return tuple(names), tuple(ids)


def _find_root(
    categories: list[tuple[int, str, dict[str, Any]]], annotations: list[Any]
) -> tuple[int, str, dict[str, Any]] | None:
    """The supercategory of all others that Roboflow exports as a category without objects; None if there is none.

    A class may have the same name.
    """
    used = {read_whole(one.get("category_id")) for one in annotations if isinstance(one, dict)}
    for root in categories:
        id_, name, entry = root
        above = entry.get("supercategory")
        others = [other for other in categories if other is not root]
        if id_ in used or not others or (above and str(above).strip().lower() != "none"):
            continue
        if any(other[0] == id_ for other in others):
            continue
        if all(str(other.get("supercategory", "")).strip() == name for _, _, other in others):
            return root
    return None


# --- images


def _check_images(
    listed: list[Any], path_of: Callable[[str], Path], invalid: InvalidAnnotations, max_pixels: int
) -> tuple[dict[int | str, dict[str, Any]], set[int | str | None]]:
    """The usable images by id, and the ids of all images."""
    entries: list[tuple[int | str, dict[str, Any]]] = []
    files: dict[int | str, set[str]] = {}
    keys: set[int | str | None] = set()
    for entry in listed:
        if not isinstance(entry, dict) or any(key not in entry for key in ("id", "file_name")):
            invalid.add("images without id or file_name", str(entry)[:60])
            continue
        key = read_image_id(entry["id"])
        if key is None:
            invalid.add("images whose id is neither a whole number nor text", f"{entry['id']!r}: {entry['file_name']}")
            continue
        keys.add(key)
        entries.append((key, entry))
        files.setdefault(key, set()).add(str(entry["file_name"]))
    images: dict[int | str, dict[str, Any]] = {}
    by_path: dict[str, dict[str, Any]] = {}
    for key, entry in entries:
        name = str(entry["file_name"])
        height, width = (read_whole(entry.get(side)) or 0 for side in ("height", "width"))
        if min(height, width) <= 0:
            sides = f"height {entry.get('height')!r}, width {entry.get('width')!r}"
            invalid.add("images without height or width in whole pixels", f"{name}: {sides}")
        elif height * width > max_pixels:
            invalid.add("images of more pixels than --data.max-pixels", f"{name}: {width}x{height}")
        elif len(files[key]) > 1:  # its objects cannot be assigned
            invalid.add("images whose id another one has", f"{key}: {name}")
        elif key in images:
            invalid.add("images that are listed twice", f"{key}: {name}")
        elif not has_files(str(path := path_of(name))):
            invalid.add("images not on disk", str(path))
        elif str(path) in by_path:
            images[key] = by_path[str(path)]
            invalid.add("images that are listed with two ids, whose objects were joined", f"{key}: {name}")
        else:
            images[key] = by_path[str(path)] = {
                "key": key,
                "path": str(path),
                "height": height,
                "width": width,
                "objects": [],
            }
    return images, keys


def _image_ids(entries: list[dict[str, Any]], invalid: InvalidAnnotations) -> np.ndarray:
    """The ids of images, int64 [n]; ids that are text are replaced by numbers above the largest id."""
    free = 1 + max((entry["key"] for entry in entries if isinstance(entry["key"], int)), default=0)
    if free + len(entries) >= 2**63:
        free = -len(entries) - 2**62
    texts = [entry["key"] for entry in entries if isinstance(entry["key"], str)]
    if texts:
        invalid.notes.append(f"ids of images are text ({texts[0]}): results.json numbers them from {free}")
    numbers = iter(range(free, free + len(texts)))
    return np.array([e["key"] if isinstance(e["key"], int) else next(numbers) for e in entries], dtype=np.int64)
