"""Reader of YOLO's layout."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from itpn.data.bands import find_stem, has_files, name_image
from itpn.data.file_types import CLASS_FILES
from itpn.data.invalid import InvalidAnnotations
from itpn.data.layouts import (
    Coco,
    Found,
    ImageRules,
    Parse,
    Parts,
    Size,
    append_image,
    from_supervision,
    import_supervision,
    measure_images,
    search_folders,
    shorten_reason,
)
from itpn.data.numbers import read_whole
from itpn.data.splits import SPLITS
from itpn.data.walk import list_files, list_images
from itpn.errors import UserError
from itpn.system.text import one_line, read_lines
from itpn.system.yaml_files import Text, load_yaml

NO_LABELS = {*CLASS_FILES, "labels.txt", "names.txt", "README.txt", "readme.txt"}  # text files beside YOLO's
LONGEST_NUMBER = 40  # characters: supervision takes hours for a class index of a million digits
PIXELS = "objects with coordinates above 1, which look like pixels: divide them by the image's width and height"


def read_yolo(root: Path, split: str, invalid: InvalidAnnotations, rules: ImageRules) -> Parts | None:
    """Read YOLO's layout: ``data.yaml`` has the class names and, for each split, image folders or lists of paths.

    Label files are in ``labels`` in place of ``images``, or beside the images.

    Returns:
        None if there is no such file, or it does not name the split.

    Raises:
        UserError: the file is invalid, or what it names does not exist.
    """
    file = next((root / name for name in ("data.yaml", "data.yml", "dataset.yaml") if (root / name).is_file()), None)
    if file is None:
        return None
    settings = _read_settings(file)
    names, keypoints = settings["names"], _read_keypoints(settings.get("kpt_shape"), file)
    folders = next((folders for word in SPLITS[split] if (folders := settings.get(word))), None)
    if not folders:
        return None
    folders = folders if isinstance(folders, list) else [folders]
    if not all(isinstance(folder, str) for folder in folders):
        raise UserError(f"{file}: train and val must each be a folder, a list of images, or several of them")
    base = root / str(settings.get("path") or ".")
    base = base if base.is_dir() else root
    parse = _yolo_parser(keypoints, invalid)
    # class indices are the keys of names, which may have gaps
    categories = [{"id": 1 + key, "name": name} for key, name in sorted(names.items())]
    coco: Coco = {"images": [], "annotations": [], "categories": categories}
    missing, found, label_folders = None, 0, dict[Path, Path]()
    for folder in folders:
        places = (base / folder, root / folder.removeprefix("../"))
        place = next((p for p in places if p.is_dir() or (p.suffix == ".txt" and p.is_file())), None)
        if place is None:
            raise UserError(f"{file} names images in {folder}, which is not a folder or list of images below {root}")
        unread, read = Counter[str](), [file]
        if place.is_dir():
            images = list_images(str(place), unread, rules.bands)
        else:
            images = _listed_images(place, base, invalid, rules.bands)
        for image, size in measure_images(images, invalid, rules):
            labels = _labels_of(image, root)
            label_folders[labels.parent] = image.parent
            if os.path.lexists(labels):  # a dangling link, too, which is reported as unreadable
                found += 1
                read += [labels] if labels.is_file() or labels.is_symlink() else []
            else:
                missing = missing or labels
            append_image(coco, image, size, labels, parse, invalid)
        invalid.note_unread(str(place), unread, read)
    if missing is not None and not found:
        raise UserError(
            f"{file} has images in {', '.join(folders)}, but no labels: {missing} does not exist, nor any other"
        )
    if not rules.bands:  # whose labels have other names
        _note_labels_alone(label_folders, invalid)
    return coco, Path, str(file)


def _note_labels_alone(folders: dict[Path, Path], invalid: InvalidAnnotations) -> None:
    """Add a note on label files without an image in any split; ``folders``: label folder -> image folder.

    Label files beside the images are counted with the files that are not read.
    """
    alone: list[str] = []
    for labels, images in folders.items():
        if labels == images or not labels.is_dir():
            continue
        with contextlib.suppress(OSError):  # a list may name images in a folder that cannot be listed
            known = NO_LABELS | {f"{os.path.splitext(name)[0]}.txt" for name in os.listdir(images)}
            names = (path for path in list_files(str(labels)) if path.endswith(".txt"))
            alone += [path for path in names if os.path.basename(path) not in known]
    if alone:
        more = ", ..." if len(alone) > 3 else ""
        invalid.notes.append(f"labels without an image: {len(alone):,} ({one_line(', '.join(alone[:3]))}{more})")


def _listed_images(file: Path, base: Path, invalid: InvalidAnnotations, bands: Sequence[str]) -> list[str]:
    """The images of a list of paths, which are relative to the list's folder or to the data set's."""
    path_of, paths = search_folders([file.parent, base], bands), list[str]()
    for line in dict.fromkeys(filter(None, read_lines(file))):
        path = path_of(line)
        if has_files(str(path)):
            paths.append(str(path))
        else:
            invalid.add("images not on disk", f"{path} ({file})")
    return list(dict.fromkeys(paths))  # bands of one image may be listed each


def _labels_of(image: Path, root: Path) -> Path:
    """The label file of an image: in ``labels`` in place of the last ``images`` below the root, or beside the image."""
    parts = list(Path(name_image(str(image))).with_name(find_stem(str(image))).parts)
    above = len(root.parts) if image.is_relative_to(root) else 0
    if "images" in parts[above:]:
        last = len(parts) - 1 - parts[::-1].index("images")
        parts[last] = "labels"
    return Path(*parts[:-1], f"{parts[-1]}.txt")


def _read_settings(file: Path) -> dict[str, Any]:
    """Read a ``data.yaml``, every value as text: a class may be called ``no``, ``1.0`` or ``null``."""
    try:
        settings = load_yaml(file, Text)
        if not isinstance(settings, dict):
            raise TypeError("it is no mapping")
        settings = {key.lower(): value for key, value in settings.items()}
        names = settings["names"]
        if not isinstance(names, dict | list):
            raise TypeError("names are no list")
        pairs = [*(names.items() if isinstance(names, dict) else enumerate(names))]
        if odd := [(key, type(name).__name__) for key, name in pairs if not isinstance(name, str)]:
            raise TypeError(f"the name of class {odd[0][0]} is a {odd[0][1]}, not text")
        named = {int(key): name.strip() for key, name in pairs}
    except (yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{file} is not YOLO's: it needs names, train and val ({reason})") from error
    if nameless := [key for key, name in named.items() if not name]:
        raise UserError(f"{file}: class {nameless[0]} has no name")
    rest = {key: value for key, value in settings.items() if value not in ("", "~", "null", "Null", "NULL", [])}
    count = rest.get("nc", len(named))
    if read_whole(count) not in (len(named), max(named, default=-1) + 1):  # the keys of names may have gaps
        raise UserError(
            f"{file}: nc is {one_line(str(count))[:20]}, but there are {len(named)} names: correct one of them"
        )
    return {**rest, "names": named}


def _read_keypoints(shape: Any, file: Path) -> int:
    """The number of keypoints of an object, from YOLO's ``kpt_shape`` [keypoints, 2 or 3]; 0 without it."""
    if shape is None:
        return 0
    numbers = [read_whole(value) for value in shape] if isinstance(shape, list) else []
    if len(numbers) != 2 or numbers[0] is None or numbers[0] < 1 or numbers[1] not in (2, 3):
        raise UserError(f"{file}: kpt_shape {shape} is not [number of keypoints, 2 or 3]")
    return numbers[0]


