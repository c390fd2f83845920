"""What a data root holds: image files in any tree, or tar shards. Standard library only, so that it is quick."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from itpn.data.splits import SPLITS, Division, divide, join, split_of_file, split_word
from itpn.errors import MachineError, UserError
from itpn.system.text import read_text, readable

__all__ = [
    "SPLITS",
    "ImageSource",
    "find_images",
    "find_splits",
    "find_training_images",
    "is_image",
    "list_images",
    "walk",
]

# the first six are JPEG by other names
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp"),
    *(".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
)
JPEG_SUFFIXES = IMAGE_SUFFIXES[:6]
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
TABLE_SUFFIX = ".parquet"
CACHE_INDEX = "itpn-features.json"  # in a folder written by `itpn cache-features`
COPIES_INDEX = "itpn-shrink.json"  # in one written by `itpn shrink`
CLASSES = "classes.txt"  # beside shards: a name for each label, a line each
CLASS_FILES = (CLASSES, "classes.csv", "class_dict.csv", "objectInfo150.txt")  # of masks; ADE20K has the last
ARCHIVES = (".zip", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst")
IMAGE_FOLDERS = {"images", "jpegimages", "leftimg8bit", "imgs", "img"}
MASK_FOLDERS = ("annotations", "masks", "labels")  # where masks are looked for
# those, and folders of masks that have to be named
ALL_MASK_FOLDERS = {*MASK_FOLDERS, "segmentationclass", "segmentationobject", "gtfine", "gtcoarse"}
MOST_SUFFIXES = 8  # that a line names
# of Linux, macOS, Synology and Windows; in lower case
SYSTEM_FOLDERS = {"lost+found", "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information"}
# what is counted by kind, not by suffix: in archives, and pipes, sockets and devices
LINK, SPECIAL = "link", "special file"


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
    # what was left out, or may be meant otherwise, a line each
    notes: tuple[str, ...] = field(default=(), compare=False)
    members: tuple[str, ...] = ()  # of shards: endings of those to read, see `itpn.data.members`


@dataclass
class _Found:
    """What a search has met so far."""

    members: tuple[str, ...] = ()  # as of `ImageSource`
    images: dict[str, None] = field(default_factory=dict)  # an ordered set: roots may overlap
    shards: dict[str, None] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)

    def add(self, root: str, paths: Sequence[str]) -> None:
        images = [path for path in paths if is_image(path)]
        self.images.update(dict.fromkeys(images))
        if images:
            self.unread.update(suffix_of(path) for path in paths if is_shard(path))
        else:
            self.shards.update(dict.fromkeys(paths))
        self.places.append(root)

    def source(self, notes: Sequence[str] = ()) -> ImageSource:
        """Raises UserError where there is nothing, or not one kind."""
        if self.images and self.shards:
            raise UserError(
                f"both images ({next(iter(self.images))}) and tar shards ({next(iter(self.shards))}) were given: "
                "choose one kind"
            )
        unread = describe_unread(self.unread)
        if not self.images and not self.shards:
            where = ", ".join(self.places) or "an empty list of data roots"
            raise UserError(
                f"no images in {where} (looked for {' '.join(IMAGE_SUFFIXES)} and .tar shards)"
                f"{f'; {unread}' if unread else ''}"
            )
        lines = [*notes, *([unread] if unread else [])]
        return ImageSource(
            images=tuple(self.images),
            shards=tuple(self.shards),
            roots=tuple(self.places),
            notes=tuple(lines),
            members=self.members,
        )


def find_images(roots: Sequence[Path | str], members: Sequence[str] = ()) -> ImageSource:
    """Find the images, or else the tar shards, under some folders; a root may also be one image or one shard.

    Folders are searched at any depth and links to folders are followed, each folder once. Hidden files and
    folders are passed over, and so is everything that is neither image nor shard, which the notes count. The order is
    that of the roots, then of the names, on every file system.

    Args:
        members: endings of the images in shards, see `itpn.data.members.Choice`.

    Raises:
        UserError: a root is missing, unreadable or holds nothing of use, or some hold images and others shards.
    """
    names = [os.fspath(root) for root in roots]
    if cache := _find_cache(names):
        return cache
    found = _Found(tuple(members))
    for root in names:
        check_root(root)
        found.add(root, list(walk(root, found.unread)) if os.path.isdir(root) else [root])
    return found.source()


def find_training_images(roots: Sequence[Path | str], members: Sequence[str] = ()) -> ImageSource:
    """As `find_images`, but where names divide a folder at any depth into splits, of those for training alone.

    Evaluation sets stay unseen. The notes say what is left out.

    Args:
        members: as of `find_images`.
    """
    names = [os.fspath(root) for root in roots]
    if cache := _find_cache(names):
        return cache
    found, notes = _Found(tuple(members)), []
    for root in names:
        check_root(root)
        if not os.path.isdir(root):
            found.add(root, [root])
            continue
        parts = _Parts(root)
        own = [path for split, path in _walk(root, found.unread, parts) if split in ("", "train")]
        found.add(root, own)
        notes += parts.notes()
    return found.source(notes)


def find_splits(roots: Sequence[str], members: Sequence[str] = ()) -> dict[str, ImageSource]:
    """As `find_images`, but what is for training apart from what is for evaluation, where the names say which is which.

    Args:
        members: as of `find_images`.

    Returns:
        By split, ``train``, ``val`` and ``test``, what is called so in the roots, and nothing of what lies beside;
        where nothing is called train, one source of everything under the name "".

    Raises:
        UserError: as `find_images`; or the roots or the splits are not of one kind.
    """
    names = [os.fspath(root) for root in roots]
    if cache := _find_cache(names):
        return {"": cache}
    found: dict[str, _Found] = {}
    notes: list[str] = []
    divided: dict[str, bool] = {}
    unread: Counter[str] = Counter()
    for root in names:
        check_root(root)
        parts = _Parts(root, keep=True)
        if os.path.isdir(root):
            pairs = list(_walk(root, unread, parts))
        else:
            pairs = [(split_of_file(os.path.basename(root)) or "", root)]
        own: dict[str, list[str]] = {}
        for split, path in pairs:
            own.setdefault(split, []).append(path)
        divided[root] = own.keys() != {""}
        if "train" in own and "" in own:  # images outside of every divided folder
            own["train"] = own.pop("") + own["train"]
        for split, paths in own.items():
            places = sorted(parts.places.get(split, []), key=len, reverse=True)
            some = found.setdefault(split, _Found(tuple(members)))
            some.add(root, paths)
            some.places[-1:] = [*places, *([] if places and split else [root])]
        notes += parts.notes()
    if "train" not in found:
        return {"": find_training_images(names, members)}
    for root, is_divided in divided.items():
        if not is_divided:
            raise UserError(f"{root} has nothing called train, unlike another folder: give folders of one kind")
    found["train"].unread += unread
    order: list[str] = [split for split in ("train", "val", "test") if split in found]
    sources = {split: found[split].source(notes if split == "train" else ()) for split in order}
    if len({bool(source.images) for source in sources.values()}) > 1:
        raise UserError(f"images and tar shards side by side in {', '.join(names)}: give one kind at a time")
    return sources


def find_division(root: str) -> Division:
    """The splits that a root itself is divided into; a shard or table may be the root.

    Raises:
        UserError: it cannot be read, or it is not certain whether a folder in it is a split or a class.
    """
    if not os.path.isdir(root):
        split = split_of_file(os.path.basename(root))
        return Division({split: [root]} if split else {})
    return _divide(root, _list(root))


def _divide(root: str, entries: Sequence[os.DirEntry[str]]) -> Division:
    folders = [entry.path for entry in entries if entry.is_dir()]
    files = [entry.path for entry in entries if (is_shard(entry.name) or is_table(entry.name)) and entry.is_file()]
    return divide(root, folders, files, lambda path: next(walk(path), None) is not None, list_folders)


def list_folders(folder: str) -> list[str]:
    """The folders in a folder that are not hidden, sorted by name."""
    return [entry.path for entry in _list(folder) if entry.is_dir()]


def list_files(folder: str) -> list[str]:
    """The files in a folder that are not hidden, sorted by name."""
    return [entry.path for entry in _list(folder) if entry.is_file()]


@dataclass
class _Parts:
    """The splits of a whole tree.

    Attributes:
        keep: whether val and test are walked as well, or left out as what lies beside them.
        places: split to the folders and shards that are it.
    """

    root: str
    keep: bool = False
    places: dict[str, list[str]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def split(self, folder: str, entries: Sequence[os.DirEntry[str]]) -> dict[str, str] | None:
        """Path to split of the entries that are one; None where all are read, the folder being no set of splits.

        Below the root, it takes a second split beside that for training.
        """
        division = _divide(folder, entries) if folder == self.root else _divide_inner(folder, entries)
        if division.note:
            self.told.append(division.note)
        if division.places and "train" not in division.places and folder == self.root and not self.keep:
            names = [os.path.basename(path) for paths in division.places.values() for path in paths]
            self.told.append(f"{self.root}: nothing in it is called train, so all of it is read, {join(names)} too")
        if not division.places or ("train" not in division.places and not self.keep):
            return self.leave_masks(entries)
        named = {path for paths in division.places.values() for path in paths}
        found: dict[str, str] = {}
        for split, paths in division.places.items():
            if split == "train" or self.keep:
                found |= dict.fromkeys(paths, split)
                self.places.setdefault(split, []).extend(paths)
        for entry in entries:
            is_data = (is_image(entry.name) or is_shard(entry.name)) and entry.is_file()
            if entry.path not in found and (is_data or entry.path in named or entry.name in division.left):
                self.left.append(os.path.relpath(entry.path, self.root))
        return found

    def leave_masks(self, entries: Sequence[os.DirEntry[str]], split: str = "") -> dict[str, str] | None:
        """All entries but folders of masks beside those of images, as in ADE20K's and Cityscapes' layouts."""
        names = {entry.name.lower() for entry in entries if entry.is_dir()}
        if not names & IMAGE_FOLDERS or not names & ALL_MASK_FOLDERS:
            return None
        masks = [entry for entry in entries if entry.is_dir() and entry.name.lower() in ALL_MASK_FOLDERS]
        self.masks += [os.path.relpath(entry.path, self.root) for entry in masks if next(walk(entry.path), None)]
        return {entry.path: split for entry in entries if entry not in masks}

    def notes(self) -> list[str]:
        """What was decided, a line each."""
        if self.masks:
            self.told.append(f"{self.root}: masks are left out, in {join(self.masks)}")
        if self.left:
            taken = [os.path.relpath(path, self.root) for path in self.places.get("train", [])]
            self.told.append(f"{self.root}: for training: {join(taken) or 'nothing'}; left out: {join(self.left)}")
        return self.told


def _divide_inner(folder: str, entries: Sequence[os.DirEntry[str]]) -> Division:
    """As `_divide`, by names alone."""
    folders = [entry.path for entry in entries if entry.is_dir()]
    files = [entry.path for entry in entries if is_shard(entry.name) and entry.is_file()]
    division = divide(folder, folders, files, lambda path: False, lambda path: [])
    return division if len(division.places) > 1 else Division()


def _find_cache(names: Sequence[str]) -> ImageSource | None:
    caches = [name for name in names if os.path.isfile(os.path.join(name, CACHE_INDEX))]
    if caches and len(names) > 1:
        raise UserError(f"{caches[0]} holds cached features: give it as the only data root")
    return ImageSource(cache=caches[0], roots=tuple(names)) if caches else None


def check_root(root: str) -> None:
    """Refuse what is no folder, image or shard, and what an unfinished `itpn shrink` left: a folder or its splits."""
    if not root:
        raise UserError("a data root is an empty name: give a folder of images, or tar shards")
    if not os.path.exists(root):
        raise UserError(f"{root} does not exist: give a folder of images, or tar shards")
    if not os.path.isdir(root):
        if not os.path.isfile(root):
            raise UserError(f"{root} is neither a folder nor a regular file: give a folder of images, or tar shards")
        if not is_image(root) and not is_shard(root):
            raise UserError(f"{root} is neither a folder, an image nor a tar shard{describe_file(root)}")
        return
    for folder in (root, os.path.dirname(os.path.abspath(root))):
        try:
            index = json.loads(read_text(Path(folder, COPIES_INDEX)))
        except (UserError, ValueError, RecursionError):
            continue
        if not isinstance(index, dict) or not index.get("complete"):
            raise UserError(f"{folder} is not complete: repeat the `itpn shrink` that writes it, or remove it")


def describe_file(path: str) -> str:
    """What a file that is not read is, and what to do, to end a message with."""
    suffix = os.path.splitext(path)[1].lower()
    if not os.path.isfile(path):
        return ""
    if suffix in ARCHIVES:
        return f", but a {suffix} archive: unpack it and give the folder"
    if suffix == TABLE_SUFFIX:
        return ", but a table, which classifiers alone read"
    if suffix in (".txt", ".csv", ".tsv", ".lst", ".json", ".jsonl", ".xml", ".yaml", ".yml"):
        return f", but a {suffix} file: give the folder of the images themselves"
    return f", but a {suffix} file" if suffix else ""


def describe_unread(unread: Counter[str]) -> str:
    """Files that are not read, by suffix or kind, the commonest first, in a line; empty where there are none."""
    if not unread:
        return ""
    ranked = sorted(unread.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = [
        f"{count:,} {suffix or 'without a suffix'}{'s' * (suffix in (LINK, SPECIAL) and count > 1)}"
        for suffix, count in ranked[:MOST_SUFFIXES]
    ]
    if rest := ranked[MOST_SUFFIXES:]:
        shown.append(f"{sum(count for _, count in rest):,} of {len(rest)} other suffixes")
    return f"not read: {', '.join(shown)}"


def split_places(folder: Path, word: str) -> list[Path]:
    """The folders in a folder that say a split's word in whatever spelling: train, Train, train2017, train_images."""
    places = sorted(Path(path) for path in list_folders(str(folder))) if folder.is_dir() else []
    return [place for place in places if split_word(place.name) == word]


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_shard(name: str) -> bool:
    return name.lower().endswith(SHARD_SUFFIXES)


