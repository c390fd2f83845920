"""Images with a class for each pixel: where the images and their masks are."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from itpn.data.class_names import Names, read_names
from itpn.data.file_types import describe_file, is_shard
from itpn.data.mask_checks import LabelMaps, MaskRules, Pairs, check_masks
from itpn.data.readers import draw_order
from itpn.data.splits import SPLITS, split_of
from itpn.data.walk import MASK_FOLDERS, list_images, split_places, walk
from itpn.errors import UserError

LAYOUTS = (
    "give a folder with images and annotations (or masks), each with training and validation inside, or --data.root "
    "IMAGES --data.masks MASKS"
)


def find_label_maps(
    root: str,
    masks: str | None = None,
    val_root: str | None = None,
    val_masks: str | None = None,
    *,
    rules: MaskRules,
    val_fraction: float = 0.0,
    seed: int = 0,
) -> tuple[LabelMaps, LabelMaps | None]:
    """Find and check the training and the validation images, with the same classes.

    Args:
        root: a folder of ADE20K's layout (``images/training``, ``annotations/training``), one that has ``images`` and
            ``masks`` alone, a folder for each split with these inside, or, with ``masks``, a folder of images.
        masks: the folder of their masks, of the same names.
        val_fraction: fraction of the images that is held out if there are no validation images.

    Returns:
        The training images; the validation images, or None if there are none.

    Raises:
        UserError: no known layout, fewer than two classes, or an invalid mask if it is an error.
    """
    pairs = find_pairs(root, masks, "train")
    if pairs is None:
        raise UserError(f"no images with masks to train on in {root}: {LAYOUTS}")
    train = check_masks(pairs, read_names(rules.classes, root, int(rules.reduce_zero_label)), rules)
    val = find_to_evaluate(root, masks, val_root, val_masks)
    if val is not None and val[0] != pairs[0]:
        return train, check_masks(val, train.table, replace(rules, parts=True))  # large images are cut into tiles
    count = min(max(1, round(val_fraction * len(train))), len(train) - 1) if val_fraction else 0
    if not count:
        return train, None
    order = draw_order(train, seed)
    return train.take(np.sort(order[count:])), train.take(np.sort(order[:count]))


def read_to_evaluate(
    root: str,
    masks: str | None,
    val_root: str | None,
    val_masks: str | None,
    *,
    rules: MaskRules,
    val_fraction: float = 0.0,
    seed: int = 0,
    names: Names | None = None,
) -> tuple[LabelMaps, bool]:
    """The images to evaluate a model on: the validation split; in a folder without splits, all or those held out.

    Args:
        names: of the labels, if there is no file of names.

    Returns:
        The images, and whether they were held out.

    Raises:
        UserError: as of :func:`find_label_maps`.
    """
    pairs = find_to_evaluate(root, masks, val_root, val_masks)
    own = find_pairs(root, masks, "train") if pairs is None or val_fraction else None
    pairs = pairs or own
    if val_fraction and own is not None and pairs == own:
        _, held_out = find_label_maps(root, masks, rules=rules, val_fraction=val_fraction, seed=seed)
        if held_out is not None:
            return held_out, True
    if pairs is None:
        raise UserError(f"no images with masks to evaluate on in {root}: {LAYOUTS}")
    own_names = read_names(rules.classes, val_root or root, int(rules.reduce_zero_label))
    return check_masks(pairs, own_names or names, replace(rules, parts=True)), False


def find_to_evaluate(root: str, masks: str | None, val_root: str | None, val_masks: str | None) -> "Pairs | None":
    """Images to evaluate on and their masks: those of ``val_root``, or else the split ``val`` of ``root``.

    Returns:
        None if ``root`` has no such split.

    Raises:
        UserError: ``val_root`` has no images with masks.
    """
    if val_root is None:
        return find_pairs(root, masks, "val")
    pairs = find_pairs(val_root, val_masks, "val")
    if pairs is None:
        raise UserError(f"no images with masks to evaluate on in {val_root}: {LAYOUTS}")
    return pairs


def find_pairs(root: str, masks: str | None, split: str) -> Pairs | None:
    """The images of a split and their masks; None if there is no such split."""
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
    """The folder of masks beside that of images; if there are several, the first that has images in it."""
    places = [place for name in MASK_FOLDERS if (place := folder / name).is_dir()]
    filled = (place for place in places if not all(map(is_shard, walk(str(place)))))
    return next(filled, places[0] if places else folder / MASK_FOLDERS[0])
