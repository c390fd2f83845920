"""Files that parts are read of stay open for the next parts."""

import os
from collections.abc import Hashable

from itpn.data.formats.image_file import ImageFile


class OpenFiles:
    """The files that windows were read of last, open. Each process has its own, because it moves in them.

    Args:
        most: files at a time; of those that are dropped nothing stays open.
    """

    def __init__(self, most: int) -> None:
        self._most, self._process = most, os.getpid()
        self._files: dict[Hashable, ImageFile] = {}

    def find(self, key: Hashable) -> ImageFile | None:
        if self._process != os.getpid():
            self._process, self._files = os.getpid(), {}
        if (file := self._files.pop(key, None)) is not None:
            self._files[key] = file  # the last
        return file

    def keep(self, key: Hashable, file: ImageFile) -> None:
        self._files[key] = file
        while len(self._files) > self._most:
            del self._files[next(iter(self._files))]