def _yolo_parser(keypoints: int, invalid: InvalidAnnotations) -> Parse:
    read = import_supervision("yolo").yolo_annotations_to_detections

    def parse_line(line: str, size: Size) -> dict[str, Any]:
        if max(map(len, line.split())) > LONGEST_NUMBER:
            raise ValueError(f"a number of more than {LONGEST_NUMBER} characters")
        values = _drop_keypoints(line.split(), keypoints, invalid)
        (one,) = from_supervision(read([" ".join(values)], resolution_wh=size[::-1], with_masks=len(values) > 6))
        coordinates = values[1:5] if len(values) < 7 else values[1 : 1 + (len(values) - 1) // 2 * 2]
        if max(map(float, coordinates)) > 2:
            one["problem"] = PIXELS
        return one | {"label": one["category_id"] - 1}

    def parse(path: Path, size: Size) -> Iterator[Found]:
        if not os.path.lexists(path):
            return  # an image without objects
        for number, line in enumerate(read_lines(path), start=1):
            if not line:
                continue
            try:
                yield parse_line(line, size) | {"where": f"{path} line {number}"}
            except Exception as error:  # supervision raises many types
                yield f"line {number}: {shorten_reason(error)}"

    return parse


def _drop_keypoints(values: list[str], keypoints: int, invalid: InvalidAnnotations) -> list[str]:
    """The class index and box of a pose label, which adds keypoints of two or three values each.

    Three values are x, y and visibility (0, 1 or 2). Without ``kpt_shape``, keypoints are recognized where the label
    cannot be a polygon: polygons have an odd number of columns and no coordinate of 2.
    """
    rest = len(values) - 5
    flags = set(map(read_whole, values[7::3])) if rest > 1 and rest % 3 == 0 else {None}
    visible = flags <= {0, 1, 2} and (len(values) % 2 == 0 or 2 in flags)
    if rest <= 1 or not (keypoints or visible):
        return values
    if keypoints and rest not in (2 * keypoints, 3 * keypoints):
        raise ValueError(f"{len(values)} columns are neither a box nor one with {keypoints} keypoints (kpt_shape)")
    invalid.notes.append("keypoints are left out, boxes are used")
    return values[:5]
