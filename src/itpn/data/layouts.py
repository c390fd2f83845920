"""What the readers of the layouts of annotations share. Each returns annotations in COCO's form.

A reader returns None where the folder has another layout, or lacks the split.
"""

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle

from itpn.data.bands import find_bands, name_image, split_bands
from itpn.data.decode import MAX_PIXELS, reason_of
from itpn.data.formats.arrays import Axes
from itpn.data.formats.reader import read_size
from itpn.data.invalid import InvalidAnnotations
from itpn.data.readers import check_lost
from itpn.errors import MachineError, UserError
from itpn.system.text import as_file_name

LONGEST_REASON = 500  # characters: a message may quote megabytes of a corrupt file
Coco = dict[str, Any]  # "images", "annotations", "categories", as in COCO's JSON
Size = tuple[int, int]  # height, width
Found = dict[str, Any] | str  # an object, or why it cannot be read
Parse = Callable[[Path, Size], Iterator[Found]]  # of an annotation file
# kinds of invalid annotations
UNREADABLE = "images whose annotations cannot be read"
UNUSABLE_MASK = "polygons or masks that cannot be used (the box is, if there is one)"
FRACTIONS = "boxes with coordinates from 0 to 1, which look like fractions: multiply them by the image's sides"

Parts = tuple[Coco, Callable[[str], Path], str]  # annotations, file name -> path of an image, name of the source


@dataclass(frozen=True)
class ImageRules:
    """How the images of annotations are found and measured.

    Attributes:
        max_pixels: larger images are left out.
        bands: of images in one file a band, see `itpn.data.bands.find_bands`.
        axes: of arrays, see `itpn.data.formats.arrays.ArrayImage`.
    """

    max_pixels: int = MAX_PIXELS
    bands: Sequence[str] = ()
    axes: Axes | None = None


def search_folders(places: list[Path], bands: Sequence[str] = ()) -> Callable[[str], Path]:
    """A function that finds a file by name, in the first of several folders that has it.

    Args:
        bands: of images in one file a band, see `itpn.data.bands.find_bands`.
    """

    def path_of(name: str) -> Path:
        name = as_file_name(name)
        with contextlib.suppress(OSError):  # not a valid file name
            paths = [place / own for own in (name, name.replace("\\", "/")) for place in places]  # of Windows
            if bands:
                found = (find_bands(str(path), bands) for path in paths)
                return next((Path(image) for image in found if image), places[0] / name)
            return next((path for path in paths if path.is_file()), places[0] / name)
        return places[0] / name[:100]

    return path_of


def import_supervision(layout: str) -> Any:
    """The supervision library's reader of annotation files of a layout, a module."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # supervision warns if OpenCV is missing
            return importlib.import_module(f"supervision.dataset.formats.{layout}")
    except ImportError as error:
        raise UserError(
            "reading YOLO's and Pascal VOC's layouts needs supervision: pip install 'itpn[formats]'"
        ) from error


def from_supervision(detections: Any) -> Iterator[dict[str, Any]]:
    for row, (x0, y0, x1, y1) in enumerate(np.asarray(detections.xyxy, dtype=np.float64).tolist()):
        one = {"bbox": [x0, y0, x1 - x0, y1 - y0], "category_id": 1 + int(detections.class_id[row])}
        if detections.mask is not None:
            encoded = rle.encode(np.asfortranarray(np.asarray(detections.mask[row]), dtype=np.uint8))
            one["segmentation"] = {"size": encoded["size"], "counts": encoded["counts"].decode()}
        yield one


def measure_images(names: Iterable[str], invalid: InvalidAnnotations, rules: ImageRules) -> Iterator[tuple[Path, Size]]:
    """Image files sorted by name, with height and width from their headers; of bands that of the first."""
    for name in sorted(names):
        try:
            size = read_size(first := split_bands(name)[0], rules.axes)
        except Exception as error:  # Pillow raises many types
            check_lost(first, error)
            invalid.add("images that cannot be read", f"{first}: {reason_of(error)}")
            continue
        if size[0] * size[1] > rules.max_pixels:  # before masks of this size are drawn
            invalid.add("images of more pixels than --data.max-pixels", f"{name_image(name)}: {size[1]}x{size[0]}")
            continue
        yield Path(name), size


def shorten_reason(error: Exception) -> str:
    return reason_of(error)[:LONGEST_REASON]


def append_image(coco: Coco, image: Path, size: Size, notes: Path, parse: Parse, invalid: InvalidAnnotations) -> None:
    """Add an image with the readable objects of its annotation file; add nothing if all objects are unreadable."""
    try:
        found = list(parse(notes, size))
    except MachineError:
        raise
    except Exception as error:  # readers raise many types on a corrupt file
        check_lost(str(notes), error)
        invalid.add(UNREADABLE, f"{notes}: {shorten_reason(error)}")
        return
    objects = [one for one in found if not isinstance(one, str)]
    reasons = [one for one in found if isinstance(one, str)]
    if reasons and not objects:
        invalid.add(UNREADABLE, f"{notes}: {reasons[0]}")
        return
    for reason in reasons:
        invalid.add("objects that cannot be read", f"{notes}: {reason}")
    number = 1 + len(coco["images"])
    coco["images"].append({"id": number, "file_name": str(image), "height": size[0], "width": size[1]})
    for one in objects:
        coco["annotations"].append({"image_id": number, **one})
