"""Layouts of folders with annotated objects: COCO's, YOLO's and Pascal VOC's, each in COCO's terms.

Each reader gives None where the folder has another layout, or not this set.
"""

import contextlib
import importlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from faster_coco_eval.core import mask as rle
from PIL import Image

from itpn.data.decode import reason_of
from itpn.data.files import SPLITS, is_image, walk
from itpn.data.readers import check_lost
from itpn.errors import UserError

Coco = dict[str, Any]  # "images", "annotations", "categories", as in COCO's JSON
Size = tuple[int, int]  # height, width
Parse = Callable[[Path, Size], Iterator[dict[str, Any]]]  # a file of annotations to objects
Parts = tuple[Coco, Callable[[str], Path], str]  # what it says, where an image's file is, what to call it


@dataclass
class Mistakes:
    """What cannot be right in annotations, by kind, with the first few examples."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= 3:
            self.examples.setdefault(kind, []).append(example)

    def lines(self) -> list[str]:
        """A line for each kind, the commonest first."""
        return [
            f"{kind}: {count:,} ({', '.join(self.examples[kind])}{', ...' if count > len(self.examples[kind]) else ''})"
            for kind, count in self.counts.most_common()
        ]

    def report(self, source: str, what_to_do: Literal["summary", "skip", "error"], tell: Callable[[str], None]) -> None:
        """Tell what was found in ``source``, a line at a time, if anything was.

        Raises:
            UserError: mistakes are errors.
        """
        if not self.counts:
            return
        lines = self.lines()
        if what_to_do == "error":
            raise UserError(f"{source}: {'; '.join(lines)}; --data.mistakes skip leaves these out")
        if what_to_do == "summary":
            tell(f"{source}: left out, or put right, are")
            for line in lines:
                tell(f"  {line}")
        else:
            count = sum(self.counts.values())
            tell(f"{source}: {count:,} mistake{'s' * (count != 1)} left out (--data.mistakes summary shows which)")


def read_coco(root: Path, split: str, mistakes: Mistakes) -> Parts | None:
    """A JSON file for each set; ``root`` may be such a file."""
    file = root if root.is_file() else _find_json(root, split)
    if file is None:
        return None
    places = [file.parent]
    if file.parent.name == "annotations":
        root = file.parent.parent
        year = file.stem.removeprefix("instances_").removeprefix("image_info_")
        word = re.match(r"[a-z]*", year)[0]  # type: ignore[index]  # matches anything
        names = dict.fromkeys([year, year.replace("-dev", ""), word])
        places = [*(root / name for name in names if name), root / "images" / year]
    return _read_json(file), _searching([*places, root / "images", root]), str(file)


def _find_json(root: Path, split: str) -> Path | None:
    for word in SPLITS[split]:
        notes = root / "annotations"
        files = sorted(notes.glob(f"instances_{word}*.json")) or sorted(notes.glob(f"image_info_{word}*.json"))
        for folder in [p for p in (root / word, *sorted(root.glob(f"{word}20*"))) if p.is_dir()]:
            files += sorted(folder.glob("*.json"))
        if len(files) > 1:
            raise UserError(
                f"{len(files)} annotation files for {word} in {root} ({files[0].name}, {files[1].name}): keep one, or "
                "give the file in place of the folder"
            )
        if files:
            return files[0]
    return None


def _searching(places: list[Path]) -> Callable[[str], Path]:
    """Where a file is: in the first of several folders that has it."""

    def path_of(name: str) -> Path:
        with contextlib.suppress(OSError):  # no name of a file
            return next((place / name for place in places if (place / name).is_file()), places[0] / name)
        return places[0] / name[:100]

    return path_of


def _read_json(path: Path) -> Coco:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    parts = ("images", "annotations", "categories")
    if isinstance(content, dict) and "images" in content:
        content.setdefault("annotations", [])  # as for the images of the test server
    if not isinstance(content, dict) or any(not isinstance(content.get(part), list) for part in parts):
        raise UserError(f"{path} is not in COCO's form: it needs lists of images, annotations and categories")
    return content


def read_yolo(root: Path, split: str, mistakes: Mistakes) -> Parts | None:
    """``data.yaml`` names the classes and the folders of images; labels are text files beside or below ``labels``."""
    file = next((root / name for name in ("data.yaml", "data.yml", "dataset.yaml") if (root / name).is_file()), None)
    if file is None:
        return None
    try:
        settings = yaml.safe_load(file.read_text())
        names, folders = settings["names"], [settings[w] for w in SPLITS[split] if settings.get(w)]
        if not isinstance(names, dict | list):
            raise TypeError("names are no list")
        names = {int(key): str(name) for key, name in (names.items() if isinstance(names, dict) else enumerate(names))}
        folders = folders and [str(f) for f in (folders[0] if isinstance(folders[0], list) else [folders[0]])]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is not YOLO's: it needs names, train and val ({type(error).__name__}: {error})"
        ) from error
    if not folders:
        return None
    base = root / str(settings.get("path") or ".")
    base = base if base.is_dir() else root
    parse = _yolo_parser()
    # labels are keys of the names, which may have gaps
    categories = [{"id": 1 + key, "name": name} for key, name in sorted(names.items())]
    coco: Coco = {"images": [], "annotations": [], "categories": categories}
    missing, found = None, 0
    for folder in folders:
        place = next((p for p in (base / folder, root / folder.removeprefix("../")) if p.is_dir()), None)
        if place is None:
            raise UserError(f"{file} speaks of images in {folder}, which is not a folder below {root}")
        for image, size in _images_below(place, mistakes):
            parts = list(image.parts)
            if "images" in parts[len(root.parts) :]:
                last = len(parts) - 1 - parts[::-1].index("images")
                parts[last] = "labels"
            labels = Path(*parts).with_suffix(".txt")
            missing = missing or (None if labels.is_file() else labels)
            found += labels.is_file()
            _append(coco, image, size, labels, parse, mistakes)
    if missing is not None and not found:
        raise UserError(f"{file} has images in {', '.join(folders)}, but no labels: {missing} is not there, nor others")
    return coco, Path, str(file)


def _yolo_parser() -> Parse:
    read = import_supervision()["yolo"].yolo_annotations_to_detections

    def parse(path: Path, size: Size) -> Iterator[dict[str, Any]]:
        if not path.is_file():
            return  # an image without objects
        for number, line in enumerate(map(str.strip, path.read_text().splitlines()), start=1):
            if not line:
                continue
            where = f"{path} line {number}"
            try:
                objects = list(
                    _from_supervision(read([line], resolution_wh=size[::-1], with_masks=len(line.split()) > 6))
                )
            except Exception as error:  # whatever it meets
                raise ValueError(f"line {number}: {error}") from error
            for one in objects:
                yield one | {"where": where, "label": one["category_id"] - 1}

    return parse


def read_voc(root: Path, split: str, mistakes: Mistakes) -> Parts | None:
    """An XML file for each image, and lists of the images of each set."""
    images, notes = root / "JPEGImages", root / "Annotations"
    if not images.is_dir() or not notes.is_dir():
        return None
    lists = root / "ImageSets" / "Main"
    words = (*SPLITS[split], *(["trainval"] if split == "train" else []))
    file = next((lists / f"{word}.txt" for word in words if (lists / f"{word}.txt").is_file()), None)
    if file is None and (split != "train" or lists.is_dir()):
        return None
    # without lists, all of them
    wanted = None if file is None else {line.split()[0] for line in file.read_text().splitlines() if line.split()}
    read = import_supervision()["pascal_voc"].detections_from_xml_obj
    parse_xml = importlib.import_module("defusedxml.ElementTree").parse  # supervision brings it

    classes: list[str] = []
    coco: Coco = {"images": [], "annotations": []}

    def parse(path: Path, size: Size) -> Iterator[dict[str, Any]]:
        nonlocal classes
        element = parse_xml(path).getroot()
        said = tuple(int(element.findtext(f"size/{side}", "0")) for side in ("height", "width"))
        if all(said) and said != size:
            raise ValueError(f"is of {said[1]}x{said[0]} pixels, the image of {size[1]}x{size[0]}")
        detections, classes = read(element, classes, size[::-1])
        crowds = [one.findtext("difficult", "0").strip() == "1" for one in element.findall("object")]
        for one, crowd in zip(_from_supervision(detections), crowds, strict=True):
            yield one | {"iscrowd": int(crowd)}  # difficult objects are neither asked for nor held against a detector

    seen = set()
    for image, size in _images_below(images, mistakes, wanted):
        seen.add(image.stem)
        path = notes / f"{image.stem}.xml"
        _append(coco, image, size, path, parse, mistakes)
    for name in sorted((wanted or set()) - seen):
        mistakes.add("images not on disk", name)
    order = sorted(classes)  # which must not depend on which image came first
    for note in coco["annotations"]:
        note["category_id"] = 1 + order.index(classes[note["category_id"] - 1])
    categories = [{"id": number, "name": name} for number, name in enumerate(order, start=1)]
    return coco | {"categories": categories}, Path, str(file or notes)


def import_supervision() -> Any:
    """Its readers of files, by layout."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of working without OpenCV
            return {
                name: importlib.import_module(f"supervision.dataset.formats.{name}") for name in ("yolo", "pascal_voc")
            }
    except ImportError as error:
        raise UserError(
            "reading YOLO's and Pascal VOC's layouts needs supervision: pip install 'itpn[formats]'"
        ) from error


