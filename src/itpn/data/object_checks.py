"""What is invalid in an object: its box, its mask."""

from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle

from itpn.data.invalid import InvalidAnnotations
from itpn.data.layouts import FRACTIONS, UNUSABLE_MASK
from itpn.data.numbers import read_image_id, read_number, read_whole
from itpn.data.objects import MIN_SIDE, encode_mask
from itpn.errors import UserError

SMALL_IMAGE = 8  # pixels: in less, a box in the first pixel may be meant


def refuse_corners(annotations: list[Any], images: dict[int | str, dict[str, Any]], source: str) -> None:
    """Find out whether boxes are corners [x0, y0, x1, y1], where [x, y, width, height] are expected.

    They are if that puts (almost) all of them inside their images, while as x, y, width, height a fifth of them, and
    at least two, leave their image by more than a tenth of its side.

    Raises:
        UserError: they are.
    """
    rows = []
    for one in annotations:
        if not isinstance(one, dict) or "where" in one:  # other layouts name the corners
            continue
        key = read_image_id(one.get("image_id"))
        image = None if key is None else images.get(key)
        box = _read_box(one.get("bbox"))
        if image is not None and box is not None:
            rows.append([*box, image["width"], image["height"]])
    if not rows:
        return
    boxes = np.array(rows)
    low, high, sides = boxes[:, :2], boxes[:, 2:4], boxes[:, 4:]
    corners = ((low > -1) & (high > low) & (high <= sides + 1)).all(axis=1)
    leaving = (low + high > 1.1 * sides).any(axis=1)
    count = int(leaving.sum())
    if count >= max(2, 0.2 * len(boxes)) and corners.mean() >= 0.95:
        raise UserError(
            f"{source}: boxes look like [x0, y0, x1, y1]: {count:,} of {len(boxes):,} would leave their image, and as "
            "corners all are inside; convert them to COCO's [x, y, width, height]"
        )


def check_object(
    one: dict[str, Any], image: dict[str, Any], what: str, mistakes: InvalidAnnotations
) -> dict[str, Any] | None:
    """An object as it is kept, its box inside the image; None if it is of no use."""
    height, width = image["height"], image["width"]
    crowd = one.get("iscrowd")
    crowd = 0 if crowd is None else int(crowd) if isinstance(crowd, bool) else read_whole(crowd)
    if crowd not in (0, 1):
        mistakes.add("objects whose iscrowd is neither 0 nor 1", f"{what}: {one['iscrowd']!r}")
        return None
    kept: dict[str, Any] = {"iscrowd": crowd}
    given, checked = one.get("bbox"), "where" in one
    stated = given not in (None, [])
    numbers = _read_box(given) if stated else None
    # zeros, say, of which a polygon makes a box, but nothing else does
    placeholder = stated and not checked and (numbers is None or not min(numbers[2:]) > 0)
    box = None
    if stated and not placeholder:
        box = _check_box(numbers, one.get("problem"), checked, height, width, what, mistakes)
        if box is None:
            return None
    segmentation, encoded = _check_segmentation(one.get("segmentation"), height, width, what, mistakes)
    if placeholder and encoded is None:
        _check_box(numbers, one.get("problem"), checked, height, width, what, mistakes)
        return None
    if placeholder:
        mistakes.add("boxes of no area, or not of four numbers, in whose place the polygon's is taken", what)
    mask_area = None
    if encoded is not None:
        kept["segmentation"] = segmentation
        mask_area = float(rle.area(encoded))
        box = rle.toBbox(encoded).tolist() if box is None else box
    if box is None:
        mistakes.add("objects without a box", what)
        return None
    said = read_number(one.get("area"))
    area = said if said is not None and said > 0 else mask_area or box[2] * box[3]
    return kept | {"bbox": box, "area": area}


def _read_box(value: Any) -> list[float] | None:
    """Four numbers."""
    numbers = [read_number(part) for part in value] if isinstance(value, list) else []
    box = [number for number in numbers if number is not None]
    return box if len(numbers) == len(box) == 4 else None


def _check_box(
    box: list[float] | None,
    problem: str | None,
    checked: bool,
    height: int,
    width: int,
    what: str,
    mistakes: InvalidAnnotations,
) -> list[float] | None:
    """A box inside its image; None if it is of no use.

    Args:
        problem: kind of what a reader has found wrong with it.
        checked: a reader has looked, for the file does not hold x, y, width and height in pixels.
    """
    if box is None:
        mistakes.add("objects whose box is not four numbers", what)
        return None
    x, y, w, h = box
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    beyond = max(-x, -y, x + w - width, y + h - height)
    inside_first_pixel = min(box) >= 0 and max(box) <= 1 and max(w, h) > 0 and min(height, width) >= SMALL_IMAGE
    if problem is None and not checked and inside_first_pixel:
        problem = FRACTIONS
    if problem is None and (w <= 0 or h <= 0):
        problem = "boxes of no area"
    if problem is None and (x1 <= x0 or y1 <= y0):
        problem = "boxes outside their image"
    if problem is None and min(x1 - x0, y1 - y0) < MIN_SIDE - 1e-3:
        problem = "boxes under 1 pixel"
    if problem is not None:
        mistakes.add(problem, what)
        return None
    if beyond > 1:  # less is rounding
        mistakes.add("boxes partly outside their image, which were cut", what)
    return [x0, y0, x1 - x0, y1 - y0] if beyond > 0 else box


def _check_segmentation(
    value: Any, height: int, width: int, what: str, mistakes: InvalidAnnotations
) -> tuple[Any, dict[str, Any] | None]:
    """The polygons or run lengths that hold pixels, as they are and as compressed run lengths; None without any."""
    parts = [part for part in value if part != []] if isinstance(value, list) else value
    if not parts:
        return None, None
    usable, reason = parts, ""
    if isinstance(parts, list) and len(parts) > 1:
        checked = [(part, _encode([part], height, width)[1]) for part in parts]
        usable = [part for part, wrong in checked if not wrong]
        reason = next((wrong for _, wrong in checked if wrong), "")
    encoded, wrong = _encode(usable, height, width)
    reason = reason or wrong
    if encoded is None:
        mistakes.add(UNUSABLE_MASK, f"{what}: {reason}")
        return None, None
    if isinstance(usable, list):
        usable = [[read_number(v) if isinstance(v, str) else v for v in polygon] for polygon in usable]
    if reason:
        mistakes.add("polygons that cannot be used, beside others of the object", f"{what}: {reason}")
    return usable, encoded


def _encode(segmentation: Any, height: int, width: int) -> tuple[dict[str, Any] | None, str]:
    """Polygons or run lengths as compressed run lengths; None and what is wrong, if anything is."""
    try:
        encoded = encode_mask(segmentation, height, width)
        if isinstance(segmentation, dict):
            rle.decode(encoded)  # or else runs that are not the image's are found out in training
        if rle.area(encoded):
            return encoded, ""
    except Exception as error:  # malformed in any of many ways
        plain = isinstance(error, ValueError) and str(error)
        return None, str(error).splitlines()[0] if plain else "in none of COCO's forms"
    values = [] if isinstance(segmentation, dict) else [float(v) for polygon in segmentation for v in polygon]
    if values and min(values) >= 0 and 0 < max(values) <= 1 and min(height, width) >= SMALL_IMAGE:
        return None, "coordinates from 0 to 1, which look like fractions of the image (pixels are expected)"
    return None, "it holds no pixel"
