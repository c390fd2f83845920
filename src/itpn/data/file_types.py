"""Kinds of files, by their names. Standard library only, so that it is quick."""

import os
from collections import Counter

from itpn.system.text import readable

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
MOST_SUFFIXES = 8  # that a line names
# of Linux, macOS, Synology and Windows; in lower case
SYSTEM_FOLDERS = {"lost+found", "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information"}
# what is counted by kind, not by suffix: in archives, and pipes, sockets and devices
LINK, SPECIAL = "link", "special file"


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


def suffix_of(name: str) -> str:
    """As a count of files that are not read calls it."""
    lower = os.path.basename(name).lower()
    return next(
        (suffix for suffix in SHARD_SUFFIXES[1:] if lower.endswith(suffix)), readable(os.path.splitext(lower)[1])
    )
