"""Which part of a data set a folder or shard is, by its name. Standard library only, so that it is quick."""

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
# as annotations know them: a test set is for the end, and taken for evaluation only where there is nothing else
SPLITS = {"train": WORDS["train"], "val": (*WORDS["val"], *WORDS["test"])}

_SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}
_ANY = "|".join(sorted(_SPLIT_OF, key=len, reverse=True))
_WORD = re.compile(rf"(?<![a-z])({_ANY})(?![a-z])")
# words that change nothing: train2017, train_images, images-train, training_set, val_256, trainA
_PLAIN = re.compile(
    rf"(?:(?:images?|imgs?|photos?|data|dataset)[ ._-]*)?({_ANY})"
    r"(?:[ ._-]*(?:set|data|dataset|images?|imgs?|photos?|split|part|large|small|full|[ab]|v?\d+))*"
)


def split_word(name: str) -> str | None:
    """The word of a split that is all that a folder's name says, as in :data:`WORDS`."""
    found = _PLAIN.fullmatch(name.lower())
    return found and found[1]


def split_of(name: str) -> str | None:
    """``train``, ``val`` or ``test`` where that, or another word for it, is all that a folder's name says."""
    word = split_word(name)
    return word and _SPLIT_OF[word]


def split_of_file(name: str) -> str | None:
    """The same of a shard's or table's name, which may say more: ``imagenet-train-0000.tar``."""
    stem = re.sub(r"\.(tar|tar\.gz|tgz|parquet)$", "", name.lower())
    found = _PLAIN.fullmatch(stem) or _WORD.search(stem)
    return found and _SPLIT_OF[found[1]]


def split_folders(names: Iterable[str]) -> dict[str, str]:
    """Which of some folders beside one another are splits: name to split.

    Beside plain names (:func:`split_of`) these are names that differ in the word alone, as ``cifar_train`` and
    ``cifar_test`` do.
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
    """The splits that a folder is divided into.

    Attributes:
        places: split to folders, shards or tables; empty where the names divide nothing.
        left: names of folders beside them with images in them.
        note: what a reader may take otherwise, in a line; empty where there is nothing to tell.
    """

    places: dict[str, list[str]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    note: str = ""


def divide(
    root: str, folders: Sequence[str], files: Sequence[str], holds_images: Callable[[str], bool], list_folders: Callable
) -> Division:
    """Tell a root of splits from a root of classes, one of which may be called ``train``.

    ``train`` and a second split, or shards, are splits; so is a folder without a second split beside it, unless it
    stands among other folders with images and has no year or the like in its name: then it is a class, if it is not
    made of class folders itself.

    Args:
        folders, files: paths of the root's folders, and of its shards and tables.
        holds_images: whether there is an image or shard below a folder.
        list_folders: the folders in a folder.

    Raises:
        UserError: it may be either.
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
    """The folders with images in a folder, if there are two or more."""
    names = [os.path.basename(path) for path in list_folders(folder) if holds_images(path)]
    return names if len(names) > 1 else []


def join(names: Sequence[str], most: int = 4) -> str:
    """The first few."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
