"""Layouts of folders with annotated objects: COCO's, YOLO's and Pascal VOC's, each in COCO's terms.

Each reader gives None where the folder has another layout, or not this set.
"""

import contextlib
import importlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from faster_coco_eval.core import mask as rle

from itpn.data.decode import MAX_PIXELS, read_size, reason_of
from itpn.data.files import (
    CLASS_FILES,
    SPLITS,
    describe_unread,
    is_image,
    list_files,
    list_images,
    split_places,
    suffix_of,
)
from itpn.data.numbers import read_whole
from itpn.data.readers import check_lost
from itpn.errors import MachineError, UserError
from itpn.system.reading import MAX_TEXT, read_bounded
from itpn.system.text import as_file_name, decode_text, one_line, read_lines
from itpn.system.yaml_files import load_yaml

NO_LABELS = {*CLASS_FILES, "labels.txt", "names.txt", "README.txt", "readme.txt"}  # text files beside YOLO's
LONGEST_REASON = 500  # characters: it may quote megabytes of a damaged file
LONGEST_NUMBER = 40  # characters: supervision takes hours for a class index of a million digits
MAX_JSON = 2**33  # bytes: Objects365, the largest public set, has 6 GB
Coco = dict[str, Any]  # "images", "annotations", "categories", as in COCO's JSON
Size = tuple[int, int]  # height, width
Found = dict[str, Any] | str  # an object, or why it cannot be read
Parse = Callable[[Path, Size], Iterator[Found]]  # of a file of annotations
# kinds of mistakes
UNREAD = "images whose annotations cannot be read"
NO_OUTLINE = "polygons or masks that cannot be used (the box is, if there is one)"
PIXELS = "objects with coordinates above 1, which look like pixels: divide them by the image's width and height"
FRACTIONS = "boxes with coordinates from 0 to 1, which look like fractions: multiply them by the image's sides"

Parts = tuple[Coco, Callable[[str], Path], str]  # what it says, where an image's file is, what to call it


