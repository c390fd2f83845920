"""What a data root holds: image files in any tree, or tar shards. Standard library only, so that it is quick."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from itpn.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
CACHE_INDEX = "itpn-features.json"  # in a folder written by `itpn cache-features`
SHRINK_INDEX = "itpn-shrink.json"  # in one written by `itpn shrink`
# by name; a test set is for the end, and taken for evaluation only where there is nothing else
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}


@dataclass(frozen=True)
class ImageSource:
    """Images to read, in a fixed order: single files, or tar shards, or a cache of crops and a teacher's features.

    Only one of the three is not empty.

    Paths are strings: a million `Path` objects would take half a gigabyte.
    """

    images: tuple[str, ...] = ()
    shards: tuple[str, ...] = ()
    cache: str = ""
    roots: tuple[str, ...] = field(default=(), compare=False)  # where they were looked for


def find_images(roots: Sequence[Path | str]) -> ImageSource:
    """Find the images, or else the tar shards, under some folders; a root may also be one image or one shard.

    Folders are searched at any depth and links to folders are followed, each folder once. Hidden files and
    folders are passed over, and so is everything that is neither image nor shard. The order is that of the
    roots, then of the names, on every file system.

    Raises:
        UserError: a root is missing, unreadable or holds nothing of use, or some hold images and others shards.
    """
    images: dict[str, None] = {}  # an ordered set: roots may overlap
    shards: dict[str, None] = {}
    names = [os.fspath(root) for root in roots]
    caches = [name for name in names if os.path.isfile(os.path.join(name, CACHE_INDEX))]
    if caches and len(names) > 1:
        raise UserError(f"{caches[0]} holds cached features: give it as the only data root")
    if caches:
        return ImageSource(cache=caches[0], roots=tuple(names))
    for root in names:
        if os.path.isdir(root):
            _check_complete(root)
            found = list(walk(root))
            images_here = [path for path in found if is_image(path)]
            images.update(dict.fromkeys(images_here))
            if not images_here:
                shards.update(dict.fromkeys(found))
        elif not os.path.exists(root):
            raise UserError(f"{root} does not exist: give a folder of images, or tar shards")
        elif is_image(root):
            images[root] = None
        elif is_shard(root):
            shards[root] = None
        else:
            raise UserError(f"{root} is neither a folder, an image nor a tar shard")
    if images and shards:
        raise UserError(
            f"both images ({next(iter(images))}) and tar shards ({next(iter(shards))}) were given: choose one kind"
        )
    if not images and not shards:
        where = ", ".join(names) or "an empty list of data roots"
        raise UserError(f"no images in {where} (looked for {' '.join(IMAGE_SUFFIXES)} and .tar shards)")
    return ImageSource(tuple(images), tuple(shards), roots=tuple(names))


def _check_complete(root: str) -> None:
    """Refuse what a stopped `itpn shrink` has left: a folder, or a split in it."""
    for folder in (root, os.path.dirname(os.path.abspath(root))):
        try:
            index = json.loads(Path(folder, SHRINK_INDEX).read_text())
        except (OSError, ValueError):
            continue
        if not index.get("complete"):
            raise UserError(f"{folder} is not complete: repeat the `itpn shrink` that writes it, or remove it")


def find_training_images(roots: Sequence[Path | str]) -> ImageSource:
    """As `find_images`, but of a folder with a `train` folder in it that one alone: evaluation sets stay unseen."""
    trains = [os.path.join(root, "train") for root in roots]
    return find_images([train if os.path.isdir(train) else root for train, root in zip(trains, roots, strict=True)])


def find_splits(roots: Sequence[str]) -> dict[str, ImageSource]:
    """As `find_images`, but what is for training apart from what is for evaluation, where the names say which is which.

    Returns:
        By name of the split (see `SPLITS`) what is called so in the roots, and nothing of what lies beside; where
        nothing is called train, one source of everything under the name "".

    Raises:
        UserError: as `find_images`; or the roots or the splits are not of one kind.
    """
    splits = {word: [list_split(root, word) for root in roots] for words in SPLITS.values() for word in words}
    for root in roots:
        own = sorted(entry.name for entry in os.scandir(root) if entry.is_dir()) if os.path.isdir(root) else []
        for name in own:
            if re.fullmatch(r"(train|val|test)\d+", name):  # COCO's names; together they would be trained on
                raise UserError(f"{root} holds {', '.join(own)}: give one set alone, as {os.path.join(root, name)}")
    if not any(any(splits[word]) for word in SPLITS["train"]):
        return {"": find_images(roots)}
    for root, *own in zip(roots, *splits.values(), strict=True):
        if not any(own):
            raise UserError(f"{root} has nothing called train, unlike another folder: give folders of one kind")
    found = {
        word: find_images([place for places in own for place in places]) for word, own in splits.items() if any(own)
    }
    if len({bool(source.images) for source in found.values()}) > 1:
        raise UserError(f"images and tar shards side by side in {', '.join(roots)}: give one kind at a time")
    return found


def list_split(root: str, name: str) -> list[str]:
    """Folders of a root that have a split's name, and shards and tables with it as a word in theirs."""
    try:
        places = sorted(entry.path for entry in os.scandir(root)) if os.path.isdir(root) else [root]
    except OSError as error:
        raise UserError(f"cannot read the folder {root}: {error.strerror}; check its permissions") from None
    return [place for place in places if _is_called(place, name)]


def _is_called(path: str, name: str) -> bool:
    own = os.path.basename(path).lower()
    if os.path.isdir(path):
        return own == name
    return (is_shard(own) or own.endswith(".parquet")) and bool(re.search(rf"(^|[^a-z]){name}([^a-z]|$)", own))


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_shard(name: str) -> bool:
    return name.lower().endswith(SHARD_SUFFIXES)


def is_hidden(name: str) -> bool:
    """Whether any part of a relative path starts with a dot."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def walk(root: str) -> Iterator[str]:
    """Paths of all images and shards under a folder, sorted by name within each folder, files before folders."""
    seen: set[tuple[int, int]] = set()  # links may lead back to where they start
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as scan:
                entries = sorted((entry for entry in scan if entry.name[0] != "."), key=lambda e: e.name)
        except OSError as error:
            raise UserError(f"cannot read the folder {folder}: {error.strerror}; check its permissions") from None
        folders += [entry.path for entry in reversed(entries) if entry.is_dir()]
        for entry in entries:
            # A link to nothing is kept, to be named as a broken image; a pipe would block its reader for ever.
            if (is_image(entry.name) or is_shard(entry.name)) and (entry.is_file() or _is_dead_link(entry)):
                yield entry.path


def _is_dead_link(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)
