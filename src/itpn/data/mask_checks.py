"""Images with masks: checked, each mask is read once."""

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from itpn.data.bands import MARK, join_bands, name_image, split_bands
from itpn.data.class_names import Names, join_names
from itpn.data.decode import MAX_PIXELS, UnreadableImage, open_image, reason_of
from itpn.data.file_types import JPEG_SUFFIXES
from itpn.data.formats.arrays import Axes
from itpn.data.formats.reader import read_size
from itpn.data.grey_masks import explain_greys
from itpn.data.invalid import InvalidAnnotations
from itpn.data.mask_files import open_to_scan, split_rows
from itpn.data.masks import IGNORED, VOID, LabelTable, make_table, pack, read_values, ungrey
from itpn.data.orientation import SWAPPED
from itpn.data.readers import FileReader, PackedStrings, Reader, Subset, check_lost
from itpn.data.walk import list_images
from itpn.data.windows import Windows
from itpn.errors import UserError

MASK_ENDINGS = (
    "",
    "_mask",
    "_label",
    "_labels",
    "_seg",
    "_L",
    "_masks",
    "_cp_masks",
    "_gtFine_labelIds",
)  # after the image's name


@dataclass(frozen=True)
class LabelMaps:
    """Images in a fixed order, each with its mask.

    Attributes:
        files: the encoded images.
        masks: paths.
        table: the meaning of their labels.
        left_out: number of images that are left out because their mask is invalid.
    """

    files: Reader
    masks: PackedStrings
    table: LabelTable
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> tuple[str, bytes | UnreadableImage, str]:
        """Name, encoded image or the error of reading it, and path of the mask."""
        name, data = self.files[index]
        return name, data, self.masks[index]

    def name(self, index: int) -> str:
        return self.files.name(index)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.table.classes

    def rename(self, classes: Sequence[str]) -> "LabelMaps":
        """The same images with the class indices of another list of classes.

        Raises:
            UserError: a class is not in the list.
        """
        return replace(self, table=self.table.rename(classes))

    def cut(self, windows: Windows) -> "LabelMaps":
        """Windows of the images, each with the mask of the whole image."""
        return replace(
            self, files=windows, masks=PackedStrings([self.masks[index] for index in windows.places[:, 0].tolist()])
        )

    def take(self, indices: np.ndarray) -> "LabelMaps":
        """Some of the images."""
        return replace(
            self, files=Subset(self.files, indices), masks=PackedStrings([self.masks[index] for index in indices])
        )


@dataclass(frozen=True)
class MaskRules:
    """How masks are read, and what to do about invalid ones.

    Attributes:
        classes: a file with a class name, or ``NAME R G B``, a line; None for a file beside the images, or if there is
            none, for the labels themselves as names.
        reduce_zero_label: label 0 is ignored, and the first class is 1, as in ADE20K.
        ignore: labels that are ignored.
        on_invalid: see `itpn.tasks.configs.SegmentationDataConfig`.
        log: takes the summary of invalid masks, a line at a time.
        max_pixels: of a mask.
        bands: of images in one file a band, see `itpn.data.bands.join_bands`.
        axes: of arrays, see `itpn.data.formats.arrays.ArrayImage`.
        parts: masks of more pixels are allowed, for parts of them will be read, see `itpn.data.mask_files`.
    """

    classes: str | None = None
    reduce_zero_label: bool = False
    ignore: tuple[int, ...] = (255,)
    on_invalid: Literal["summary", "skip", "error"] = "summary"
    log: Callable[[str], None] = print
    max_pixels: int = MAX_PIXELS
    bands: tuple[str, ...] = ()
    axes: Axes | None = None
    parts: bool = False


class Pairs(NamedTuple):
    """The images of a split, their folder, the folder of their masks, and the unread files of the first folder."""

    images: list[str]
    folder: str
    masks: str
    unread: Counter[str]


@dataclass(frozen=True)
class MaskContent:
    """The content of a mask.

    Attributes:
        size: height, width.
        values: label -> number of pixels; of a colour mask, packed colour (see `itpn.data.masks.pack`) -> 1.
        coloured: whether it is a colour mask.
        lossy: name of the lossy compression that it has been through, if any.
    """

    size: tuple[int, int]
    values: Mapping[int, int]
    coloured: bool
    lossy: str = ""


