"""Encoded images by number, from files, tar archives and tables: what can be read in any order."""

import errno
import gzip
import os
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from itpn.data.decode import UnreadableImage
from itpn.errors import FORBIDDEN, LOST, MachineError, UserError, remedy
from itpn.system.reading import read_bounded
from itpn.system.text import one_line, readable

MAX_FILE = 2**31  # bytes of an image's file: floating-point RGB of the most pixels that are decoded has 1.6 GB
GZIP = b"\x1f\x8b"  # the first bytes
MAX_UNPACKED = 2**33  # bytes of compressed archives that are kept in memory
RETRY_AFTER = (1.0, 5.0, 15.0)  # seconds, in which a network mount may come back


class Reader(Protocol):
    """``reader[i]`` is an image's name, its file's bytes or why they cannot be had, and what else is known of it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, ...]: ...

    def name(self, index: int) -> str: ...


class PackedStrings:
    """Strings in two arrays. A list would be copied into every worker, as reading it touches reference counts.

    They come back the way the operating system takes file names, which only in a C locale makes a difference.
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
    """A file's content, or ``size`` bytes of it; what may pass, as the silence of a network mount, is tried again.

    Raises:
        MachineError: the file system does not give it.
        OSError: the file is at fault: it is not there, or may not be read.
        ValueError: it is no regular file, or larger than `MAX_FILE`.
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
    """Raise :class:`MachineError` where it is the file system that fails, and not the file that is damaged."""
    if isinstance(error, OSError) and error.errno in LOST:
        raise MachineError(f"{one_line(str(path))} cannot be read: {error.strerror}; {remedy(error)}") from error


def remedy_of_loss(name: str, reason: str) -> str:
    """What to do about a file that was found at the start and is not there any more, or must not be read.

    Empty where the image is at fault.
    """
    if reason == os.strerror(errno.ENOENT) and not os.path.lexists(name):
        return remedy(OSError(errno.EIO, reason))  # of a mount that is lost
    number = next((number for number in FORBIDDEN if os.strerror(number) == reason), None)
    return "" if number is None else remedy(OSError(number, reason))


class FileReader:
    """Single files."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.names = PackedStrings(paths)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return readable(self.names[index])

    def __getitem__(self, index: int) -> tuple[str, bytes | UnreadableImage]:
        path = self.names[index]
        try:
            return readable(path), read_file(path)
        except OSError as error:
            return readable(path), UnreadableImage(error.strerror or str(error))
        except ValueError as error:
            return readable(path), UnreadableImage(str(error))


class Subset:
    """Some of a reader's images.

    Args:
        rows: int64 [n], which.
    """

    def __init__(self, files: Reader, rows: np.ndarray) -> None:
        self.files, self.rows = files, rows

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.files.name(int(self.rows[index]))

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.files[int(self.rows[index])]


class TarReader:
    """Members of tar archives, by their places in them; a compressed archive is unpacked into memory.

    Args:
        shards: the archives.
        places: int64 [n, 3], the archive's number, the first byte and the number of bytes of each member.
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
            return name, UnreadableImage(error.strerror or str(error))


def is_compressed(path: str) -> bool:
    return read_head(path, len(GZIP)) == GZIP


def read_head(path: str | Path, size: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(size)


def unpack(path: str, most: int) -> bytes:
    """The content of a compressed file.

    Raises:
        UserError: more than ``most`` bytes, or damaged.
    """
    content = bytearray()
    try:
        with gzip.open(path) as file:
            while len(content) <= most and (part := file.read(2**24)):
                content += part
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"shard {path} is damaged ({error}): make it again") from error
    if len(content) > most:
        raise UserError(
            f"compressed archives are unpacked into memory, and with {path} they take more than "
            f"{MAX_UNPACKED // 2**30} GiB: unpack them with gunzip, and give the .tar files"
        )
    return bytes(content)


def too_large(size: int) -> UnreadableImage:
    return UnreadableImage(f"{size:,} bytes, more than the {MAX_FILE:,} that are read")


class TableReader:
    """Rows of a data set of Hugging Face's ``datasets`` with the encoded images in a column."""

    def __init__(self, table: Any, column: str) -> None:
        self.table = table
        self.column = column

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        return f"row {index}"

    def __getitem__(self, index: int) -> tuple[str, bytes | UnreadableImage]:
        image = self.table[index][self.column] or {}
        return self.name(index), image.get("bytes") or UnreadableImage("no image in it")
