"""Encoded images by index, from files, tar archives and tables: random access."""

import errno
import gzip
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from itpn.data.bands import MARK, BandsOf, name_image, split_bands
from itpn.data.decode import UnreadableImage, reason_of
from itpn.data.file_types import PHOTO_SUFFIXES
from itpn.errors import FORBIDDEN, LOST, MachineError, UserError, remedy
from itpn.seeding import derive_seed
from itpn.system.text import one_line, read_bounded, readable

MAX_FILE = 2**31  # bytes of an image file: float RGB of the largest image that is decoded has 1.6 GB
GZIP = b"\x1f\x8b"  # magic bytes
MAX_UNPACKED = 2**33  # bytes of compressed archives that are kept in memory
RETRY_AFTER = (1.0, 5.0, 15.0)  # seconds, after which a network mount may be back


class Reader(Protocol):
    """``reader[i]`` is an image's name, what `itpn.data.samples.open_sample` opens, and its annotation if any."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, ...]: ...

    def name(self, index: int) -> str: ...


class PackedStrings:
    """Strings in two arrays. A list would be copied into every worker process, as reading changes reference counts.

    Strings are decoded like file names, which differs from UTF-8 only in a C locale.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())


def read_file(path: str, start: int = 0, size: int = -1) -> bytes:
    """A file's content, or ``size`` bytes of it. Errors that may be temporary, as of a network mount, are retried.

    Raises:
        MachineError: the file system fails.
        OSError: the file is missing, or may not be read.
        ValueError: it is not a regular file, or is larger than `MAX_FILE`.
    """
    for wait in (*RETRY_AFTER, None):
        try:
            if size < 0:
                return read_bounded(path, MAX_FILE)
            with open(path, "rb") as file:
                file.seek(start)
                return file.read(size)
        except OSError as error:
            if wait is None or error.errno not in LOST:
                check_lost(path, error)
                raise
            time.sleep(wait)
    raise AssertionError


def check_lost(path: str | Path, error: Exception) -> None:
    """Raise :class:`MachineError` if the file system fails; return if the file is corrupt."""
    if isinstance(error, OSError) and error.errno in LOST:
        raise MachineError(f"{one_line(str(path))} cannot be read: {error.strerror}; {remedy(error)}") from error


def remedy_of_loss(name: str, reason: str) -> str:
    """What to do about a file that existed at the start and is now missing, or must not be read.

    Empty if the image itself is corrupt.
    """
    if reason == os.strerror(errno.ENOENT) and not os.path.lexists(name):
        return remedy(OSError(errno.EIO, reason))  # the mount is lost
    number = next((number for number in FORBIDDEN if os.strerror(number) == reason), None)
    return "" if number is None else remedy(OSError(number, reason))


class FileReader:
    """Single files: the content of a photograph, the path of what may be read in parts, the paths of bands."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.names = PackedStrings(paths)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return readable(name_image(self.names[index]))

    def path(self, index: int) -> Path | BandsOf:
        """That of a file, or those of an image's bands."""
        path = self.names[index]
        return BandsOf(tuple(map(Path, split_bands(path)))) if MARK in path else Path(path)

    def __getitem__(self, index: int) -> tuple[str, bytes | Path | BandsOf | UnreadableImage]:
        path = self.names[index]
        if MARK in path or not path.lower().endswith(PHOTO_SUFFIXES):
            return readable(name_image(path)), self.path(index)
        try:
            return readable(path), read_file(path)
        except (OSError, ValueError) as error:
            return readable(path), UnreadableImage(reason_of(error))


@dataclass(frozen=True)
class Subset:
    """Some of a reader's images.

    Attributes:
        rows: their indices, int64 [n].
    """

    files: Reader
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.files.name(int(self.rows[index]))

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.files[int(self.rows[index])]


def locate(images: Reader, index: int) -> Any:
    """As ``images[index][1]``; of a file it is the path, without reading it."""
    if isinstance(images, Subset):
        return locate(images.files, int(images.rows[index]))
    return images.path(index) if isinstance(images, FileReader) else images[index][1]


def draw_order(images: Reader, seed: int) -> np.ndarray:
    """A random order of images, int64 [n], by seed and file name: other folders or more images change it little."""
    # "share" is part of the seed: another word would draw other images
    keys = [derive_seed(seed, "share", os.path.basename(images.name(index))) for index in range(len(images))]
    return np.argsort(np.array(keys, dtype=np.uint64), kind="stable")


def draw_images(images: Reader, fraction: float, seed: int) -> np.ndarray:
    """A fraction of images, at least one: indices in ascending order. A larger fraction has those of a smaller one."""
    return np.sort(draw_order(images, seed)[: max(1, round(fraction * len(images)))])


class TarReader:
    """Members of tar archives, by their positions; a compressed archive is unpacked into memory.

    Args:
        shards: the archives.
        places: index of the archive, first byte and number of bytes of each member, int64 [n, 3].
        names: of the members.
    """

    def __init__(self, shards: Sequence[str], places: np.ndarray, names: Sequence[str]) -> None:
        self.shards = list(shards)
        self.places = places
        self.names = PackedStrings(names)
        left = MAX_UNPACKED
        self._unpacked: dict[int, bytes] = {}
        for number, path in enumerate(shards):
            if is_compressed(path):
                self._unpacked[number] = unpack(path, left)
                left -= len(self._unpacked[number])

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return readable(self.names[index])

    def __getitem__(self, index: int) -> tuple[str, bytes | UnreadableImage]:
        number, start, size = (int(value) for value in self.places[index])
        name = self.name(index)
        if size > MAX_FILE:
            return name, too_large(size)
        if number in self._unpacked:
            return name, self._unpacked[number][start : start + size]
        try:
            return name, read_file(self.shards[number], start, size)
        except OSError as error:
            return name, UnreadableImage(reason_of(error))


def is_compressed(path: str) -> bool:
    return read_head(path, len(GZIP)) == GZIP


def read_head(path: str | Path, size: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(size)


def unpack(path: str, most: int) -> bytes:
    """The content of a compressed file.

    Raises:
        UserError: more than ``most`` bytes, or corrupt.
    """
    content = bytearray()
    try:
        with gzip.open(path) as file:
            while len(content) <= most and (part := file.read(2**24)):
                content += part
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"shard {path} is corrupt ({error}): make it again") from error
    if len(content) > most:
        raise UserError(
            f"compressed archives are unpacked into memory, and with {path} they take more than "
            f"{MAX_UNPACKED // 2**30} GiB: unpack them with gunzip, and give the .tar files"
        )
    return bytes(content)


def too_large(size: int) -> UnreadableImage:
    return UnreadableImage(f"{size:,} bytes, more than the {MAX_FILE:,} that are read")


@dataclass(frozen=True)
class TableReader:
    """Rows of a data set of Hugging Face's ``datasets``, with encoded images in a column."""

    table: Any
    column: str

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        return f"row {index}"

    def __getitem__(self, index: int) -> tuple[str, bytes | UnreadableImage]:
        image = self.table[index][self.column] or {}
        return self.name(index), image.get("bytes") or UnreadableImage("no image in it")