def check_masks(pairs: Pairs, names: Names | LabelTable | None, rules: MaskRules) -> LabelMaps:
    """The images whose masks are valid. Every mask is read once.

    Raises:
        UserError: no mask is valid; or one is invalid, and that is an error.
    """
    images, folder, others, unread = pairs
    invalid = InvalidAnnotations()
    invalid.note_unread(folder, unread, [rules.classes] if rules.classes else ())
    if rules.bands:
        images, _ = join_bands(images, rules.bands, folder)
    masks = match_masks(images, folder, others, invalid)
    table = _start_table(names, others, rules)
    contents: dict[str, MaskContent] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        jobs = [(path, mask, pool.submit(scan_mask, mask, rules, table)) for path, mask in masks.items()]
        for path, mask, job in jobs:
            try:
                contents[path] = job.result()
            except UnreadableImage as error:
                invalid.add("masks that cannot be read", f"{mask}: {error}")
    if contents and not isinstance(names, LabelTable):
        plain = {masks[path]: content.values for path, content in contents.items() if not content.coloured}
        lossy = {masks[path]: content.lossy for path, content in contents.items() if content.lossy}
        table = _finish_table(table, plain, lossy, others, rules)
    present: set[int] = set()
    kept = []
    for path, content in contents.items():
        assert table is not None
        classes = {value: table.find(value, content.coloured) for value in content.values}
        problem = _find_problem(path, masks[path], content, table, classes, rules.axes)
        if problem is None:
            kept.append(path)
            present |= {index for index in classes.values() if index is not None}
        else:
            invalid.add(*problem)
    if not kept:
        raise invalid.explain_lack(folder, "images")
    invalid.report(others, rules.on_invalid, rules.log)
    assert table is not None
    if not present - {IGNORED}:
        raise UserError(f"no mask in {others} has a pixel of a class: see --data.ignore and --data.reduce-zero-label")
    if not isinstance(names, LabelTable):
        _log_labels(contents.values(), table, present, others, rules)
    return LabelMaps(FileReader(kept), PackedStrings([masks[path] for path in kept]), table, len(images) - len(kept))


def _log_labels(
    contents: Iterable[MaskContent], table: LabelTable, present: set[int], others: str, rules: MaskRules
) -> None:
    """Log what may be unintended: that label 255 is ignored, and classes that no mask has."""
    # in palettes that are read by colour, ignored labels are encoded above VOID
    numbers = {
        value - content.coloured * VOID
        for content in contents
        for value in content.values
        if value >= content.coloured * VOID
    }
    if IGNORED in numbers and numbers != {0, IGNORED} and table.indices[IGNORED] == IGNORED:
        rules.log(f"{others}: pixels of label 255 are ignored (--data.ignore)")
    absent = [name for number, name in enumerate(table.classes) if number not in present]
    if absent and rules.on_invalid == "summary":
        reason = "; label 0 is ignored (--data.reduce-zero-label)" if rules.reduce_zero_label else ""
        rules.log(f"{others}: no mask has {join_names(absent)}{reason}")


