"""Files below a folder, and the splits that folders are divided into. Standard library only, so that it is quick."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from itpn.data.bands import join_bands
from itpn.data.file_types import (
    CACHE_INDEX,
    CLASS_FILES,
    COPIES_INDEX,
    ENVI_SUFFIXES,
    NO_BAND,
    SPECIAL,
    STATS_FILE,
    find_envi_header,
    is_hidden,
    is_image,
    is_image_file,
    is_shard,
    is_table,
    leave_arrays,
    suffix_of,
)
from itpn.data.splits import SPLIT_OF, join, split_folders, split_of_file, split_word
from itpn.errors import MachineError, UserError

IMAGE_FOLDERS = {"images", "jpegimages", "leftimg8bit", "imgs", "img"}
MASK_FOLDERS = ("annotations", "masks", "labels")  # searched for masks
# those, and folders of masks that are read only when named
ALL_MASK_FOLDERS = {*MASK_FOLDERS, "segmentationclass", "segmentationobject", "gtfine", "gtcoarse"}


@dataclass
class Division:
    """The splits into which a folder is divided.

    Attributes:
        places: split -> folders, shards or tables; empty if the folder is not divided.
        left: names of other folders with images.
        note: what is ambiguous, in a line; empty if nothing is.
    """

    places: dict[str, list[str]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    note: str = ""


def find_division(root: str) -> Division:
    """The splits into which a root is divided; the root may be a shard or table.

    Raises:
        UserError: it cannot be read, or a folder in it may be a split or a class.
    """
    if not os.path.isdir(root):
        split = split_of_file(os.path.basename(root))
        return Division({split: [root]} if split else {})
    return _divide(root, _list(root))


def _divide(root: str, entries: Sequence[os.DirEntry[str]]) -> Division:
    """Decide whether a root has splits or classes, one of which may be called ``train``.

    ``train`` and a second split are splits, and so are shards. A single split is a split if its name has a year or the
    like, if no other folder has images, or if it has class folders in it. Otherwise it is a class.

    Raises:
        UserError: both are possible.
    """
    folders = [entry for entry in entries if entry.is_dir()]
    files = [entry for entry in entries if (is_shard(entry.name) or is_table(entry.name)) and entry.is_file()]
    named, places = _find_splits(folders, files)
    if not places:
        return Division()
    others = [folder for folder in folders if folder.name not in named and _holds_images(folder.path)]
    beside = [folder.name for folder in others]
    bare = all(name.lower() in SPLIT_OF for name in named)  # which a shard's name is not
    several = "train" in places and len(places) > 1
    if several or not bare or not others:
        return Division(places, [*beside, *(file.name for file in files if file.name not in named)])
    own = [path for paths in places.values() for path in paths]
    names = join([os.path.basename(path) for path in own])
    if "train" in places and (inside := _inner_folders(own[0])):
        alike = [_inner_folders(folder.path) for folder in others]
        if not any(alike):
            return Division(places, beside)
        if len(others) == 1 or not all(alike):
            raise UserError(
                f"{root} holds {names}, with folders {join(inside)} in it, beside {join(beside)}: a training set or a "
                f"class? Give {own[0]} for the first, rename it for the second"
            )
    what = "is taken for a class" if len(own) == 1 else "are taken for classes"
    return Division(note=f"{root}: {names} {what}, beside {join(beside)}; nothing is left out")


def _find_splits(
    folders: Sequence[os.DirEntry[str]], files: Sequence[os.DirEntry[str]]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Name -> split, and split -> paths, of the entries of a folder whose names are those of splits."""
    named = split_folders(folder.name for folder in folders)
    named |= {file.name: split for file in files if (split := split_of_file(file.name))}
    places: dict[str, list[str]] = {}
    for entry in (*folders, *files):
        if split := named.get(entry.name):
            places.setdefault(split, []).append(entry.path)
    return named, places


def _holds_images(folder: str) -> bool:
    return next(walk(folder), None) is not None


def _inner_folders(folder: str) -> list[str]:
    """The folders with images in a folder, if there are at least two."""
    names = [os.path.basename(path) for path in list_folders(folder) if _holds_images(path)]
    return names if len(names) > 1 else []


def list_folders(folder: str) -> list[str]:
    """The folders in a folder, without hidden ones, sorted by name."""
    return [entry.path for entry in _list(folder) if entry.is_dir()]


def list_files(folder: str) -> list[str]:
    """The files in a folder, without hidden ones, sorted by name."""
    return [entry.path for entry in _list(folder) if entry.is_file()]


