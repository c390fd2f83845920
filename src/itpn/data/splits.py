"""Splits of a data set, recognized by names of folders and shards. Standard library only, so that it is quick."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from itpn.errors import UserError

WORDS = {
    "train": ("train", "training", "trainval", "train_val", "train-val"),
    "val": ("val", "validation", "valid", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
# for annotations: the test set is taken for validation only if there is no validation set
SPLITS = {"train": WORDS["train"], "val": (*WORDS["val"], *WORDS["test"])}

_SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}
_ANY = "|".join(sorted(_SPLIT_OF, key=len, reverse=True))
_WORD = re.compile(rf"(?<![a-z])({_ANY})(?![a-z])")
# other words in a split's name: train2017, train_images, images-train, training_set, val_256, trainA
_PLAIN = re.compile(
    rf"(?:(?:images?|imgs?|photos?|data|dataset)[ ._-]*)?({_ANY})"
    r"(?:[ ._-]*(?:set|data|dataset|images?|imgs?|photos?|split|part|large|small|full|[ab]|v?\d+))*"
)


def split_word(name: str) -> str | None:
    """The word of :data:`WORDS` by which a folder is named, if its name has no other meaning."""
    found = _PLAIN.fullmatch(name.lower())
    return found and found[1]


def split_of(name: str) -> str | None:
    """``train``, ``val`` or ``test``, if a folder's name is that, or another word for it."""
    word = split_word(name)
    return word and _SPLIT_OF[word]


def split_of_file(name: str) -> str | None:
    """The split of a shard or table, whose name may have other words: ``imagenet-train-0000.tar``."""
    stem = re.sub(r"\.(tar|tar\.gz|tgz|parquet)$", "", name.lower())
    found = _PLAIN.fullmatch(stem) or _WORD.search(stem)
    return found and _SPLIT_OF[found[1]]


def split_folders(names: Iterable[str]) -> dict[str, str]:
    """The splits among the folders of a folder: name -> split.

    These are plain names (:func:`split_of`), and names that differ only in the word, as ``cifar_train`` and
    ``cifar_test``.
    """
    names = list(names)
    found = {name: split for name in names if (split := split_of(name))}
    alike: dict[str, dict[str, str]] = {}
    for name in names:
        if name not in found and (word := _WORD.search(name.lower())):
            rest = re.sub(r"\d+", "", name.lower()[: word.start()] + "*" + name.lower()[word.end() :])
            alike.setdefault(rest, {})[name] = _SPLIT_OF[word[1]]
    for own in alike.values():
        if len(set(own.values())) > 1:
            found |= own
    return found


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


def divide(
    root: str, folders: Sequence[str], files: Sequence[str], holds_images: Callable[[str], bool], list_folders: Callable
) -> Division:
    """Decide whether a root has splits or classes, one of which may be called ``train``.

    ``train`` and a second split are splits, and so are shards. A single split is a split if its name has a year or the
    like, if no other folder has images, or if it has class folders in it. Otherwise it is a class.

    Args:
        folders, files: paths of the root's folders, and of its shards and tables.
        holds_images: whether a folder has an image or shard below it.
        list_folders: lists the folders in a folder.

    Raises:
        UserError: both are possible.
    """
    named = split_folders(os.path.basename(path) for path in folders)
    places: dict[str, list[str]] = {}
    for path in folders:
        if split := named.get(os.path.basename(path)):
            places.setdefault(split, []).append(path)
    shards = False
    for path in files:
        if split := split_of_file(os.path.basename(path)):
            places.setdefault(split, []).append(path)
            shards = True
    if not places:
        return Division()
    others = [path for path in folders if os.path.basename(path) not in named and holds_images(path)]
    beside = [os.path.basename(path) for path in others]
    bare = all(name.lower() in _SPLIT_OF for name in named)
    several = "train" in places and len(places) > 1
    if several or shards or not bare or not others:
        taken = {path for paths in places.values() for path in paths}
        return Division(places, [*beside, *(os.path.basename(path) for path in files if path not in taken)])
    own = [path for paths in places.values() for path in paths]
    names = join([os.path.basename(path) for path in own])
    if "train" in places and (inside := _inner_folders(own[0], holds_images, list_folders)):
        alike = [_inner_folders(path, holds_images, list_folders) for path in others]
        if not any(alike):
            return Division(places, beside)
        if len(others) == 1 or not all(alike):
            raise UserError(
                f"{root} holds {names}, with folders {join(inside)} in it, beside {join(beside)}: a training set or a "
                f"class? Give {own[0]} for the first, rename it for the second"
            )
    what = "is taken for a class" if len(own) == 1 else "are taken for classes"
    return Division(note=f"{root}: {names} {what}, beside {join(beside)}; nothing is left out")


def _inner_folders(folder: str, holds_images: Callable[[str], bool], list_folders: Callable) -> list[str]:
    """The folders with images in a folder, if there are at least two."""
    names = [os.path.basename(path) for path in list_folders(folder) if holds_images(path)]
    return names if len(names) > 1 else []


def join(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
