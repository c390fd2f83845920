"""Folders that a command fills file by file: stopped at any moment, the same command goes on."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from itpn.errors import UserError


@contextmanager
def open_whole(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under its name when it is complete, or not at all."""
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        with unfinished.open("wb") as file:
            yield file
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):  # room for others, where the disk is full
            unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def open_whole_text(path: Path) -> Iterator[IO[str]]:
    """As :func:`open_whole`, for UTF-8 text whose ends of lines are written as they are given."""
    with open_whole(path) as file, io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="") as text:
        yield text


def write_whole(path: Path, content: bytes) -> None:
    with open_whole(path) as file:
        file.write(content)


def check_settings(folder: Path, before: dict[str, Any], now: dict[str, Any], what: str) -> None:
    """Refuse to go on in a folder that holds ``what`` of other settings, or of other "files".

    Raises:
        UserError: naming the first that differs.
    """
    for key, value in now.items():
        if before.get(key) != value:
            difference = "of other images" if key == "files" else f"with {key} {before.get(key)}, not {value}"
            raise UserError(f"{folder} holds {what} {difference}; choose another --out")
