"""``stats.json``, the statistics of a folder's images: written by `itpn stats`, used by training."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from itpn.data.bands import split_bands
from itpn.data.file_types import STATS_FILE
from itpn.data.files import ImageSource, find_training_images
from itpn.data.readers import FileReader, Reader, Subset
from itpn.data.shard_images import ShardImages
from itpn.data.statistics import Statistics, compute_statistics
from itpn.data.stored import ReadSettings
from itpn.data.windows import Windows
from itpn.errors import UserError
from itpn.system.text import one_line, read_text
from itpn.system.writing import write_whole

UNWRITTEN = ("notes", "warnings")
MEASURED = 10_000  # files whose sizes are compared: statistics of more do not depend on one of them


def as_reader(images: ImageSource | Reader) -> Reader:
    """Images by index."""
    if not isinstance(images, ImageSource):
        return images
    return ShardImages(images.shards, images.members) if images.shards else FileReader(images.images)


def find_statistics(
    images: ImageSource | Reader,
    reading: ReadSettings,
    value_range: Sequence[str],
    data: Any,
    progress: Callable[[int, int], object] = lambda read, total: None,
) -> tuple[Statistics, str, list[str]]:
    """Statistics of images to train on: as `itpn stats` has written them, or computed.

    Args:
        reading: with the images' type.
        value_range: as of :func:`itpn.data.statistics.compute_statistics`; the file is used where it is empty.
        data: settings of data: the root, and how its images are found.
        progress: as of :func:`itpn.data.statistics.compute_statistics`.

    Returns:
        The statistics, where they are from, and what is remarkable, a sentence each.

    Raises:
        UserError: images differ, or none can be read.
    """
    if reading.stretch is not None:
        value_range = ("0", "1")
    notes = list[str]()
    roots = data.root if isinstance(data.root, tuple) else (data.root,)
    path = Path(roots[0], STATS_FILE)
    if len(roots) == 1 and not value_range and path.is_file():
        written = read_statistics(path)
        if reading.nodata not in (None, written.nodata):
            notes.append(f"{one_line(str(path))} is of another --data.nodata: not used")
        elif written.type == reading.type and _covers(written, images, roots[0], data):
            return written, one_line(str(path)), notes
        else:
            notes.append(f"{one_line(str(path))} is of other images: not used")
    found = compute_statistics(as_reader(images), reading, value_range, progress=progress)
    what = "windows" if isinstance(images, Windows) else "images"
    return found, f"{found.sampled:,} of {found.images:,} {what}", notes


def _covers(written: Statistics, images: ImageSource | Reader, root: str, data: Any) -> bool:
    """Whether statistics are of all images of a folder, as they are now, and some images are among these."""
    try:
        source = find_training_images((root,), getattr(data, "members", ()), getattr(data, "bands", ()))
    except UserError:
        return False
    if sign_images(source, root) != written.fingerprint:
        return False
    if isinstance(images, ImageSource):
        return images == source
    files: Any = images
    while hasattr(files, "files") and not isinstance(files, Subset):  # of labelled images and of windows
        files = files.files
    if source.shards:
        own = {os.path.basename(shard) for shard in source.shards}
        return all(files.name(index).split("/")[0] in own for index in range(len(files)))
    known = FileReader(source.images)
    names = {os.path.normpath(known.name(index)) for index in range(len(known))}
    return all(os.path.normpath(files.name(index)) in names for index in range(len(files)))


def sign_images(source: ImageSource, root: str) -> str:
    """What changes when images of a folder are added, renamed, removed or replaced by others of another size."""
    paths = source.images or source.shards
    measured = {*np.linspace(0, len(paths) - 1, min(MEASURED, len(paths))).round().astype(int).tolist()}
    digest = hashlib.sha256()
    for number, path in enumerate(paths):
        sizes = [_size(own) for own in split_bands(path)] if number in measured else []
        name = path.removeprefix(root).lstrip(os.sep)
        digest.update(f"{name}\n{sizes}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # said when it is read
        return -1


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Write ``stats.json``."""
    content = {name: value for name, value in dataclasses.asdict(statistics).items() if name not in UNWRITTEN}
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def read_statistics(path: Path) -> Statistics:
    """Undo :func:`write_statistics`.

    Raises:
        UserError: the file is something else.
    """
    try:
        content: dict[str, Any] = json.loads(read_text(path))
        content["value_range"] = tuple((float(low), float(high)) for low, high in content["value_range"])
        content["percentiles"] = {name: tuple(values) for name, values in content["percentiles"].items()}
        own: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
        }
        statistics = Statistics(**own)
        _check(statistics)
        return statistics
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a file of `itpn stats` ({type(error).__name__}: {error}): remove it") from error


def _check(own: Statistics) -> None:
    """Raise :class:`ValueError` or :class:`TypeError` for numbers that cannot be those of images."""
    channels = (own.minimum, own.maximum, own.mean, own.std, own.scaled_mean, own.scaled_std)
    lists = [*channels, *own.percentiles.values()]
    if not isinstance(own.fingerprint, str):
        raise TypeError("a fingerprint that is no text")
    if any(len(values) != own.channels for values in (*lists, own.value_range)):
        raise ValueError("different numbers of channels")
    numbers = itertools.chain(*lists, *own.value_range, (own.nodata_fraction, own.nodata or 0.0))
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("numbers that are not finite")
    if min(own.scaled_std) <= 0 or any(low >= high for low, high in own.value_range):
        raise ValueError("a standard deviation or value range of 0")