@dataclass
class Mistakes:
    """What is invalid in annotations, by kind, with the first few examples; and remarks on valid ones."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, kind: str, example: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= 3:
            self.examples.setdefault(kind, []).append(one_line(example))

    def note_unread(self, folder: str, unread: Counter[str], read: Iterable[str | Path] = ()) -> None:
        """Note what files below a folder are not read; ``read`` are some that are, and were counted as well."""
        below = os.path.join(os.path.abspath(folder), "")
        unread = unread - Counter(suffix_of(str(path)) for path in read if os.path.abspath(path).startswith(below))
        if line := describe_unread(unread):
            self.notes.append(f"{line} in {folder}")

    def lines(self) -> list[str]:
        """A line for each kind, the commonest first."""
        return [
            f"{kind}: {count:,} ({', '.join(self.examples[kind])}{', ...' if count > len(self.examples[kind]) else ''})"
            for kind, count in self.counts.most_common()
        ]

    def explain_lack(self, source: str, lacking: str) -> UserError:
        """``source`` has nothing that can be used; with every reason that is known."""
        reasons = "; ".join([*self.lines(), *dict.fromkeys(self.notes)])
        return UserError(f"{source} has no {lacking}" + (f" that can be used: {reasons}" if reasons else ""))

    def report(
        self,
        source: str,
        what_to_do: Literal["summary", "skip", "error"],
        tell: Callable[[str], None],
        told: set[str] | None = None,
    ) -> None:
        """Tell what was found in ``source``, a line at a time, if anything was.

        Args:
            told: remarks that are not repeated; those of ``source`` are added.

        Raises:
            UserError: mistakes are errors.
        """
        told = set() if told is None else told
        for note in dict.fromkeys(self.notes):
            if note not in told:
                tell(f"{source}: {note}")
                told.add(note)
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


def read_coco(root: Path, split: str, mistakes: Mistakes, max_pixels: int = MAX_PIXELS) -> Parts | None:
    """A JSON file for each set; ``root`` may be such a file."""
    file = root if root.is_file() else _find_json(root, split)
    if file is None:
        return None
    places = [file.parent]
    if file.parent.name == "annotations":
        root = file.parent.parent
        year = re.sub("^(instances|image_info)_", "", file.stem, flags=re.IGNORECASE)
        word = re.match(r"[A-Za-z]*", year)[0]  # type: ignore[index]  # matches anything
        names = dict.fromkeys([year, year.replace("-dev", ""), word, word.lower()])
        places = [*(root / name for name in names if name), root / "images" / year]
    return _read_json(file), _searching([*places, root / "images", root]), str(file)


def _find_json(root: Path, split: str) -> Path | None:
    for word in SPLITS[split]:
        notes = root / "annotations"
        files = _list_json(notes, f"instances_{word}") or _list_json(notes, f"image_info_{word}")
        for folder in split_places(root, word):
            files += _list_json(folder)
        if len(files) > 1:
            raise UserError(
                f"{len(files)} annotation files for {word} in {root} ({files[0].name}, {files[1].name}): keep one, or "
                "give the file in place of the folder"
            )
        if files:
            return files[0]
    return None


def _list_json(folder: Path, start: str = "") -> list[Path]:
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in paths if path.suffix.lower() == ".json" and path.name.lower().startswith(start)]


def _searching(places: list[Path]) -> Callable[[str], Path]:
    """Where a file is: in the first of several folders that has it."""

    def path_of(name: str) -> Path:
        name = as_file_name(name)
        with contextlib.suppress(OSError):  # no name of a file
            paths = [place / own for own in (name, name.replace("\\", "/")) for place in places]  # of Windows
            return next((path for path in paths if path.is_file()), places[0] / name)
        return places[0] / name[:100]

    return path_of


def _read_json(path: Path) -> Coco:
    try:
        content = json.loads(decode_text(read_bounded(path, MAX_JSON, start=b"{"), str(path)))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    parts = ("images", "annotations", "categories")
    if isinstance(content, dict) and "images" in content:
        content.setdefault("annotations", [])  # as for the images of the test server
    if not isinstance(content, dict) or any(not isinstance(content.get(part), list) for part in parts):
        raise UserError(f"{path} is not in COCO's form: it needs lists of images, annotations and categories")
    return content


def read_yolo(root: Path, split: str, mistakes: Mistakes, max_pixels: int = MAX_PIXELS) -> Parts | None:
    """``data.yaml`` names the classes and the images: folders, or text files of their paths, as COCO's has.

    Labels are text files below ``labels``, or beside the images.
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
    parse = _yolo_parser(keypoints, mistakes)
    # labels are keys of the names, which may have gaps
    categories = [{"id": 1 + key, "name": name} for key, name in sorted(names.items())]
    coco: Coco = {"images": [], "annotations": [], "categories": categories}
    missing, found, label_folders = None, 0, dict[Path, Path]()
    for folder in folders:
        places = (base / folder, root / folder.removeprefix("../"))
        place = next((p for p in places if p.is_dir() or (p.suffix == ".txt" and p.is_file())), None)
        if place is None:
            raise UserError(
                f"{file} speaks of images in {folder}, which is not a folder or list of images below {root}"
            )
        unread, read = Counter[str](), [file]
        images = list_images(str(place), unread) if place.is_dir() else _listed_images(place, base, mistakes)
        for image, size in _measure(images, mistakes, max_pixels):
            labels = _labels_of(image, root)
            label_folders[labels.parent] = image.parent
            if os.path.lexists(labels):  # also a link to nothing, which is a mistake
                found += 1
                read += [labels] if labels.is_file() or labels.is_symlink() else []
            else:
                missing = missing or labels
            _append(coco, image, size, labels, parse, mistakes)
        mistakes.note_unread(str(place), unread, read)
    if missing is not None and not found:
        raise UserError(f"{file} has images in {', '.join(folders)}, but no labels: {missing} is not there, nor others")
    _note_labels_alone(label_folders, mistakes)
    return coco, Path, str(file)


def _note_labels_alone(folders: dict[Path, Path], mistakes: Mistakes) -> None:
    """Note labels without an image of any split; ``folders`` are those of labels, each with that of its images.

    Beside the images, they are among the files that are not read.
    """
    alone: list[str] = []
    for labels, images in folders.items():
        if labels == images or not labels.is_dir():
            continue
        with contextlib.suppress(OSError):  # images that a list names may be in a folder that cannot be listed
            known = NO_LABELS | {f"{os.path.splitext(name)[0]}.txt" for name in os.listdir(images)}
            names = (path for path in list_files(str(labels)) if path.endswith(".txt"))
            alone += [path for path in names if os.path.basename(path) not in known]
    if alone:
        more = ", ..." if len(alone) > 3 else ""
        mistakes.notes.append(f"labels without an image: {len(alone):,} ({one_line(', '.join(alone[:3]))}{more})")