def _start_table(names: Names | LabelTable | None, others: str, rules: MaskRules) -> LabelTable | None:
    """The table of labels, if class names are known; None otherwise.

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
    """The table of labels of a set of masks.

    Args:
        masks: path -> label -> number of pixels, of masks that are not in colour.
        lossy: path -> compression, as of `MaskContent`.

    Raises:
        UserError: labels above 254, shades of grey in place of class indices, or fewer than two classes.
    """
    numbers = set().union(*masks.values())
    if table is None:  # no names: classes are the labels that occur
        _refuse_greys(masks, lossy, others, rules)
        largest = max(numbers - set(rules.ignore), default=0)
        if numbers == {0, 255}:
            largest = 1
        if largest >= IGNORED:
            example = next(mask for mask, values in masks.items() if largest in values)
            raise UserError(f"label {largest} in {example}: labels end at 254, except those of --data.ignore")
        names = [(str(number), None) for number in range(int(rules.reduce_zero_label), largest + 1)]
        table = _start_table(names, others, rules)
        assert table is not None
    greys = table.read_greys(numbers)
    if greys is None:
        if numbers == {0, 255} and table.indices[255] == IGNORED:
            rules.log(f"{others}: masks of 0 and 255, but not of two classes: 255 is ignored (--data.ignore)")
        return table
    if table.by_colour is None:
        rules.log(f"{others}: black and white masks, of {table.classes[0]} and {table.classes[1]}")
    return greys


def _refuse_greys(
    masks: Mapping[str, Mapping[int, int]], lossy: Mapping[str, str], others: str, rules: MaskRules
) -> None:
    """Raise :class:`UserError` if labels look like grey levels."""
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


def scan_mask(path: str, rules: MaskRules, table: LabelTable | None) -> MaskContent:
    """Read the size and content of a mask.

    Raises:
        UnreadableImage: it cannot be read, or is in colour and the table has no colours.
    """
    file = open_to_scan(path, rules.max_pixels, rules.parts)
    occurs, counts = np.zeros(VOID + 256, dtype=bool), Counter[int]()
    coloured = False
    for window in split_rows(file):
        values = read_values(file, table, window)
        coloured = values.ndim == 3 and table is not None and table.by_colour is not None
        if coloured:
            occurs[pack(values)] = True
            continue
        values = ungrey(values)
        if values.dtype == np.uint8:
            all_counts = np.bincount(values.ravel(), minlength=256)
            present = all_counts.nonzero()[0]
            found = all_counts[present]
        else:
            present, found = np.unique(values, return_counts=True)
        counts.update(dict(zip(present.tolist(), found.tolist(), strict=True)))
    content = dict.fromkeys(occurs.nonzero()[0].tolist(), 1) if coloured else dict(sorted(counts.items()))
    return MaskContent((file.height, file.width), content, coloured, file.lossy)


def match_masks(images: Sequence[str], folder: str, others: str, invalid: InvalidAnnotations) -> dict[str, str]:
    """Match images to masks of the same name below the other folder, or of that name and a word (``x_mask.png``).

    Of several masks of one name, the first of these is read: not a JPEG, of the image's suffix, a PNG. If images and
    masks are in one folder, an image is not its own mask, and a mask is not an image.

    Returns:
        image -> mask.
    """
    together = os.path.realpath(folder) == os.path.realpath(others)
    stems: dict[str, list[str]] = {}
    unread: Counter[str] = Counter()
    for path in list_images(others, unread):
        if not (together and path.lower().endswith(JPEG_SUFFIXES)):
            stems.setdefault(_find_stem(path, others), []).append(path)
    if not together:
        invalid.note_unread(others, unread)
    found: dict[str, str] = {}
    spare: dict[str, list[str]] = {}
    for path in images:
        stem = _find_stem(path, folder)
        names = [stem + ending for ending in MASK_ENDINGS] + [stem.removesuffix("_leftImg8bit") + MASK_ENDINGS[-1]]
        same = ([mask for mask in stems.get(name, ()) if mask != path] for name in names)
        if some := next(filter(None, same), []):
            found[path], *spare[path] = sorted(some, key=functools.partial(_rank_mask, path))
    masks = set(found.values())
    found = {path: mask for path, mask in found.items() if path not in masks}
    for path in images:
        if path not in found and path not in masks:
            invalid.add("images without a mask", name_image(path))
    for path, mask in found.items():
        for other in spare[path]:
            invalid.add("images with two masks", f"{name_image(path)}: {mask} is read, {other} is not")
    others_left = {path for paths in stems.values() for path in paths} - masks - set(images)
    for path in sorted(others_left.difference(*spare.values())):
        invalid.add("masks without an image", path)
    return found


def _find_stem(path: str, folder: str) -> str:
    """The path below a folder without its suffix, which may be .ome.tif."""
    if MARK in path:
        return os.path.relpath(name_image(path), folder)
    stem = os.path.splitext(os.path.relpath(path, folder))[0]
    return stem[:-4] if stem.lower().endswith(".ome") else stem


def _rank_mask(image: str, mask: str) -> tuple[bool, bool, bool, str]:
    """Sort key of masks of one name, of which the first is read."""
    suffix = os.path.splitext(mask)[1].lower()
    return suffix in JPEG_SUFFIXES, suffix != os.path.splitext(image)[1].lower(), suffix != ".png", mask


def _find_problem(
    image: str,
    mask: str,
    content: MaskContent,
    table: LabelTable,
    classes: Mapping[int, int | None],
    axes: Axes | None,
) -> tuple[str, str] | None:
    """The kind of problem and an example of it; None for a valid mask."""
    try:
        size = read_size(first := split_bands(image)[0], axes)
    except Exception as error:  # Pillow raises many types
        check_lost(image, error)
        return "images that cannot be read", f"{name_image(image)}: {reason_of(error)}"
    unknown = [value for value, index in classes.items() if index is None]
    if unknown:
        kind = "masks of labels that are neither classes (--data.classes) nor ignored (--data.ignore)"
        return kind, f"{mask}: {table.explain(min(unknown), content.coloured)}"
    return find_size_problem(first, size, mask, content.size)


def find_size_problem(
    image: str, size: tuple[int, int], mask: str, mask_size: tuple[int, int]
) -> tuple[str, str] | None:
    """The kind of problem and an example of it, for a mask of another size (height, width) than its image."""
    if mask_size == size:
        return None
    (height, width), swap = size, ""
    if mask_size == (width, height):
        swap = ": height and width are swapped"
        with suppress(UnreadableImage), open(image, "rb") as file:
            opened = open_image(file, max_pixels=None)
            if opened.orientation in SWAPPED:
                swap += f", because EXIF rotates the image (orientation {opened.orientation})"
    return (
        "masks of another size than their image",
        f"{mask}: {mask_size[1]}x{mask_size[0]}, the image {width}x{height}{swap}",
    )
