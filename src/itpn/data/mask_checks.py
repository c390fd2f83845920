"""Checks of a set of masks, each of which is read once."""

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from itpn.data.class_names import Names, join_names
from itpn.data.decode import MAX_PIXELS, UnreadableImage, open_image, read_size, reason_of
from itpn.data.file_types import JPEG_SUFFIXES
from itpn.data.grey_masks import explain_greys
from itpn.data.invalid import InvalidAnnotations
from itpn.data.masks import IGNORED, VOID, LabelTable, make_table, pack, read_lossy_mask, ungrey
from itpn.data.orientation import SWAPPED
from itpn.data.readers import FileReader, PackedStrings, Reader, Subset, check_lost
from itpn.data.walk import list_images
from itpn.errors import UserError

MASK_ENDINGS = ("", "_mask", "_label", "_labels", "_seg", "_L", "_gtFine_labelIds")  # after the image's name


@dataclass(frozen=True)
class LabelMaps:
    """Images in a fixed order, each with its mask.

    Attributes:
        files: the encoded images.
        masks: paths.
        table: what is in them.
        left_out: how many images are not among them for a mistake.
    """

    files: Reader
    masks: PackedStrings
    table: LabelTable
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> tuple[str, bytes | UnreadableImage, str]:
        """Name, encoded image or why it cannot be had, and the path of its mask."""
        name, data = self.files[index]
        return name, data, self.masks[index]

    def name(self, index: int) -> str:
        return self.files.name(index)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.table.classes

    def rename(self, classes: Sequence[str]) -> "LabelMaps":
        """The same images with the numbers that another list of classes gives them.

        Raises:
            UserError: a class is not in it.
        """
        return replace(self, table=self.table.rename(classes))

    def take(self, indices: np.ndarray) -> "LabelMaps":
        """Some of the images."""
        return replace(
            self, files=Subset(self.files, indices), masks=PackedStrings([self.masks[index] for index in indices])
        )


@dataclass(frozen=True)
class MaskRules:
    """What masks mean, and what is done about those that cannot be right.

    Attributes:
        classes: a file with a class a line, or with ``NAME R G B``; None for one beside the images, or for numbers.
        reduce_zero_label: label 0 is of no class, and the first class is 1, as in ADE20K.
        ignore: labels that are of no class.
        mistakes: see `itpn.config.MasksConfig`.
        tell: takes the summary of mistakes, a line at a time.
        max_pixels: of a mask.
    """

    classes: str | None = None
    reduce_zero_label: bool = False
    ignore: tuple[int, ...] = (255,)
    mistakes: Literal["summary", "skip", "error"] = "summary"
    tell: Callable[[str], None] = print
    max_pixels: int = MAX_PIXELS


class Pairs(NamedTuple):
    """The images of a set, the folder that they are in, the folder of their masks, and the other files of the first."""

    images: list[str]
    folder: str
    masks: str
    unread: Counter[str]


@dataclass(frozen=True)
class MaskContent:
    """What a mask holds.

    Attributes:
        size: height, width.
        values: its numbers and how many pixels have each; of pictures in colours these, see `itpn.data.masks.pack`.
        lossy: the compression that has changed them, if one has.
    """

    size: tuple[int, int]
    values: Mapping[int, int]
    coloured: bool
    lossy: str = ""


def check_masks(pairs: Pairs, names: Names | LabelTable | None, rules: MaskRules) -> LabelMaps:
    """The images whose masks can be used, every one of which is read, once.

    Raises:
        UserError: none can be; or a mistake if it is an error.
    """
    images, folder, others, unread = pairs
    found = InvalidAnnotations()
    found.note_unread(folder, unread, [rules.classes] if rules.classes else ())
    masks = match_masks(images, folder, others, found)
    table = _start_table(names, others, rules)
    looks: dict[str, MaskContent] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        jobs = [(path, mask, pool.submit(scan_mask, mask, rules.max_pixels, table)) for path, mask in masks.items()]
        for path, mask, job in jobs:
            try:
                looks[path] = job.result()
            except UnreadableImage as error:
                found.add("masks that cannot be read", f"{mask}: {error}")
    if looks and not isinstance(names, LabelTable):
        plain = {masks[path]: look.values for path, look in looks.items() if not look.coloured}
        lossy = {masks[path]: look.lossy for path, look in looks.items() if look.lossy}
        table = _finish_table(table, plain, lossy, others, rules)
    present: set[int] = set()
    kept = []
    for path, look in looks.items():
        assert table is not None
        classes = {value: table.find(value, look.coloured) for value in look.values}
        mistake = _find_problem(path, masks[path], look, table, classes)
        if mistake is None:
            kept.append(path)
            present |= {number for number in classes.values() if number is not None}
        else:
            found.add(*mistake)
    if not kept:
        raise found.explain_lack(folder, "images")
    found.report(others, rules.mistakes, rules.tell)
    assert table is not None
    if not present - {IGNORED}:
        raise UserError(f"no mask in {others} has a pixel of a class: see --data.ignore and --data.reduce-zero-label")
    if not isinstance(names, LabelTable):
        _log_labels(looks.values(), table, present, others, rules)
    return LabelMaps(FileReader(kept), PackedStrings([masks[path] for path in kept]), table, len(images) - len(kept))