def _listed_images(file: Path, base: Path, mistakes: Mistakes) -> list[str]:
    """The images of a text file of paths, which are relative to its own folder or to the data set's."""
    path_of, paths = _searching([file.parent, base]), list[str]()
    for line in dict.fromkeys(filter(None, read_lines(file))):
        path = path_of(line)
        if path.is_file():
            paths.append(str(path))
        else:
            mistakes.add("images not on disk", f"{path} ({file})")
    return paths


def _labels_of(image: Path, root: Path) -> Path:
    """YOLO's file of labels: in ``labels`` in place of the last ``images`` below the root, else beside the image."""
    parts = list(image.parts)
    above = len(root.parts) if image.is_relative_to(root) else 0
    if "images" in parts[above:]:
        last = len(parts) - 1 - parts[::-1].index("images")
        parts[last] = "labels"
    return Path(*parts).with_suffix(".txt")


class _Text(yaml.BaseLoader):
    """Every value as it is written; a key that is there twice would lose what stands under the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := next((key for key, count in keys.items() if count > 1), None):
            raise ValueError(f"{twice} is there twice")
        return super().construct_mapping(node, deep)


def _name_of(key: Any, name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"the name of class {key} is a {type(name).__name__}, not text")
    return name.strip()


def _read_settings(file: Path) -> dict[str, Any]:
    """A ``data.yaml`` with every value as it is written: a class may be called ``no``, ``1.0`` or ``null``."""
    try:
        settings = load_yaml(file, _Text)
        if not isinstance(settings, dict):
            raise TypeError("it is no mapping")
        settings = {key.lower(): value for key, value in settings.items()}
        names = settings["names"]
        if not isinstance(names, dict | list):
            raise TypeError("names are no list")
        pairs = names.items() if isinstance(names, dict) else enumerate(names)
        named = {int(key): _name_of(key, name) for key, name in pairs}
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
    """How many keypoints an object has, of which YOLO's ``kpt_shape`` is [keypoints, 2 or 3]; 0 without any."""
    if shape is None:
        return 0
    numbers = [read_whole(value) for value in shape] if isinstance(shape, list) else []
    if len(numbers) != 2 or numbers[0] is None or numbers[0] < 1 or numbers[1] not in (2, 3):
        raise UserError(f"{file}: kpt_shape {shape} is not [number of keypoints, 2 or 3]")
    return numbers[0]


def _yolo_parser(keypoints: int, mistakes: Mistakes) -> Parse:
    read = import_supervision()["yolo"].yolo_annotations_to_detections

    def parse_line(line: str, size: Size) -> dict[str, Any]:
        if max(map(len, line.split())) > LONGEST_NUMBER:
            raise ValueError(f"a number of more than {LONGEST_NUMBER} characters")
        values = _drop_keypoints(line.split(), keypoints, mistakes)
        (one,) = _from_supervision(read([" ".join(values)], resolution_wh=size[::-1], with_masks=len(values) > 6))
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
            except Exception as error:  # whatever it meets
                yield f"line {number}: {_shorten(error)}"

    return parse


def _drop_keypoints(values: list[str], keypoints: int, mistakes: Mistakes) -> list[str]:
    """The class and the box of a pose label, which is class, box and keypoints of two or three values each.

    Three are x, y and visibility (0, 1 or 2). They are known without ``kpt_shape`` where no polygon looks alike: that
    has an odd number of columns, and no coordinate of 2.
    """
    rest = len(values) - 5
    flags = set(map(read_whole, values[7::3])) if rest > 1 and rest % 3 == 0 else {None}
    visible = flags <= {0, 1, 2} and (len(values) % 2 == 0 or 2 in flags)
    if rest <= 1 or not (keypoints or visible):
        return values
    if keypoints and rest not in (2 * keypoints, 3 * keypoints):
        raise ValueError(f"{len(values)} columns are neither a box nor one with {keypoints} keypoints (kpt_shape)")
    mistakes.notes.append("keypoints are left out, boxes are used")
    return values[:5]