def is_table(name: str) -> bool:
    return name.lower().endswith(TABLE_SUFFIX)


def is_hidden(name: str) -> bool:
    """Whether any part of a relative path starts with a dot, or is a folder that a system makes for itself."""
    return any(
        (part.startswith(".") and part not in (".", "..")) or part.lower() in SYSTEM_FOLDERS for part in name.split("/")
    )


def walk(root: str, unread: Counter[str] | None = None) -> Iterator[str]:
    """Paths of all images and shards under a folder, sorted by name within each folder, files before folders.

    Args:
        unread: counts all other files by suffix, but hidden ones; pipes and the like where they are called like data.
    """
    return (path for _, path in _walk(root, unread))


def list_images(root: str, unread: Counter[str]) -> list[str]:
    """The images alone that `walk` gives; all other files are counted by suffix."""
    paths = list(walk(root, unread))
    unread.update(suffix_of(path) for path in paths if not is_image(path))
    return [path for path in paths if is_image(path)]


def _walk(root: str, unread: Counter[str] | None = None, parts: _Parts | None = None) -> Iterator[tuple[str, str]]:
    """As `walk`, each path after its split, "" outside of every divided folder."""
    seen: set[tuple[int, int]] = set()  # links may lead back to where they start
    folders = [(root, "")]
    while folders:
        folder, split = folders.pop()
        status = _read(os.stat, folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        entries = _list(folder)
        named = None
        if parts is not None:
            named = parts.leave_masks(entries, split) if split else parts.split(folder, entries)
        if named is not None:
            entries = [entry for entry in entries if entry.path in named]
        splits = named or {}
        folders += [(entry.path, splits.get(entry.path, split)) for entry in reversed(entries) if entry.is_dir()]
        for entry in entries:
            # A link to nothing is kept, to be named as a broken image; a pipe would block its reader for ever.
            if not entry.is_file() and not _is_dead_link(entry):
                if unread is not None and not entry.is_dir() and (is_image(entry.name) or is_shard(entry.name)):
                    unread[SPECIAL] += 1
                continue
            if is_image(entry.name) or is_shard(entry.name):
                yield splits.get(entry.path, split), entry.path
            elif unread is not None and entry.name not in (CACHE_INDEX, COPIES_INDEX, *CLASS_FILES):
                unread[suffix_of(entry.name)] += 1


def _list(folder: str) -> list[os.DirEntry[str]]:
    """What is in a folder and not hidden, sorted by name."""
    with _read(os.scandir, folder) as scan:
        return sorted((entry for entry in scan if not is_hidden(entry.name)), key=lambda entry: entry.name)


def _read(ask: Callable[[str], Any], folder: str) -> Any:
    try:
        return ask(folder)
    except OSError as error:
        raise MachineError(
            f"cannot read the folder {folder}: {error.strerror}; check the disk and permissions"
        ) from None


def suffix_of(name: str) -> str:
    """As a count of files that are not read calls it."""
    lower = os.path.basename(name).lower()
    return next(
        (suffix for suffix in SHARD_SUFFIXES[1:] if lower.endswith(suffix)), readable(os.path.splitext(lower)[1])
    )


def _is_dead_link(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)
