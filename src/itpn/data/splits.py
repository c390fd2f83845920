"""Splits of a data set, recognized by names of folders and shards. Standard library only, so that it is quick."""

import re
from collections.abc import Iterable, Sequence

WORDS = {
    "train": ("train", "training", "trainval", "train_val", "train-val"),
    "val": ("val", "validation", "valid", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
# for annotations: the test set is taken for validation only if there is no validation set
SPLITS = {"train": WORDS["train"], "val": (*WORDS["val"], *WORDS["test"])}

SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}
_ANY = "|".join(sorted(SPLIT_OF, key=len, reverse=True))
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
    return word and SPLIT_OF[word]


def split_of_file(name: str) -> str | None:
    """The split of a shard or table, whose name may have other words: ``imagenet-train-0000.tar``."""
    stem = re.sub(r"\.(tar|tar\.gz|tgz|parquet)$", "", name.lower())
    found = _PLAIN.fullmatch(stem) or _WORD.search(stem)
    return found and SPLIT_OF[found[1]]


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
            alike.setdefault(rest, {})[name] = SPLIT_OF[word[1]]
    for own in alike.values():
        if len(set(own.values())) > 1:
            found |= own
    return found


def join(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