def read_voc(root: Path, split: str, mistakes: Mistakes, max_pixels: int = MAX_PIXELS) -> Parts | None:
    """An XML file for each image, and lists of the images of each set."""
    images, notes = root / "JPEGImages", root / "Annotations"
    if not images.is_dir() or not notes.is_dir():
        return None
    lists = root / "ImageSets" / "Main"
    by_name = {path.name.lower(): path for path in sorted(lists.glob("*.*"))}
    file = next((by_name[f"{word}.txt"] for word in SPLITS[split] if f"{word}.txt" in by_name), None)
    if file is None and (split != "train" or lists.is_dir()):
        return None
    # without lists, all of them
    wanted = None if file is None else {_listed_name(line, notes) for line in read_lines(file) if line}
    classes: list[str] = []
    parse = _voc_parser(classes, mistakes)
    coco: Coco = {"images": [], "annotations": []}
    seen, unread = set(), Counter[str]()
    names = [name for name in list_images(str(images), unread) if wanted is None or Path(name).stem in wanted]
    for image, size in _measure(names, mistakes, max_pixels):
        seen.add(image.stem)
        path = notes / f"{image.stem}.xml"
        if not path.is_file():
            path = next((p for p in [path.with_suffix(".XML")] if p.is_file()), path)
        _append(coco, image, size, path, parse, mistakes)
    mistakes.note_unread(str(images), unread)
    for name in sorted((wanted or set()) - seen):
        mistakes.add("images not on disk", name)
    order = sorted(classes)  # which must not depend on which image came first
    for note in coco["annotations"]:
        note["category_id"] = 1 + order.index(classes[note["category_id"] - 1])
    categories = [{"id": number, "name": name} for number, name in enumerate(order, start=1)]
    return coco | {"categories": categories}, Path, str(file or notes)


def _listed_name(line: str, notes: Path) -> str:
    """The name in a line of a list of images: with a suffix or without, before a 1, 0 or -1 in lists of a class."""
    name = as_file_name(line)
    if not (notes / f"{name}.xml").is_file():  # a name may end in a number, too
        name = re.sub(r"\s+[+-]?[01]$", "", name)
    return os.path.splitext(name)[0] if is_image(name) else name


def _voc_parser(classes: list[str], mistakes: Mistakes) -> Parse:
    """A reader of XML files, which adds the names that it meets to ``classes``."""
    read = import_supervision()["pascal_voc"].detections_from_xml_obj
    parse_xml = importlib.import_module("defusedxml.ElementTree").fromstring  # supervision brings it

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
            odd = isinstance(error, IndexError)  # as supervision meets it
            mistakes.add(NO_OUTLINE, f"{where}: {'an odd number of coordinates' if odd else _shorten(error)}")
        (row,) = _from_supervision(detections)
        corners = [float(one.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
        if min(corners) >= 0 and max(corners) <= 1 and min(corners) < 1:  # VOC's pixels count from 1
            row["problem"] = FRACTIONS
        # difficult objects are neither targets nor held against a detector
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
        if not objects and element.tag != "annotation":  # as with a namespace; it is no image without objects
            raise ValueError(f"is of <{element.tag}>, not of <annotation>")
        for number, one in enumerate(objects, start=1):
            try:
                yield parse_object(one, size, f"{path} object {number}")
            except Exception as error:  # whatever it meets
                yield f"object {number}: {_shorten(error)}"

    return parse


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


def _measure(names: Iterable[str], mistakes: Mistakes, max_pixels: int) -> Iterator[tuple[Path, Size]]:
    """Image files in the order of their names, and their height and width, from their headers."""
    for name in sorted(names):
        try:
            size = read_size(name)
        except Exception as error:  # whatever Pillow meets
            check_lost(name, error)
            mistakes.add("images that cannot be read", f"{name}: {reason_of(error)}")
            continue
        if size[0] * size[1] > max_pixels:  # before masks of this size are drawn
            mistakes.add("images of more pixels than --data.max-pixels", f"{name}: {size[1]}x{size[0]}")
            continue
        yield Path(name), size


def _shorten(error: Exception) -> str:
    return reason_of(error)[:LONGEST_REASON]


def _append(coco: Coco, image: Path, size: Size, notes: Path, parse: Parse, mistakes: Mistakes) -> None:
    """Add an image with those objects of its file of annotations that can be read; neither, if none can be."""
    try:
        found = list(parse(notes, size))
    except MachineError:
        raise
    except Exception as error:  # whatever a reader meets in a damaged file
        check_lost(str(notes), error)
        mistakes.add(UNREAD, f"{notes}: {_shorten(error)}")
        return
    objects = [one for one in found if not isinstance(one, str)]
    reasons = [one for one in found if isinstance(one, str)]
    if reasons and not objects:
        mistakes.add(UNREAD, f"{notes}: {reasons[0]}")
        return
    for reason in reasons:
        mistakes.add("objects that cannot be read", f"{notes}: {reason}")
    number = 1 + len(coco["images"])
    coco["images"].append({"id": number, "file_name": str(image), "height": size[0], "width": size[1]})
    for one in objects:
        coco["annotations"].append({"id": 1 + len(coco["annotations"]), "image_id": number, **one})
