"""Images with a class for each pixel: where they are, the mistakes in their masks, both on their way to a network."""

import functools
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import crop, pad, resize

from itpn.data.decode import MAX_PIXELS, EncodedImage, UnreadableImage, decode_whole, open_image, read_size, reason_of
from itpn.data.files import (
    JPEG_SUFFIXES,
    MASK_FOLDERS,
    SPLITS,
    describe_file,
    is_image,
    list_images,
    split_places,
    walk,
)
from itpn.data.labelled import join_names
from itpn.data.layouts import Mistakes
from itpn.data.masks import (
    IGNORED,
    VOID,
    Colour,
    LabelTable,
    Names,
    explain_greys,
    make_table,
    pack,
    read_lossy_mask,
    read_names,
    ungrey,
)
from itpn.data.orientation import SWAPPED
from itpn.data.readers import FileReader, PackedStrings, Reader, Subset, check_lost
from itpn.data.splits import split_of
from itpn.errors import UserError
from itpn.geometry import fit_sides
from itpn.seeding import derive_seed

MASK_ENDINGS = ("", "_mask", "_label", "_labels", "_seg", "_L", "_gtFine_labelIds")  # after the image's name
CROP_TRIES = 10
LAYOUTS = (
    "give a folder with images and annotations (or masks), each with training and validation inside, or --data.root "
    "IMAGES --data.masks MASKS"
)


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


# --- where they are


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


def find_label_maps(
    root: str,
    masks: str | None = None,
    val_root: str | None = None,
    val_masks: str | None = None,
    *,
    rules: MaskRules,
    val_share: float = 0.0,
    seed: int = 0,
) -> tuple[LabelMaps, LabelMaps | None]:
    """Find the images to train on and those to evaluate on, checked, with the same classes.

    Args:
        root: a folder of ADE20K's layout (``images/training``, ``annotations/training``), one that has ``images`` and
            ``masks`` alone, a folder for each set with these inside, or, with ``masks``, a folder of images.
        masks: the folder of their masks, of the same names.
        val_share: share of the images that is held out where there are none to evaluate on.

    Returns:
        The second is None where there are none, and none are held out.

    Raises:
        UserError: nothing of a known layout, fewer than two classes, or a mistake if it is an error.
    """
    pairs = find_pairs(root, masks, "train")
    if pairs is None:
        raise UserError(f"no images with masks to train on in {root}: {LAYOUTS}")
    train = check(pairs, read_names(rules.classes, root, int(rules.reduce_zero_label)), rules)
    val = find_to_evaluate(root, masks, val_root, val_masks)
    if val is not None and val[0] != pairs[0]:
        return train, check(val, train.table, rules)
    count = min(max(1, round(val_share * len(train))), len(train) - 1) if val_share else 0
    if not count:
        return train, None
    order = np.argsort([derive_seed(seed, "share", os.path.basename(train.name(i))) for i in range(len(train))])
    return train.take(np.sort(order[count:])), train.take(np.sort(order[:count]))


def read_to_evaluate(
    root: str,
    masks: str | None,
    val_root: str | None,
    val_masks: str | None,
    *,
    rules: MaskRules,
    val_share: float = 0.0,
    seed: int = 0,
    names: Names | None = None,
) -> tuple[LabelMaps, bool]:
    """The images to evaluate a finished model on: of a folder with one set alone, that, or what is held out of it.

    Args:
        names: of the labels, where no file says them.

    Returns:
        The images, and whether they were held out.

    Raises:
        UserError: as of :func:`find_label_maps`.
    """
    pairs = find_to_evaluate(root, masks, val_root, val_masks)
    own = find_pairs(root, masks, "train") if pairs is None or val_share else None
    pairs = pairs or own
    if val_share and own is not None and pairs == own:
        _, held_out = find_label_maps(root, masks, rules=rules, val_share=val_share, seed=seed)
        if held_out is not None:
            return held_out, True
    if pairs is None:
        raise UserError(f"no images with masks to evaluate on in {root}: {LAYOUTS}")
    own_names = read_names(rules.classes, val_root or root, int(rules.reduce_zero_label))
    return check(pairs, own_names or names, rules), False


