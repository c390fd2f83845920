"""Files that parts are read of stay open for the next parts."""

import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from itpn.data.decode import UnreadableImage, reason_of
from itpn.data.readers import check_lost

File = TypeVar("File")
Version = tuple[tuple[int, int], ...]  # time and size of files


def find_version(paths: Sequence[str | Path]) -> Version:
    """What tells that files have been changed.

    Raises:
        UnreadableImage: one is not there.
    """
    try:
        return tuple((status.st_mtime_ns, status.st_size) for status in map(os.stat, paths))
    except (OSError, ValueError) as error:
        check_lost(paths[0], error)
        raise UnreadableImage(reason_of(error)) from None


class OpenFiles(Generic[File]):
    """The files that windows were read of last, open. Each process has its own, because it moves in them.

    Args:
        most: files at a time; of those that are dropped nothing stays open.
    """

    def __init__(self, most: int = 4) -> None:
        self._most, self._process = most, os.getpid()
        self._files: dict[Hashable, File] = {}

    def find(self, key: Hashable) -> File | None:
        if self._process != os.getpid():
            self._process, self._files = os.getpid(), {}
        if (file := self._files.pop(key, None)) is not None:
            self._files[key] = file  # the last
        return file

    def keep(self, key: Hashable, file: File) -> None:
        self._files[key] = file
        while len(self._files) > self._most:
            del self._files[next(iter(self._files))]
