"""Reader of Pascal VOC's layout."""

import importlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from itpn.data.bands import find_stem
from itpn.data.file_types import is_image
from itpn.data.invalid import InvalidAnnotations
from itpn.data.layouts import (
    FRACTIONS,
    UNUSABLE_MASK,
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
    shorten_reason,
)
from itpn.data.numbers import read_whole
from itpn.data.splits import SPLITS
from itpn.data.walk import list_images
from itpn.system.text import MAX_TEXT, as_file_name, read_bounded, read_lines


def read_voc(root: Path, split: str, invalid: InvalidAnnotations, rules: ImageRules) -> Parts | None:
    """Read Pascal VOC's layout: an XML file for each image, and a list of images for each split."""
    images, notes = root / "JPEGImages", root / "Annotations"
    if not images.is_dir() or not notes.is_dir():
        return None
    lists = root / "ImageSets" / "Main"
    by_name = {path.name.lower(): path for path in sorted(lists.glob("*.*"))}
    file = next((by_name[f"{word}.txt"] for word in SPLITS[split] if f"{word}.txt" in by_name), None)
    if file is None and (split != "train" or lists.is_dir()):
        return None
    # without lists, all images
    wanted = None if file is None else {_listed_name(line, notes) for line in read_lines(file) if line}
    classes: list[str] = []
    parse = _voc_parser(classes, invalid)
    coco: Coco = {"images": [], "annotations": []}
    seen, unread = set(), Counter[str]()
    found = list_images(str(images), unread, rules.bands)
    names = [name for name in found if wanted is None or find_stem(name) in wanted]
    for image, size in measure_images(names, invalid, rules):
        stem = find_stem(str(image))
        seen.add(stem)
        paths = [notes / f"{stem}{suffix}" for suffix in (".xml", ".XML")]
        path = next(filter(Path.is_file, paths), paths[0])
        append_image(coco, image, size, path, parse, invalid)
    invalid.note_unread(str(images), unread)
    for name in sorted((wanted or set()) - seen):
        invalid.add("images not on disk", name)
    order = sorted(classes)  # must not depend on the order of the images
    for note in coco["annotations"]:
        note["category_id"] = 1 + order.index(classes[note["category_id"] - 1])
    categories = [{"id": number, "name": name} for number, name in enumerate(order, start=1)]
    return coco | {"categories": categories}, Path, str(file or notes)


def _listed_name(line: str, notes: Path) -> str:
    """The image name in a line of a list, without suffix and without the 1, 0 or -1 that lists of a class add."""
    name = as_file_name(line)
    if not (notes / f"{name}.xml").is_file():  # a name may end in a number, too
        name = re.sub(r"\s+[+-]?[01]$", "", name)
    return os.path.splitext(name)[0] if is_image(name) else name


def _voc_parser(classes: list[str], invalid: InvalidAnnotations) -> Parse:
    """A reader of XML files that adds new class names to ``classes``."""
    read = import_supervision("pascal_voc").detections_from_xml_obj
    parse_xml = importlib.import_module("defusedxml.ElementTree").fromstring  # a dependency of supervision

    def parse_object(one: Any, size: Size, where: str) -> dict[str, Any]:
        name = one.find("name")
        if name is None or not (name.text or "").strip():
            raise ValueError("it has no name")
        name.text = name.text.strip()
        alone = one.makeelement("annotation", {})
        alone.append(one)
        try:
            detections, classes[:] = read(alone, classes, size[::-1])
        except Exception as error:
            polygons = one.findall("polygon")
            if not polygons:
                raise
            for polygon in polygons:
                one.remove(polygon)
            detections, classes[:] = read(alone, classes, size[::-1])
            odd = isinstance(error, IndexError)  # as supervision raises it
            invalid.add(UNUSABLE_MASK, f"{where}: {'an odd number of coordinates' if odd else shorten_reason(error)}")
        (row,) = from_supervision(detections)
        corners = [float(one.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
        if min(corners) >= 0 and max(corners) <= 1 and min(corners) < 1:  # VOC counts pixels from 1
            row["problem"] = FRACTIONS
        # difficult objects are ignored, in training and evaluation
        crowd = one.findtext("difficult", "0").strip() == "1"
        return row | {"iscrowd": int(crowd), "where": where}

    def parse(path: Path, size: Size) -> Iterator[Found]:
        element = parse_xml(read_bounded(path, MAX_TEXT))
        written = [element.findtext(f"size/{side}", "0").strip() for side in ("height", "width")]
        sides = [read_whole(side or "0") for side in written]
        if None in sides:
            raise ValueError(f"height {written[0]}, width {written[1]} are no whole numbers")
        if all(sides) and tuple(sides) != size:
            raise ValueError(f"is of {sides[1]}x{sides[0]} pixels, the image of {size[1]}x{size[0]}")
        objects = element.findall("object")
        # for example with a namespace: it is not an image without objects
        if not objects and element.tag != "annotation":
            raise ValueError(f"is of <{element.tag}>, not of <annotation>")
        for number, one in enumerate(objects, start=1):
            try:
                yield parse_object(one, size, f"{path} object {number}")
            except Exception as error:  # supervision raises many types
                yield f"object {number}: {shorten_reason(error)}"

    return parse
