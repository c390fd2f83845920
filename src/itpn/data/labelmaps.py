"""Images with a class for each pixel: where they are, the mistakes in their masks, both on their way to a network."""

import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import crop, pad, resize

from itpn.data.decode import MAX_PIXELS, UnreadableImage, reason_of
from itpn.data.files import is_image, walk
from itpn.data.labelled import SPLITS
from itpn.data.layouts import Mistakes, read_size
from itpn.data.masks import (
    IGNORED,
    Colour,
    LabelTable,
    make_table,
    read_mask,
    read_names,
    ungrey,
)
from itpn.data.readers import FileReader, PackedStrings, Reader, Subset
from itpn.errors import UserError
from itpn.models.detector import fit_sides
from itpn.seeding import derive_seed

MASK_FOLDERS = ("annotations", "masks", "labels")
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
    """

    files: Reader
    masks: PackedStrings
    table: LabelTable

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
    """

    classes: str | None = None
    reduce_zero_label: bool = False
    ignore: tuple[int, ...] = (255,)
    mistakes: Literal["summary", "skip", "error"] = "summary"
    tell: Callable[[str], None] = print


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
    train = check(pairs, read_names(rules.classes, root), rules)
    val = find_to_evaluate(root, masks, val_root, val_masks)
    if val is not None and val[0] != pairs[0]:
        return train, check(val, train.table, rules)
    if not val_share:
        return train, None
    order = np.argsort([derive_seed(seed, "share", os.path.basename(train.name(i))) for i in range(len(train))])
    count = min(max(1, round(val_share * len(train))), len(train) - 1)
    return train.take(np.sort(order[count:])), train.take(np.sort(order[:count]))


def read_to_evaluate(
    root: str, masks: str | None, val_root: str | None, val_masks: str | None, rules: MaskRules
) -> LabelMaps:
    """The images to evaluate a finished model on: of a folder with one set alone, that.

    Raises:
        UserError: as of :func:`find_label_maps`.
    """
    pairs = find_to_evaluate(root, masks, val_root, val_masks) or find_pairs(root, masks, "train")
    if pairs is None:
        raise UserError(f"no images with masks to evaluate on in {root}: {LAYOUTS}")
    return check(pairs, read_names(rules.classes, val_root or root), rules)


def find_to_evaluate(root: str, masks: str | None, val_root: str | None, val_masks: str | None) -> "Pairs | None":
    if val_root is None:
        return find_pairs(root, masks, "val")
    pairs = find_pairs(val_root, val_masks, "val")
    if pairs is None:
        raise UserError(f"no images with masks to evaluate on in {val_root}: {LAYOUTS}")
    return pairs


Pairs = tuple[list[str], str, str]  # images, the folder that they are in, the folder of their masks


def find_pairs(root: str, masks: str | None, split: str) -> Pairs | None:
    """The images of a set and where their masks are; None where there is no such set."""
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"{root} is not a folder" if folder.exists() else f"{root} does not exist: give a folder")
    if masks is not None:
        if not os.path.isdir(masks):
            raise UserError(f"{masks} is not a folder of masks")
        places = [(folder / word, Path(masks) / word) for word in SPLITS[split]] + [(folder, Path(masks))]
    else:
        others = _find_masks(folder)
        places = [(folder / "images" / word, others / word) for word in SPLITS[split]]
        places += [(folder / word / "images", _find_masks(folder / word)) for word in SPLITS[split]]
        places.append((folder / "images", others))
    words = {word for split in SPLITS.values() for word in split}
    for images, others in places:
        divided = images.is_dir() and words & {entry.name for entry in images.iterdir() if entry.is_dir()}
        if images.is_dir() and others.is_dir() and not divided:
            return sorted(path for path in walk(str(images)) if is_image(path)), str(images), str(others)
    return None


def _find_masks(folder: Path) -> Path:
    """Beside the images of a folder, by whichever name."""
    places = [folder / name for name in MASK_FOLDERS]
    return next((place for place in places if place.is_dir()), places[0])


# --- mistakes


def check(pairs: Pairs, names: Sequence[tuple[str, Colour | None]] | LabelTable | None, rules: MaskRules) -> LabelMaps:
    """The images whose masks can be used, every one of which is read.

    Raises:
        UserError: none can be; or a mistake if it is an error.
    """
    images, folder, others = pairs
    found = Mistakes()
    masks = match_masks(images, folder, others, found)
    paths = [path for path in images if path in masks]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        if names is None:  # classes are the numbers that there are
            largest = max(
                pool.map(_largest_label, [masks[path] for path in paths], [set(rules.ignore)] * len(paths)), default=0
            )
            names = [(str(number), None) for number in range(int(rules.reduce_zero_label), largest + 1)]
        table = names if isinstance(names, LabelTable) else make_table(names, rules.reduce_zero_label, rules.ignore)
        wrong = pool.map(_check_pair, paths, [masks[path] for path in paths], [table] * len(paths))
        kept = []
        for path, mistake in zip(paths, wrong, strict=True):
            if mistake is None:
                kept.append(path)
            else:
                found.add(*mistake)
    found.report(others, rules.mistakes, rules.tell)
    if not kept:
        raise UserError(f"{folder} has no images" + (f" that can be used: {found.lines()[0]}" if found.counts else ""))
    return LabelMaps(FileReader(kept), PackedStrings([masks[path] for path in kept]), table)