def find_to_evaluate(root: str, masks: str | None, val_root: str | None, val_masks: str | None) -> "Pairs | None":
    if val_root is None:
        return find_pairs(root, masks, "val")
    pairs = find_pairs(val_root, val_masks, "val")
    if pairs is None:
        raise UserError(f"no images with masks to evaluate on in {val_root}: {LAYOUTS}")
    return pairs


class Pairs(NamedTuple):
    """The images of a set, the folder that they are in, the folder of their masks, and the other files of the first."""

    images: list[str]
    folder: str
    masks: str
    unread: Counter[str]


def find_pairs(root: str, masks: str | None, split: str) -> Pairs | None:
    """The images of a set and where their masks are; None where there is no such set."""
    if not root:
        raise UserError(f"--data.root is an empty name: {LAYOUTS}")
    folder = Path(root)
    if not folder.is_dir():
        what = f"is not a folder{describe_file(root)}" if folder.exists() else "does not exist: give a folder"
        raise UserError(f"{root} {what}")
    if masks is not None:
        if not os.path.isdir(masks):
            raise UserError(f"{masks} is not a folder of masks")
        places = [(place, Path(masks) / place.name) for word in SPLITS[split] for place in split_places(folder, word)]
        places.append((folder, Path(masks)))
    else:
        others = _find_masks(folder)
        places = [
            (place, others / place.name) for word in SPLITS[split] for place in split_places(folder / "images", word)
        ]
        places += [
            (place / "images", _find_masks(place)) for word in SPLITS[split] for place in split_places(folder, word)
        ]
        places.append((folder / "images", others))
    for images, others in places:
        divided = images.is_dir() and any(split_of(entry.name) for entry in images.iterdir() if entry.is_dir())
        if images.is_dir() and others.is_dir() and not divided:
            unread: Counter[str] = Counter()
            return Pairs(sorted(list_images(str(images), unread)), str(images), str(others), unread)
    return None


def _find_masks(folder: Path) -> Path:
    """Beside the images of a folder, by whichever name; one with pictures, if there is one."""
    places = [place for name in MASK_FOLDERS if (place := folder / name).is_dir()]
    drawn = (place for place in places if any(is_image(path) for path in walk(str(place))))
    return next(drawn, places[0] if places else folder / MASK_FOLDERS[0])


# --- mistakes


@dataclass(frozen=True)
class Look:
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


def check(pairs: Pairs, names: Names | LabelTable | None, rules: MaskRules) -> LabelMaps:
    """The images whose masks can be used, every one of which is read, once.

    Raises:
        UserError: none can be; or a mistake if it is an error.
    """
    images, folder, others, unread = pairs
    found = Mistakes()
    found.note_unread(folder, unread, [rules.classes] if rules.classes else ())
    masks = match_masks(images, folder, others, found)
    table = _start_table(names, others, rules)
    looks: dict[str, Look] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        jobs = [(path, mask, pool.submit(look_at, mask, rules.max_pixels, table)) for path, mask in masks.items()]
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
        mistake = _find_mistake(path, masks[path], look, table, classes)
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
        _tell_labels(looks.values(), table, present, others, rules)
    return LabelMaps(FileReader(kept), PackedStrings([masks[path] for path in kept]), table, len(images) - len(kept))


def _tell_labels(looks: Iterable[Look], table: LabelTable, present: set[int], others: str, rules: MaskRules) -> None:
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
    """What a set of masks means; ``masks`` are those of numbers, which, and of how many pixels; ``lossy`` as in `Look`.

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


def look_at(path: str, max_pixels: int, table: LabelTable | None) -> Look:
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
        return Look(size, dict.fromkeys(seen.nonzero()[0].tolist(), 1), True, lossy)
    values = ungrey(values)
    if values.dtype == np.uint8:
        all_counts = np.bincount(values.ravel())
        present = all_counts.nonzero()[0]
        counts = all_counts[present]
    else:
        present, counts = np.unique(values, return_counts=True)
    return Look(size, dict(zip(present.tolist(), counts.tolist(), strict=True)), False, lossy)


def match_masks(images: Sequence[str], folder: str, others: str, mistakes: Mistakes) -> dict[str, str]:
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


def _find_mistake(
    image: str, mask: str, look: Look, table: LabelTable, classes: Mapping[int, int | None]
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


# --- augmentation: the mask goes where the pixels go


class PhotometricDistort(v2.RandomPhotometricDistort):
    """Brightness, contrast, saturation and hue; torchvision's swaps channels as well, so that skies turn red."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {**super().make_params(flat_inputs), "channel_permutation": None}