@dataclass
class TreeSplits:
    """The splits found while a tree is walked.

    Attributes:
        keep: whether val and test are walked as well, or left out.
        places: split -> its folders and shards.
        left: what is left out beside splits.
        masks: folders of masks that are left out.
        decisions: notes for the user, a line each.
    """

    root: str
    keep: bool = False
    places: dict[str, list[str]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)

    def split(self, folder: str, entries: Sequence[os.DirEntry[str]]) -> dict[str, str] | None:
        """Path -> split of the entries that are splits; None if the folder is not divided, and all of it is read.

        Below the root, a folder is divided only if it has a second split beside that for training.
        """
        division = _divide(folder, entries) if folder == self.root else self._divide_below(entries)
        if division.note:
            self.decisions.append(division.note)
        if division.places and "train" not in division.places and folder == self.root and not self.keep:
            names = [os.path.basename(path) for paths in division.places.values() for path in paths]
            self.decisions.append(
                f"{self.root}: nothing in it is called train, so all of it is read, {join(names)} too"
            )
        if not division.places or ("train" not in division.places and not self.keep):
            return self.leave_masks(entries)
        named = {path for paths in division.places.values() for path in paths}
        found: dict[str, str] = {}
        for split, paths in division.places.items():
            if split == "train" or self.keep:
                found |= dict.fromkeys(paths, split)
                self.places.setdefault(split, []).extend(paths)
        for entry in entries:
            is_data = entry.is_file() and (is_shard(entry.name) or is_image_file(entry.path))
            if entry.path not in found and (is_data or entry.path in named or entry.name in division.left):
                self.left.append(os.path.relpath(entry.path, self.root))
        return found

    def _divide_below(self, entries: Sequence[os.DirEntry[str]]) -> Division:
        """As `_divide`, by names only, without looking into folders."""
        folders = [entry for entry in entries if entry.is_dir()]
        _, places = _find_splits(folders, [e for e in entries if is_shard(e.name) and e.is_file()])
        return Division(places if len(places) > 1 else {})

    def leave_masks(self, entries: Sequence[os.DirEntry[str]], split: str = "") -> dict[str, str] | None:
        """All entries except folders of masks beside those of images, as in ADE20K's and Cityscapes' layouts."""
        names = {entry.name.lower() for entry in entries if entry.is_dir()}
        if not names & IMAGE_FOLDERS or not names & ALL_MASK_FOLDERS:
            return None
        masks = [entry for entry in entries if entry.is_dir() and entry.name.lower() in ALL_MASK_FOLDERS]
        self.masks += [os.path.relpath(entry.path, self.root) for entry in masks if _holds_images(entry.path)]
        return {entry.path: split for entry in entries if entry not in masks}

    def notes(self) -> list[str]:
        """Notes on what is read and what is left out, a line each."""
        if self.masks:
            self.decisions.append(f"{self.root}: masks are left out, in {join(self.masks)}")
        if self.left:
            taken = [os.path.relpath(path, self.root) for path in self.places.get("train", [])]
            self.decisions.append(f"{self.root}: for training: {join(taken) or 'nothing'}; left out: {join(self.left)}")
        return self.decisions


def split_places(folder: Path, word: str) -> list[Path]:
    """The folders in a folder that are named by a split's word: train, Train, train2017, train_images."""
    places = sorted(Path(path) for path in list_folders(str(folder))) if folder.is_dir() else []
    return [place for place in places if split_word(place.name) == word]


def walk(root: str, unread: Counter[str] | None = None) -> Iterator[str]:
    """Paths of all images and shards under a folder, sorted by name within each folder, files before folders.

    Args:
        unread: counts all other files by suffix, without hidden ones; pipes and devices only if their suffix is read.
    """
    return (path for _, path in walk_splits(root, unread))


def list_images(root: str, unread: Counter[str], bands: Sequence[str] = ()) -> list[str]:
    """Only the images that `walk` yields, without arrays beside other images; all other files are counted by suffix.

    Args:
        bands: of images in one file a band, see `itpn.data.bands.join_bands`; other images are counted.

    Raises:
        UserError: an image lacks a band.
    """
    paths = list(walk(root, unread))
    files = [path for path in paths if not is_shard(path)]
    if bands and files:
        unread.update(suffix_of(path) for path in paths if is_shard(path))
        joined, others = join_bands(files, bands, root)
        unread.update({NO_BAND: others} if others else {})
        return joined
    images, arrays = leave_arrays(files)
    unread.update(suffix_of(path) for path in (*filter(is_shard, paths), *arrays))
    return images


def walk_splits(
    root: str, unread: Counter[str] | None = None, parts: TreeSplits | None = None
) -> Iterator[tuple[str, str]]:
    """As `walk`, but yields (split, path); the split is "" outside of every divided folder."""
    visited: set[tuple[int, int]] = set()  # links may form cycles
    folders = [(root, "")]
    while folders:
        folder, split = folders.pop()
        status = _read(os.stat, folder)
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        entries = _list(folder)
        named = None
        if parts is not None:
            named = parts.leave_masks(entries, split) if split else parts.split(folder, entries)
        if named is not None:
            entries = [entry for entry in entries if entry.path in named]
        splits = named or {}
        folders += [(entry.path, splits.get(entry.path, split)) for entry in reversed(entries) if entry.is_dir()]
        headers: set[str | None] = set()  # of ENVI
        others = []
        for entry in entries:
            # A dangling link is kept, to be reported as an unreadable image; a pipe would block its reader.
            if not entry.is_file() and not _is_dangling(entry):
                if unread is not None and not entry.is_dir() and (is_image(entry.name) or is_shard(entry.name)):
                    unread[SPECIAL] += 1
                continue
            if is_shard(entry.name) or is_image_file(entry.path):
                yield splits.get(entry.path, split), entry.path
                if entry.name.lower().endswith(ENVI_SUFFIXES):
                    headers.add(find_envi_header(entry.path))
            else:
                others.append(entry)
        if unread is not None:
            known = (CACHE_INDEX, COPIES_INDEX, STATS_FILE, *CLASS_FILES)
            unread.update(suffix_of(e.name) for e in others if e.name not in known and e.path not in headers)


def _list(folder: str) -> list[os.DirEntry[str]]:
    """The entries of a folder, without hidden ones, sorted by name."""
    with _read(os.scandir, folder) as scan:
        return sorted((entry for entry in scan if not is_hidden(entry.name)), key=lambda entry: entry.name)


def _read(call: Callable[[str], Any], folder: str) -> Any:
    try:
        return call(folder)
    except OSError as error:
        raise MachineError(
            f"cannot read the folder {folder}: {error.strerror}; check the disk and permissions"
        ) from None


def _is_dangling(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)