def match_masks(images: Sequence[str], folder: str, others: str, mistakes: Mistakes) -> dict[str, str]:
    """Image to mask: of the same name below the other folder, or with a word after it (``x_mask.png``)."""
    stems = {os.path.splitext(os.path.relpath(path, others))[0]: path for path in walk(others) if is_image(path)}
    found: dict[str, str] = {}
    for path in images:
        stem = os.path.splitext(os.path.relpath(path, folder))[0]
        names = [stem + ending for ending in MASK_ENDINGS] + [stem.removesuffix("_leftImg8bit") + MASK_ENDINGS[-1]]
        mask = next((stems[name] for name in names if name in stems), None)
        if mask is None:
            mistakes.add("images without a mask", path)
        else:
            found[path] = mask
    for path in sorted(set(stems.values()) - set(found.values())):
        mistakes.add("masks without an image", path)
    return found


def _largest_label(path: str, ignored: set[int]) -> int:
    try:
        present = np.unique(ungrey(read_mask(path)))
    except UnreadableImage:
        return 0  # which is told of later
    return max((int(value) for value in present if int(value) not in ignored), default=0)


def _check_pair(image: str, mask: str, table: LabelTable) -> tuple[str, str] | None:
    """The kind of mistake and what is wrong, if anything is."""
    try:
        height, width = read_size(image)
    except Exception as error:  # whatever Pillow meets
        return "images that cannot be read", f"{image}: {reason_of(error)}"
    try:
        labels = table.read(mask)
    except UnreadableImage as error:
        kind = "masks of labels that no class has" if "no class has" in str(error) else "masks that cannot be read"
        return kind, f"{mask}: {error}"
    if labels.shape != (height, width):
        return (
            "masks of another size than their image",
            f"{mask}: {labels.shape[1]}x{labels.shape[0]}, {width}x{height}",
        )
    return None


# --- augmentation: the mask goes where the pixels go


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

    def __call__(self, image: Tensor, rng: random.Random, mask: str) -> dict[str, Any]:
        """uint8 [3, H, W] and the path of its mask -> "image" uint8 [3, size, size], "target" uint8 [size, size].

        Raises:
            UnreadableImage: the mask cannot be read, or is of another size.
        """
        picture, labels = self._resize(
            tv_tensors.Image(image), view_labels(image, self.table, mask, self.max_pixels), rng
        )
        picture, labels = self._crop(picture, labels, rng)
        if rng.random() < self.hflip:
            picture, labels = picture.flip(-1), labels.flip(-1)
        if self.photometric:
            # torchvision draws from the global generator, which stays as it was
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(rng.getrandbits(63))
                picture = v2.RandomPhotometricDistort()(picture)
        return {"image": picture.as_subclass(Tensor).contiguous(), "target": labels.as_subclass(Tensor).contiguous()}

    def _resize(self, image: Tensor, labels: Tensor, rng: random.Random) -> tuple[Tensor, Tensor]:
        short = rng.uniform(*self.scales) * self.short
        sides = fit_sides(image.shape[-2:], short, 4 * short)
        mode = v2.InterpolationMode(self.interpolation)
        return resize(image, sides, mode, antialias=True), resize(labels, sides)

    def _crop(self, image: Tensor, labels: Tensor, rng: random.Random) -> tuple[Tensor, Tensor]:
        height, width = image.shape[-2:]
        right, below = max(0, self.size - width), max(0, self.size - height)
        if right or below:
            image = pad(image, [0, 0, right, below], fill=list(self.fill))
            labels = pad(labels, [0, 0, right, below], fill=IGNORED)
        height, width = image.shape[-2:]
        for _ in range(CROP_TRIES):
            top, left = rng.randint(0, height - self.size), rng.randint(0, width - self.size)
            part = crop(labels, top, left, self.size, self.size)
            counts = part.flatten().bincount(minlength=IGNORED + 1)[:IGNORED]
            if len(counts.nonzero()) > 1 and counts.max() < self.max_share * counts.sum():
                break
        return crop(image, top, left, self.size, self.size), part


def view_labels(image: Tensor, table: LabelTable, mask: str, max_pixels: int = MAX_PIXELS) -> tv_tensors.Mask:
    """The mask of an image, uint8 [H, W].

    Raises:
        UnreadableImage: it cannot be read, or is of another size.
    """
    labels = table.read(mask, max_pixels)
    if labels.shape != image.shape[-2:]:
        raise UnreadableImage(
            f"{image.shape[-1]}x{image.shape[-2]} pixels, and {labels.shape[1]}x{labels.shape[0]} in {mask}"
        )
    return tv_tensors.Mask(labels)
