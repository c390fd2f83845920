"""What a data root holds: image files in any tree, or tar shards. Standard library only, so that it is quick."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from itpn.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
CACHE_INDEX = "itpn-features.json"  # in a folder written by `itpn cache-features`


@dataclass(frozen=True)
class ImageSource:
    """Images to read, in a fixed order: single files, or tar shards, or a cache of crops and a teacher's features.

    Only one of the three is not empty.

    Paths are strings: a million `Path` objects would take half a gigabyte.
    """

    images: tuple[str, ...] = ()
    shards: tuple[str, ...] = ()
    cache: str = ""


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
        return ImageSource(cache=caches[0])
    for root in names:
        if os.path.isdir(root):
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
    return ImageSource(tuple(images), tuple(shards))


def find_training_images(roots: Sequence[Path | str]) -> ImageSource:
    """As `find_images`, but of a folder with a `train` folder in it that one alone: evaluation sets stay unseen."""
    trains = [os.path.join(root, "train") for root in roots]
    return find_images([train if os.path.isdir(train) else root for train, root in zip(trains, roots, strict=True)])


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