def _from_supervision(detections: Any) -> Iterator[dict[str, Any]]:
    for row, (x0, y0, x1, y1) in enumerate(np.asarray(detections.xyxy, dtype=np.float64).tolist()):
        one = {"bbox": [x0, y0, x1 - x0, y1 - y0], "category_id": 1 + int(detections.class_id[row])}
        if detections.mask is not None:
            encoded = rle.encode(np.asfortranarray(np.asarray(detections.mask[row]), dtype=np.uint8))
            one["segmentation"] = {"size": encoded["size"], "counts": _text(encoded["counts"])}
        yield one


def _text(counts: Any) -> Any:
    return counts.decode() if isinstance(counts, bytes) else counts


def _images_below(folder: Path, mistakes: Mistakes, stems: set[str] | None = None) -> Iterator[tuple[Path, Size]]:
    """Image files and their height and width, from their headers; of some names alone, if given."""
    for name in sorted(path for path in walk(str(folder)) if is_image(path)):
        if stems is not None and Path(name).stem not in stems:
            continue
        try:
            size = read_size(name)
        except Exception as error:  # whatever Pillow meets
            check_lost(name, error)
            mistakes.add("images that cannot be read", f"{name}: {reason_of(error)}")
            continue
        yield Path(name), size


def read_size(path: str) -> Size:
    """Height and width of an image as it is shown, from its header; whatever Pillow raises if it is none."""
    with Image.open(path) as image:
        width, height = image.size
        sideways = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (width, height) if sideways else (height, width)


def _append(coco: Coco, image: Path, size: Size, notes: Path, parse: Parse, mistakes: Mistakes) -> None:
    """Add an image with the objects that its file of annotations names; neither, if that cannot be read whole."""
    try:
        objects = list(parse(notes, size))
    except Exception as error:  # whatever a reader meets in a damaged file
        check_lost(str(notes), error)
        mistakes.add("images whose annotations cannot be read", f"{notes}: {reason_of(error)}")
        return
    number = 1 + len(coco["images"])
    coco["images"].append({"id": number, "file_name": str(image), "height": size[0], "width": size[1]})
    for one in objects:
        coco["annotations"].append({"where": str(notes), "id": 1 + len(coco["annotations"]), "image_id": number, **one})
