"""Reader of label images: an image of integers beside each image, one number for each object and 0 for the background.

Objects of them become boxes and masks of one class.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from itpn.data.bands import join_bands, split_bands
from itpn.data.class_names import read_names
from itpn.data.decode import UnreadableImage, decoder_errors
from itpn.data.file_types import JPEG_SUFFIXES, is_shard
from itpn.data.formats.image_file import ImageFile
from itpn.data.formats.photos import PhotoImage
from itpn.data.formats.reader import open_file
from itpn.data.invalid import InvalidAnnotations
from itpn.data.labelmaps import find_pairs
from itpn.data.layouts import Coco, ImageRules, Parts, Size, measure_images
from itpn.data.mask_checks import find_size_problem, match_masks
from itpn.data.mask_pieces import encode_runs
from itpn.data.readers import check_lost
from itpn.data.walk import walk

CLASS = "object"  # where no file names it
FEW_LABELS, MANY_PARTS = 20, 3  # labels of the whole set and parts of an object, for which labels look like classes


class Objects(NamedTuple):
    """The objects of a label image.

    Attributes:
        annotations: in COCO's form, without the image.
        labels: in the same order.
        parts: of all objects together, not counting those that only touch at corners; a hole counts as one less.
    """

    annotations: list[dict[str, Any]]
    labels: list[int]
    parts: int


def read_instances(
    root: Path,
    split: str,
    invalid: InvalidAnnotations,
    rules: ImageRules,
    *,
    undivided: bool = True,
) -> Parts | None:
    """Read label images in the folders that segmentation has its masks in (see :func:`find_pairs`).

    The class has the name in a file of classes beside the folders, if it has one, or is called "object".

    Args:
        undivided: whether a folder without splits is read.
    """
    pairs = find_pairs(str(root), None, split)
    if pairs is None or all(map(is_shard, walk(pairs.masks))):
        return None
    if split != "train" and not undivided and pairs == find_pairs(str(root), None, "train"):
        return None
    images = join_bands(pairs.images, rules.bands, pairs.folder)[0] if rules.bands else pairs.images
    masks = match_masks(images, pairs.folder, pairs.masks, invalid)
    invalid.note_unread(pairs.folder, pairs.unread)
    coco: Coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": _read_class(root, invalid)}]}
    labels, parts = set[int](), 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        sizes = list(measure_images(masks, invalid, rules))
        jobs = [(image, size, pool.submit(scan_labels, masks[str(image)], size)) for image, size in sizes]
        for image, size, job in jobs:
            found = _take(job, str(image), masks[str(image)], size, invalid)
            if found is None:
                continue
            number = 1 + len(coco["images"])
            coco["images"].append({"id": number, "file_name": str(image), "height": size[0], "width": size[1]})
            coco["annotations"] += [{"image_id": number, **one} for one in found.annotations]
            labels.update(found.labels)
            parts += found.parts
    count = len(coco["annotations"])
    if len(coco["images"]) > 1 and len(labels) <= FEW_LABELS and parts > MANY_PARTS * count:
        invalid.notes.append(
            f"{len(labels)} labels of {parts / count:.1f} parts an image look like classes: each object needs a number "
            "of its own (segmenters learn masks of classes)"
        )
    return coco, Path, pairs.masks


def _read_class(root: Path, invalid: InvalidAnnotations) -> str:
    names = read_names(None, str(root)) or []
    if len(names) > 1:
        invalid.notes.append(f"its file of classes has {len(names)}, but label images are of one, called {CLASS}")
    return names[0][0] if len(names) == 1 else CLASS


class _OtherSize(UnreadableImage):
    """A label image of another size than its image; its argument is that size."""


def _take(job: Future[Objects], image: str, mask: str, size: Size, invalid: InvalidAnnotations) -> Objects | None:
    """The objects of a label image; None if it is invalid."""
    try:
        return job.result()
    except _OtherSize as error:
        if problem := find_size_problem(split_bands(image)[0], size, mask, error.args[0]):
            invalid.add(*problem)
    except (UnreadableImage, OSError) as error:
        check_lost(mask, error)
        invalid.add("masks that cannot be read", f"{mask}: {error}")
    return None


def scan_labels(path: str, size: Size) -> Objects:
    """The objects of a label image.

    Raises:
        UnreadableImage: it cannot be read, or holds no labels.
        _OtherSize: it is not of this size; no pixel has been read.
    """
    with decoder_errors():
        image = open_labels(path)
        if (image.height, image.width) != size:
            raise _OtherSize((image.height, image.width))
        labels = image.read()[0]
    if labels.min(initial=0) < 0:
        raise UnreadableImage(f"label {labels.min()}: labels count from 1, and 0 is the background")
    return trace_objects(labels, path)


def open_labels(path: str) -> ImageFile:
    """The header of a label image; of a palette its indices count.

    Raises:
        UnreadableImage: it holds no labels.
    """
    if path.lower().endswith(JPEG_SUFFIXES):
        raise UnreadableImage("JPEG changes labels: save them as PNG or TIFF")
    image = open_file(Path(path))
    if isinstance(image, PhotoImage) and image.has_palette:
        image = PhotoImage(Path(path), indices=True)
    if image.channels > 1:
        hint = ": save one integer for each object, not its colour" if image.channels in (3, 4) else ""
        raise UnreadableImage(f"{image.channels} channels, labels have one{hint}")
    if image.pages > 1:
        raise UnreadableImage(f"{image.pages} pages, labels of an image have one")
    if image.dtype.kind not in "ui":
        raise UnreadableImage(f"{image.dtype} values are no labels: save integers")
    return image


def trace_objects(labels: np.ndarray, where: str) -> Objects:
    """The objects of labels [H, W], 0 for the background."""
    height, width = labels.shape
    # COCO's run lengths go down the columns, and from the end of one to the top of the next
    starts, lengths, values = _find_runs(labels.T.ravel(), height)
    beside = np.where(labels[:, 1:] == labels[:, :-1], labels[:, 1:], 0)
    parts = len(starts) - len(_find_runs(beside.T.ravel(), height)[0])
    order = values.argsort(kind="stable")
    starts, lengths, values = starts[order], lengths[order], values[order]
    ends = starts + lengths
    numbers, first = np.unique(values, return_index=True)
    bounds = [*first.tolist(), len(values)]
    annotations = [
        {
            "category_id": 1,
            "bbox": box,
            "segmentation": encode_runs(starts[low:high], ends[low:high], height, width),
            "where": f"{where} label {number}",
        }
        for low, high, number, box in zip(
            bounds, bounds[1:], numbers.tolist(), _find_boxes(starts, lengths, first, height), strict=False
        )
    ]
    return Objects(annotations, numbers.tolist(), parts)


def _find_runs(column: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, length and value of each run of equal values other than 0; a run ends with its column of this height."""
    breaks = column[1:] != column[:-1]
    breaks[height - 1 :: height] = True
    starts = np.concatenate([[0], np.flatnonzero(breaks) + 1]) if len(column) else np.zeros(0, np.int64)
    lengths = np.diff(starts, append=len(column))
    values = column[starts]
    kept = values != 0
    return starts[kept], lengths[kept], values[kept]


def _find_boxes(starts: np.ndarray, lengths: np.ndarray, first: np.ndarray, height: int) -> Iterator[list[float]]:
    """[x, y, width, height] of each object; ``first`` is the place of its first run."""
    if not len(first):
        return
    rows, columns = starts % height, starts // height
    left, right = np.minimum.reduceat(columns, first), np.maximum.reduceat(columns, first) + 1
    top, bottom = np.minimum.reduceat(rows, first), np.maximum.reduceat(rows + lengths, first)
    yield from np.stack([left, top, right - left, bottom - top], axis=1).astype(float).tolist()