def _log_labels(
    looks: Iterable[MaskContent], table: LabelTable, present: set[int], others: str, rules: MaskRules
) -> None:
    """Tell what may not be meant: the label that is ignored for its number, and classes that no mask has."""
    # of palettes that are read by colour, the labels of no class are numbers
    numbers = {value - look.coloured * VOID for look in looks for value in look.values if value >= look.coloured * VOID}
    if IGNORED in numbers and numbers != {0, IGNORED} and table.numbers[IGNORED] == IGNORED:
        rules.tell(f"{others}: pixels of label 255 are ignored (--data.ignore)")
    absent = [name for number, name in enumerate(table.classes) if number not in present]
    if absent and rules.mistakes == "summary":
        reason = "; label 0 is of no class (--data.reduce-zero-label)" if rules.reduce_zero_label else ""
        rules.tell(f"{others}: no mask has {join_names(absent)}{reason}")


def _start_table(names: Names | LabelTable | None, others: str, rules: MaskRules) -> LabelTable | None:
    """What masks mean as far as it is known before they are read.

    Raises:
        UserError: fewer than two classes, or more than 254.
    """
    if names is None or isinstance(names, LabelTable):
        return names
    try:
        return make_table(names, rules.reduce_zero_label, rules.ignore)
    except UserError as error:
        raise UserError(f"masks in {others}: {error}") from None


def _finish_table(
    table: LabelTable | None,
    masks: Mapping[str, Mapping[int, int]],
    lossy: Mapping[str, str],
    others: str,
    rules: MaskRules,
) -> LabelTable:
    """What a set of masks means; ``masks``: label -> pixels, of each file of labels; ``lossy`` as in `MaskContent`.

    Raises:
        UserError: labels above 254, shades of grey in place of class indices, or fewer than two classes.
    """
    numbers = set().union(*masks.values())
    if table is None:  # classes are the numbers that there are
        _refuse_greys(masks, lossy, others, rules)
        largest = max(numbers - set(rules.ignore), default=0)
        if numbers == {0, 255}:
            largest = 1
        if largest >= IGNORED:
            example = next(mask for mask, values in masks.items() if largest in values)
            raise UserError(f"label {largest} in {example}: labels end at 254, but for those of --data.ignore")
        names = [(str(number), None) for number in range(int(rules.reduce_zero_label), largest + 1)]
        table = _start_table(names, others, rules)
        assert table is not None
    greys = table.read_greys(numbers)
    if greys is None:
        if numbers == {0, 255} and table.numbers[255] == IGNORED:
            rules.tell(f"{others}: masks of 0 and 255, but not of two classes: 255 is of no class (--data.ignore)")
        return table
    if table.by_colour is None:
        rules.tell(f"{others}: black and white masks, of {table.classes[0]} and {table.classes[1]}")
    return greys


def _refuse_greys(
    masks: Mapping[str, Mapping[int, int]], lossy: Mapping[str, str], others: str, rules: MaskRules
) -> None:
    """Raise :class:`UserError` where the numbers look like shades of grey."""
    counts: Counter[int] = Counter()
    for values in masks.values():
        counts.update(values)
    for label in set(rules.ignore) - {IGNORED}:
        del counts[label]
    if reason := explain_greys(counts):
        example = max(masks, key=lambda mask: len(masks[mask]))
        raise UserError(f"masks in {others}, such as {example}: {reason}")
    if example := next((mask for mask in masks if mask in lossy and set(masks[mask]) - {0, IGNORED}), ""):
        raise UserError(
            f"masks in {others}, such as {example}: {lossy[example]} changes pixels, so that their values are no class "
            "indices: save masks as PNG (or give --data.classes FILE with a name for each index, if they are indices)"
        )


