"""Kinds of files, by their names. Standard library only, so that it is quick."""

import os
from collections import Counter
from collections.abc import Iterable

from itpn.errors import LOST, MachineError, remedy
from itpn.system.text import readable

JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp")
ARRAY_SUFFIXES = (".npy", ".npz", ".h5", ".hdf5")  # often of something else, see `leave_arrays`
IMAGE_SUFFIXES = (
    *JPEG_SUFFIXES,
    *(".png", ".webp", ".bmp", ".tif", ".tiff", ".btf", ".tf8", ".gif", ".avif", ".heic", ".heif"),
    *(".jp2", ".j2k", ".dcm", ".dicom", *ARRAY_SUFFIXES),
)
PHOTO_SUFFIXES = (*JPEG_SUFFIXES, ".png", ".webp", ".bmp", ".gif", ".avif", ".heic", ".heif")
COMMON_SUFFIXES = ".jpg .png .webp .tif .heic .jp2 .dcm .npy .h5 and others"  # for messages
ENVI_SUFFIXES = (".img", ".dat", ".bsq", ".bil", ".bip")  # of images where ENVI's header is beside them
ENVI_HEADER = ".hdr"
DICOM_START = 132  # bytes, the last four of which are DICM
DICOM_INDEX = "dicomdir"  # of a disk: a file of DICOM's format without an image
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
TABLE_SUFFIX = ".parquet"
CACHE_INDEX = "itpn-features.json"  # in the output folder of `itpn cache-features`
STATS_FILE = "stats.json"  # of `itpn stats`, in the folder of the images
COPIES_INDEX = "itpn-shrink.json"  # in the output folder of `itpn shrink`
CLASSES = "classes.txt"  # beside shards: the name of each class, a line each
CLASS_FILES = (CLASSES, "classes.csv", "class_dict.csv", "objectInfo150.txt")  # beside masks; the last is ADE20K's
ARCHIVES = (".zip", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst")
MOST_SUFFIXES = 8  # listed in a line
# folders of Linux, macOS, Synology and Windows, in lower case
SYSTEM_FOLDERS = {"lost+found", "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information"}
# counted by kind, not by suffix: links in archives; pipes, sockets and devices; images that are no band of one
LINK, SPECIAL, NO_BAND = "link", "special file", "not among --data.bands"


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
    """Whether a name alone is that of an image, as in archives and lists; of files see :func:`is_image_file`."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_image_file(path: str) -> bool:
    """Whether a file is an image, by its name, or else by ENVI's header beside it or by the first bytes of DICOM.

    Only files without a suffix, or with a number as in ``1.2.840.113.17``, are looked into.
    """
    if is_image(path):
        return True
    name, suffix = os.path.splitext(os.path.basename(path).lower())
    if suffix in ENVI_SUFFIXES:
        return find_envi_header(path) is not None
    if (suffix and not suffix[1:].isdecimal()) or name == DICOM_INDEX:
        return False
    return _read_start(path, DICOM_START).endswith(b"DICM")


def find_envi_header(path: str) -> str | None:
    """The header of an image of ENVI, a file beside it: its name with .hdr in place of its suffix, or after it."""
    for header in (os.path.splitext(path)[0] + ENVI_HEADER, path + ENVI_HEADER):
        if header != path and os.path.isfile(header) and _read_start(header, 4) == b"ENVI":
            return header
    return None


def _read_start(path: str, size: int) -> bytes:
    """The first bytes of a file; none of one that may not be read, which does not count as an image then.

    Raises:
        MachineError: the file system fails.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(size)
    except OSError as error:
        if error.errno in LOST:
            raise MachineError(f"{path} cannot be read: {error.strerror}; {remedy(error)}") from None
        return b""


def is_array(name: str) -> bool:
    return name.lower().endswith(ARRAY_SUFFIXES)


def leave_arrays(paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Images, and arrays that are none: those that other images have beside them are features, labels or the like."""
    images = list(paths)
    others = [path for path in images if not is_array(path)]
    if not others or len(others) == len(images):
        return images, []
    return others, [path for path in images if is_array(path)]


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