DISTORT = PhotometricDistort(hue=(-0.1, 0.1))


@dataclass(frozen=True)
class SegmentationTransform:
    """Random scale, crop, mirror image and colours, as mmsegmentation has them for ADE20K.

    Args:
        table: what masks mean.
        size: side of the crops in pixels.
        short: short side that an image of scale 1 has.
        scales: smallest and largest scale.
        max_share: of a crop that may be of one class; after ten tries it may be more.
        hflip: probability of a mirror image.
        photometric: change brightness, contrast, saturation and hue.
        interpolation: "bicubic" or "bilinear", always with antialiasing.
        fill: colour beside images that are smaller than a crop.
        max_pixels: of a mask.
    """

    table: LabelTable
    size: int = 512
    short: int = 512
    scales: tuple[float, float] = (0.5, 2.0)
    max_share: float = 0.75
    hflip: float = 0.5
    photometric: bool = True
    interpolation: str = "bilinear"
    fill: Colour = (124, 116, 104)
    max_pixels: int = MAX_PIXELS

    def __call__(self, image: EncodedImage | Tensor, rng: random.Random, mask: str) -> dict[str, Any]:
        """Augment one image, encoded or uint8 [3, H, W], with its mask, given by its path.

        Returns:
            "image" uint8 [3, size, size] and "target" uint8 [size, size].

        Raises:
            UnreadableImage: the mask cannot be read, or is of another size.
        """
        image = decode_whole(image)
        picture, labels = self._resize(image, view_labels(image, self.table, mask, self.max_pixels), rng)
        picture, labels = self._crop(picture, labels, rng)
        right, below = self.size - labels.shape[-1], self.size - labels.shape[-2]
        if rng.random() < self.hflip:
            picture, labels = picture.flip(-1), labels.flip(-1)
        if self.photometric:
            # torchvision draws from the global generator, which stays as it was
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(rng.getrandbits(63))
                picture = DISTORT(picture)
        picture = pad(picture, [0, 0, right, below], fill=list(self.fill))
        labels = pad(labels, [0, 0, right, below], fill=IGNORED)
        return {"image": picture.contiguous(), "target": labels[0]}

    def _resize(self, image: Tensor, labels: Tensor, rng: random.Random) -> tuple[Tensor, Tensor]:
        short = rng.uniform(*self.scales) * self.short
        sides = fit_sides(image.shape[-2:], short, 4 * short)
        mode = v2.InterpolationMode(self.interpolation)
        # the pixel that is nearest to the middle; a mask of torchvision's would get the one before it
        nearest = resize(labels[None], sides, v2.InterpolationMode.NEAREST_EXACT)
        return resize(image, sides, mode, antialias=True), nearest

    def _crop(self, image: Tensor, labels: Tensor, rng: random.Random) -> tuple[Tensor, Tensor]:
        height, width = image.shape[-2:]
        rows, columns = min(self.size, height), min(self.size, width)
        for _ in range(CROP_TRIES if self.max_share < 1 else 1):
            top, left = rng.randint(0, height - rows), rng.randint(0, width - columns)
            part = crop(labels, top, left, rows, columns)
            counts = part.flatten().bincount(minlength=IGNORED + 1)[:IGNORED]
            if len(counts.nonzero()) > 1 and counts.max() < self.max_share * counts.sum():
                break
        return crop(image, top, left, rows, columns), part


def view_labels(image: Tensor, table: LabelTable, mask: str, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The mask of an image, uint8 [H, W].

    Raises:
        UnreadableImage: it cannot be read, or is of another size.
    """
    labels = table.read(mask, max_pixels)
    if labels.shape != image.shape[-2:]:
        raise UnreadableImage(
            f"{image.shape[-1]}x{image.shape[-2]} pixels, and {labels.shape[1]}x{labels.shape[0]} in {mask}"
        )
    return labels
