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
PHOTO_SUFFIXES = (*JPEG_SUFFIXES, ".png", ".webp", ".bmp", ".gif", ".avif", ".heic", ".heif")
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
TABLE_SUFFIX = ".parquet"
CACHE_INDEX = "itpn-features.json"  # in the output folder of `itpn cache-features`
COPIES_INDEX = "itpn-shrink.json"  # in the output folder of `itpn shrink`
CLASSES = "classes.txt"  # beside shards: the name of each class, a line each
CLASS_FILES = (CLASSES, "classes.csv", "class_dict.csv", "objectInfo150.txt")  # beside masks; the last is ADE20K's
ARCHIVES = (".zip", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst")
MOST_SUFFIXES = 8  # listed in a line
# folders of Linux, macOS, Synology and Windows, in lower case
SYSTEM_FOLDERS = {"lost+found", "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information"}
# counted by kind, not by suffix: links in archives; pipes, sockets and devices
LINK, SPECIAL = "link", "special file"


def describe_file(path: str) -> str:
    """The kind of a file that is not read, and what to do, as the end of a message."""
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


def describe_unread(unread: Counter[str], before: str = "") -> str:
    """Unread files by suffix or kind, the most frequent first, after ``before``; empty if there are none."""
    if not unread:
        return ""
    ranked = sorted(unread.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = [
        f"{count:,} {suffix or 'without a suffix'}{'s' * (suffix in (LINK, SPECIAL) and count > 1)}"
        for suffix, count in ranked[:MOST_SUFFIXES]
    ]
    if rest := ranked[MOST_SUFFIXES:]:
        shown.append(f"{sum(count for _, count in rest):,} of {len(rest)} other suffixes")
    return f"{before}not read: {', '.join(shown)}"


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_shard(name: str) -> bool:
    return name.lower().endswith(SHARD_SUFFIXES)


def is_table(name: str) -> bool:
    return name.lower().endswith(TABLE_SUFFIX)


def is_hidden(name: str) -> bool:
    """Whether any part of a relative path starts with a dot, or is a folder of the operating system."""
    return any(
        (part.startswith(".") and part not in (".", "..")) or part.lower() in SYSTEM_FOLDERS for part in name.split("/")
    )


def suffix_of(name: str) -> str:
    """The suffix of a name, as counts of unread files list it."""
    lower = os.path.basename(name).lower()
    return next(
        (suffix for suffix in SHARD_SUFFIXES[1:] if lower.endswith(suffix)), readable(os.path.splitext(lower)[1])
    )