def scan_mask(path: str, max_pixels: int, table: LabelTable | None) -> MaskContent:
    """Size of a mask, and what is in it.

    Raises:
        UnreadableImage: it cannot be read, or is a picture in colours, and there are none.
    """
    values, lossy = read_lossy_mask(path, max_pixels, table)
    coloured = values.ndim == 3 and table is not None and table.by_colour is not None
    size = values.shape[:2]
    if coloured:
        seen = np.zeros(VOID + 256, dtype=bool)
        seen[pack(values)] = True
        return MaskContent(size, dict.fromkeys(seen.nonzero()[0].tolist(), 1), True, lossy)
    values = ungrey(values)
    if values.dtype == np.uint8:
        all_counts = np.bincount(values.ravel())
        present = all_counts.nonzero()[0]
        counts = all_counts[present]
    else:
        present, counts = np.unique(values, return_counts=True)
    return MaskContent(size, dict(zip(present.tolist(), counts.tolist(), strict=True)), False, lossy)


def match_masks(images: Sequence[str], folder: str, others: str, mistakes: InvalidAnnotations) -> dict[str, str]:
    """Image to mask: of the same name below the other folder, or with a word after it (``x_mask.png``).

    Of two masks of one name that with the image's suffix is taken, but no JPEG if there is another, or else a PNG.
    Where both are in one folder, no image is its own mask, and no mask an image.
    """
    together = os.path.realpath(folder) == os.path.realpath(others)
    stems: dict[str, list[str]] = {}
    unread: Counter[str] = Counter()
    for path in list_images(others, unread):
        if not (together and path.lower().endswith(JPEG_SUFFIXES)):
            stems.setdefault(os.path.splitext(os.path.relpath(path, others))[0], []).append(path)
    if not together:
        mistakes.note_unread(others, unread)
    found: dict[str, str] = {}
    spare: dict[str, list[str]] = {}
    for path in images:
        stem = os.path.splitext(os.path.relpath(path, folder))[0]
        names = [stem + ending for ending in MASK_ENDINGS] + [stem.removesuffix("_leftImg8bit") + MASK_ENDINGS[-1]]
        same = ([mask for mask in stems.get(name, ()) if mask != path] for name in names)
        if some := next(filter(None, same), []):
            found[path], *spare[path] = sorted(some, key=functools.partial(_rank_mask, path))
    masks = set(found.values())
    found = {path: mask for path, mask in found.items() if path not in masks}
    for path in images:
        if path not in found and path not in masks:
            mistakes.add("images without a mask", path)
    for path, mask in found.items():
        for other in spare[path]:
            mistakes.add("images with two masks", f"{path}: {mask} is read, {other} is not")
    others_left = {path for paths in stems.values() for path in paths} - masks - set(images)
    for path in sorted(others_left.difference(*spare.values())):
        mistakes.add("masks without an image", path)
    return found


def _rank_mask(image: str, mask: str) -> tuple[bool, bool, bool, str]:
    """Among masks of one name the first is taken."""
    suffix = os.path.splitext(mask)[1].lower()
    return suffix in JPEG_SUFFIXES, suffix != os.path.splitext(image)[1].lower(), suffix != ".png", mask


def _find_problem(
    image: str, mask: str, look: MaskContent, table: LabelTable, classes: Mapping[int, int | None]
) -> tuple[str, str] | None:
    """The kind of mistake and what is wrong, if anything is."""
    try:
        size = read_size(image)
    except Exception as error:  # whatever Pillow meets
        check_lost(image, error)
        return "images that cannot be read", f"{image}: {reason_of(error)}"
    unknown = [value for value, number in classes.items() if number is None]
    if unknown:
        kind = "masks of labels that are no classes (--data.classes), nor ignored (--data.ignore)"
        return kind, f"{mask}: {table.explain(min(unknown), look.coloured)}"
    height, width = size
    if look.size != (height, width):
        turned = f": {_explain_swap(image)}" if look.size == (width, height) else ""
        return (
            "masks of another size than their image",
            f"{mask}: {look.size[1]}x{look.size[0]}, the image {width}x{height}{turned}",
        )
    return None


def _explain_swap(image: str) -> str:
    with open(image, "rb") as file:
        orientation = open_image(file, max_pixels=None).orientation
    turned = f", for EXIF turns the image (orientation {orientation})" if orientation in SWAPPED else ""
    return f"height and width are swapped{turned}"
