"""The content of a data root: image files in any tree, or tar shards. Standard library only, so that it is quick."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from itpn.data.bands import join_bands
from itpn.data.file_types import (
    CACHE_INDEX,
    COMMON_SUFFIXES,
    COPIES_INDEX,
    describe_file,
    describe_unread,
    is_image_file,
    is_shard,
    leave_arrays,
    suffix_of,
)
from itpn.data.splits import split_of_file
from itpn.data.walk import TreeSplits, walk_splits
from itpn.errors import UserError
from itpn.system.text import read_text


@dataclass(frozen=True)
class ImageSource:
    """Images to read, in a fixed order: single files, or tar shards, or a cache of crops and a teacher's features.

    Exactly one of the three is given.

    Paths are strings: a million `Path` objects would take half a gigabyte.
    """

    images: tuple[str, ...] = ()
    shards: tuple[str, ...] = ()
    cache: str = ""
    roots: tuple[str, ...] = field(default=(), compare=False)  # that were searched
    # what was left out or is ambiguous, a line each
    notes: tuple[str, ...] = field(default=(), compare=False)
    members: tuple[str, ...] = ()  # of shards: suffixes of the members to read, see `itpn.data.members`


@dataclass
class _Found:
    """What a search has found so far."""

    members: tuple[str, ...] = ()  # as of `ImageSource`
    bands: tuple[str, ...] = ()  # see `itpn.data.bands.join_bands`
    images: dict[str, None] = field(default_factory=dict)  # used as an ordered set: roots may overlap
    shards: dict[str, None] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)

    def add(self, root: str, paths: Sequence[str]) -> None:
        images = [path for path in paths if not is_shard(path)]
        self.images.update(dict.fromkeys(images))
        if images:
            self.unread.update(suffix_of(path) for path in paths if is_shard(path))
        else:
            self.shards.update(dict.fromkeys(paths))
        self.places.append(root)

    def source(self, notes: Sequence[str] = ()) -> ImageSource:
        """The source of what was found.

        Raises:
            UserError: nothing was found, or both images and shards.
        """
        if self.images and self.shards:
            raise UserError(
                f"both images ({next(iter(self.images))}) and tar shards ({next(iter(self.shards))}) were given: "
                "choose one kind"
            )
        if not self.images and not self.shards:
            where = ", ".join(self.places) or "an empty list of data roots"
            raise UserError(
                f"no images in {where} (looked for {COMMON_SUFFIXES}, and .tar shards)"
                f"{describe_unread(self.unread, '; ')}"
            )
        if self.bands:
            return self._join(notes)
        images, arrays = leave_arrays(self.images)
        unread = self.unread + Counter(suffix_of(path) for path in arrays)
        return ImageSource(
            images=tuple(images),
            shards=tuple(self.shards),
            roots=tuple(self.places),
            notes=tuple(filter(None, (*notes, describe_unread(unread)))),
            members=self.members,
        )

    def _join(self, notes: Sequence[str]) -> ImageSource:
        if self.shards:
            raise UserError("--data.bands is for images in files, not for tar shards: leave it out")
        images, others = join_bands(self.images, self.bands, ", ".join(self.places))
        left = f"not among --data.bands, and not read: {others:,}" * bool(others)
        notes = tuple(filter(None, (*notes, left, describe_unread(self.unread))))
        return ImageSource(images=tuple(images), roots=tuple(self.places), notes=notes)


def find_images(roots: Sequence[Path | str], members: Sequence[str] = (), bands: Sequence[str] = ()) -> ImageSource:
    """Find the images, or else the tar shards, under some folders; a root may also be one image or one shard.

    Folders are searched at any depth and links to folders are followed, each folder once. Hidden files and
    folders are ignored. The notes count files that are neither image nor shard. The order is that of the roots, then
    of the names, on every file system.

    Args:
        members: suffixes of the images in shards, see `itpn.data.members.Choice`.
        bands: of images in one file a band, see `itpn.data.bands.join_bands`.

    Raises:
        UserError: a root is missing, unreadable or has no images, some roots have images and others shards, or an image
            lacks a band.
    """
    return _find(roots, members, bands, divided=False)


def find_training_images(
    roots: Sequence[Path | str], members: Sequence[str] = (), bands: Sequence[str] = ()
) -> ImageSource:
    """As `find_images`, but without validation and test splits, if names divide a folder at any depth into splits.

    The notes list what is left out.
    """
    return _find(roots, members, bands, divided=True)


def _find(roots: Sequence[Path | str], members: Sequence[str], bands: Sequence[str], divided: bool) -> ImageSource:
    names = [os.fspath(root) for root in roots]
    if cache := _find_cache(names):
        if bands:
            raise UserError("--data.bands is for images in files, not for cached features: leave it out")
        return cache
    found, notes = _Found(tuple(members), tuple(bands)), list[str]()
    for root in names:
        parts = TreeSplits(root) if divided else None
        pairs = _list_root(root, found.unread, parts)
        found.add(root, [path for split, path in pairs if split in ("", "train")])
        notes += parts.notes() if parts else []
    return found.source(notes)


def _list_root(root: str, unread: Counter[str], parts: TreeSplits | None) -> list[tuple[str, str]]:
    """The images and shards below a root, as (split, path), or the root itself, which is one."""
    check_root(root)
    return list(walk_splits(root, unread, parts)) if os.path.isdir(root) else [("", root)]


def find_splits(roots: Sequence[str], members: Sequence[str] = ()) -> dict[str, ImageSource]:
    """As `find_images`, but separately for each split, if names divide the roots into splits.

    Returns:
        A source for each of ``train``, ``val`` and ``test`` that the roots have; what lies beside splits is left out.
        If nothing is called train, one source of everything, under the name "".

    Raises:
        UserError: as `find_images`; or the roots or the splits are not of one kind.
    """
    names = [os.fspath(root) for root in roots]
    if cache := _find_cache(names):
        return {"": cache}
    found: dict[str, _Found] = {}
    notes: list[str] = []
    undivided: list[str] = []
    unread: Counter[str] = Counter()
    for root in names:
        parts = TreeSplits(root, keep=True)
        own: dict[str, list[str]] = {}
        for split, path in _list_root(root, unread, parts):
            own.setdefault(split, []).append(path)
        if os.path.isfile(root):
            own = {split_of_file(os.path.basename(root)) or "": [root]}
        if own.keys() == {""}:
            undivided.append(root)
        if "train" in own and "" in own:  # images outside of divided folders
            own["train"] = own.pop("") + own["train"]
        for split, paths in own.items():
            places = sorted(parts.places.get(split, []), key=len, reverse=True)
            some = found.setdefault(split, _Found(tuple(members)))
            some.add(root, paths)
            some.places[-1:] = [*places, *([] if places and split else [root])]
        notes += parts.notes()
    if "train" not in found:
        return {"": find_training_images(names, members)}
    if undivided:
        raise UserError(f"{undivided[0]} has nothing called train, unlike another folder: give folders of one kind")
    found["train"].unread += unread
    order: list[str] = [split for split in ("train", "val", "test") if split in found]
    sources = {split: found[split].source(notes if split == "train" else ()) for split in order}
    if len({bool(source.images) for source in sources.values()}) > 1:
        raise UserError(f"images and tar shards side by side in {', '.join(names)}: give one kind at a time")
    return sources


def _find_cache(names: Sequence[str]) -> ImageSource | None:
    caches = [name for name in names if os.path.isfile(os.path.join(name, CACHE_INDEX))]
    if caches and len(names) > 1:
        raise UserError(f"{caches[0]} holds cached features: give it as the only data root")
    return ImageSource(cache=caches[0], roots=tuple(names)) if caches else None


def check_root(
    root: str,
    wanted: str = "a folder of images, or tar shards",
    kinds: str = ", an image nor a tar shard",
    is_read: Callable[[str], bool] = lambda root: is_shard(root) or is_image_file(root),
) -> None:
    """Refuse a root that is not a folder or file of ``kinds``, or is an incomplete output of `itpn shrink` or in one.

    Args:
        wanted: what to give instead.
        is_read: whether a file of this name is read.
    """
    if not root:
        raise UserError(f"a data root is an empty name: give {wanted}")
    if not os.path.exists(root):
        raise UserError(f"{root} does not exist: give {wanted}")
    if not os.path.isdir(root):
        if not os.path.isfile(root):
            raise UserError(f"{root} is neither a folder nor a regular file: give {wanted}")
        if not is_read(root):
            raise UserError(f"{root} is neither a folder{kinds}{describe_file(root)}")
        return
    for folder in (root, os.path.dirname(os.path.abspath(root))):
        try:
            index = json.loads(read_text(Path(folder, COPIES_INDEX)))
        except (UserError, ValueError, RecursionError):
            continue
        if not isinstance(index, dict) or not index.get("complete"):
            raise UserError(f"{folder} is not complete: repeat the `itpn shrink` that writes it, or remove it")
