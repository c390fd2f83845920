"""Checks of an object's annotation: its box, polygons and mask."""

from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle

from itpn.data.invalid import InvalidAnnotations
from itpn.data.layouts import FRACTIONS, UNUSABLE_MASK
from itpn.data.numbers import read_image_id, read_number, read_whole
from itpn.data.objects import MIN_SIDE, encode_mask
from itpn.errors import UserError

SMALL_IMAGE = 8  # pixels: in a smaller image, a box inside the first pixel may be right


def refuse_corners(annotations: list[Any], images: dict[int | str, dict[str, Any]], source: str) -> None:
    """Refuse boxes given as corners [x0, y0, x1, y1] in place of [x, y, width, height].

    Boxes are taken for corners if, as corners, at least 95 % of them are inside their images, while as x, y, width,
    height a fifth of them, and at least two, exceed their image by more than a tenth of its side.

    Raises:
        UserError: they are corners.
    """
    rows = []
    for one in annotations:
        if not isinstance(one, dict) or "where" in one:  # in other layouts the format is unambiguous
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
    outside = (low + high > 1.1 * sides).any(axis=1)
    count = int(outside.sum())
    if count >= max(2, 0.2 * len(boxes)) and corners.mean() >= 0.95:
        raise UserError(
            f"{source}: boxes look like [x0, y0, x1, y1]: {count:,} of {len(boxes):,} would leave their image, and as "
            "corners all are inside; convert them to COCO's [x, y, width, height]"
        )


def check_object(
    one: dict[str, Any], image: dict[str, Any], what: str, invalid: InvalidAnnotations
) -> dict[str, Any] | None:
    """A checked object, its box inside the image; None if it is unusable."""
    height, width = image["height"], image["width"]
    crowd = one.get("iscrowd")
    crowd = 0 if crowd is None else int(crowd) if isinstance(crowd, bool) else read_whole(crowd)
    if crowd not in (0, 1):
        invalid.add("objects whose iscrowd is neither 0 nor 1", f"{what}: {one['iscrowd']!r}")
        return None
    kept: dict[str, Any] = {"iscrowd": crowd}
    given, checked = one.get("bbox"), "where" in one
    stated = given not in (None, [])
    numbers = _read_box(given) if stated else None
    # for example zeros, which are replaced by the box of the polygon
    placeholder = stated and not checked and (numbers is None or not min(numbers[2:]) > 0)
    box = None
    if stated and not placeholder:
        box = _check_box(numbers, one.get("problem"), checked, height, width, what, invalid)
        if box is None:
            return None
    segmentation, encoded = _check_segmentation(one.get("segmentation"), checked, height, width, what, invalid)
    if placeholder and encoded is None:
        _check_box(numbers, one.get("problem"), checked, height, width, what, invalid)
        return None
    if placeholder:
        invalid.add("boxes of no area, or not of four numbers, replaced by the box of the polygon", what)
    mask_area = None
    if encoded is not None:
        kept["segmentation"] = segmentation
        mask_area = float(rle.area(encoded))
        box = rle.toBbox(encoded).tolist() if box is None else box
    if box is None:
        invalid.add("objects without a box", what)
        return None
    stated_area = read_number(one.get("area"))
    area = stated_area if stated_area is not None and stated_area > 0 else mask_area or box[2] * box[3]
    return kept | {"bbox": box, "area": area}


def _read_box(value: Any) -> list[float] | None:
    """A box of four numbers; None for anything else."""
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
    invalid: InvalidAnnotations,
) -> list[float] | None:
    """A box clipped to its image; None if it is unusable.

    Args:
        problem: kind of problem that a reader has found in it.
        checked: a reader has checked it, because its layout does not hold x, y, width and height in pixels.
    """
    if box is None:
        invalid.add("objects whose box is not four numbers", what)
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
        invalid.add(problem, what)
        return None
    if beyond > 1:  # less is a rounding error
        invalid.add("boxes partly outside their image, which were clipped", what)
    return [x0, y0, x1 - x0, y1 - y0] if beyond > 0 else box


def _check_segmentation(
    value: Any, checked: bool, height: int, width: int, what: str, invalid: InvalidAnnotations
) -> tuple[Any, dict[str, Any] | None]:
    """The usable polygons or run lengths, unchanged and as compressed run lengths; None if there are none.

    Args:
        checked: a reader has made the run lengths for this image.
    """
    parts = [part for part in value if part != []] if isinstance(value, list) else value
    if not parts:
        return None, None
    usable, reason = parts, ""
    if isinstance(parts, list) and len(parts) > 1:
        tried = [(part, _encode([part], checked, height, width)[1]) for part in parts]
        usable = [part for part, wrong in tried if not wrong]
        reason = next((wrong for _, wrong in tried if wrong), "")
    encoded, wrong = _encode(usable, checked, height, width)
    reason = reason or wrong
    if encoded is None:
        invalid.add(UNUSABLE_MASK, f"{what}: {reason}")
        return None, None
    if isinstance(usable, list):
        usable = [[read_number(v) if isinstance(v, str) else v for v in polygon] for polygon in usable]
    if reason:
        invalid.add("polygons that cannot be used, beside others of the object", f"{what}: {reason}")
    return usable, encoded


def _encode(segmentation: Any, checked: bool, height: int, width: int) -> tuple[dict[str, Any] | None, str]:
    """Polygons or run lengths as compressed run lengths, or None and the reason."""
    try:
        encoded = encode_mask(segmentation, height, width)
        if isinstance(segmentation, dict) and not checked:
            rle.decode(encoded)  # finds run lengths of another image size now, not in training
        if rle.area(encoded):
            return encoded, ""
    except Exception as error:  # malformed input raises many types
        plain = isinstance(error, ValueError) and str(error)
        return None, str(error).splitlines()[0] if plain else "in none of COCO's forms"
    values = [] if isinstance(segmentation, dict) else [float(v) for polygon in segmentation for v in polygon]
    if values and min(values) >= 0 and 0 < max(values) <= 1 and min(height, width) >= SMALL_IMAGE:
        return None, "coordinates from 0 to 1, which look like fractions of the image (pixels are expected)"
    return None, "it contains no pixel"
