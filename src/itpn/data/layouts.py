"""Layouts of folders with annotated objects: COCO's, YOLO's and Pascal VOC's, each in COCO's terms.

Each reader gives None where the folder has another layout, or not this set.
"""

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle

from itpn.data.decode import read_size, reason_of
from itpn.data.invalid import InvalidAnnotations
from itpn.data.readers import check_lost
from itpn.errors import MachineError, UserError
from itpn.system.text import as_file_name

LONGEST_REASON = 500  # characters: it may quote megabytes of a damaged file
Coco = dict[str, Any]  # "images", "annotations", "categories", as in COCO's JSON
Size = tuple[int, int]  # height, width
Found = dict[str, Any] | str  # an object, or why it cannot be read
Parse = Callable[[Path, Size], Iterator[Found]]  # of a file of annotations
# kinds of mistakes
UNREADABLE = "images whose annotations cannot be read"
UNUSABLE_MASK = "polygons or masks that cannot be used (the box is, if there is one)"
FRACTIONS = "boxes with coordinates from 0 to 1, which look like fractions: multiply them by the image's sides"

Parts = tuple[Coco, Callable[[str], Path], str]  # what it says, where an image's file is, what to call it


def search_folders(places: list[Path]) -> Callable[[str], Path]:
    """Where a file is: in the first of several folders that has it."""

    def path_of(name: str) -> Path:
        name = as_file_name(name)
        with contextlib.suppress(OSError):  # no name of a file
            paths = [place / own for own in (name, name.replace("\\", "/")) for place in places]  # of Windows
            return next((path for path in paths if path.is_file()), places[0] / name)
        return places[0] / name[:100]

    return path_of


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


def from_supervision(detections: Any) -> Iterator[dict[str, Any]]:
    for row, (x0, y0, x1, y1) in enumerate(np.asarray(detections.xyxy, dtype=np.float64).tolist()):
        one = {"bbox": [x0, y0, x1 - x0, y1 - y0], "category_id": 1 + int(detections.class_id[row])}
        if detections.mask is not None:
            encoded = rle.encode(np.asfortranarray(np.asarray(detections.mask[row]), dtype=np.uint8))
            one["segmentation"] = {"size": encoded["size"], "counts": _text(encoded["counts"])}
        yield one


def _text(counts: Any) -> Any:
    return counts.decode() if isinstance(counts, bytes) else counts


def measure_images(names: Iterable[str], mistakes: InvalidAnnotations, max_pixels: int) -> Iterator[tuple[Path, Size]]:
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


def shorten_reason(error: Exception) -> str:
    return reason_of(error)[:LONGEST_REASON]


def append_image(coco: Coco, image: Path, size: Size, notes: Path, parse: Parse, mistakes: InvalidAnnotations) -> None:
    """Add an image with those objects of its file of annotations that can be read; neither, if none can be."""
    try:
        found = list(parse(notes, size))
    except MachineError:
        raise
    except Exception as error:  # whatever a reader meets in a damaged file
        check_lost(str(notes), error)
        mistakes.add(UNREADABLE, f"{notes}: {shorten_reason(error)}")
        return
    objects = [one for one in found if not isinstance(one, str)]
    reasons = [one for one in found if isinstance(one, str)]
    if reasons and not objects:
        mistakes.add(UNREADABLE, f"{notes}: {reasons[0]}")
        return
    for reason in reasons:
        mistakes.add("objects that cannot be read", f"{notes}: {reason}")
    number = 1 + len(coco["images"])
    coco["images"].append({"id": number, "file_name": str(image), "height": size[0], "width": size[1]})
    for one in objects:
        coco["annotations"].append({"id": 1 + len(coco["annotations"]), "image_id": number, **one})
