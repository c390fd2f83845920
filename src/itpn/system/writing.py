"""Output: files that appear under their name when they are complete, or not at all, and the folders that hold them."""

import contextlib
import errno
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from itpn.errors import UserError, refusal
from itpn.system.text import readable


@contextlib.contextmanager
def open_whole(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing; it takes its name, and the place of an earlier file, once all of it is on the disk.

    Until then it is ``NAME.tmp`` in the same folder, which only a killed process leaves behind.
    """
    # a name of the greatest length has no room for another suffix
    partial = path.with_name(os.fsdecode(os.fsencode(path.name)[:100]) + ".tmp")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power failure can leave an empty file; a full network disk says so here
        partial.replace(path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # room for others, where the disk is full
            partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes) -> None:
    with open_whole(path) as file:
        file.write(content)


@contextlib.contextmanager
def open_whole_text(path: Path) -> Iterator[IO[str]]:
    """As :func:`open_whole`, for UTF-8 text whose ends of lines are written as they are given.

    Bytes of a file name that are not UTF-8 become ``\\xNN``.
    """
    with open_whole(path) as file:
        text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="")
        yield text
        text.flush()
        text.detach()  # or else it closes the file before that is on the disk


def sync_folder(path: Path) -> None:
    """Make new names in a folder survive a power failure, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_partial_files(folder: Path) -> None:
    """Remove what killed processes have left of files that they were writing into a folder."""
    for partial in folder.glob("*.tmp"):
        if partial.is_file() or partial.is_symlink():
            partial.unlink(missing_ok=True)


def make_folder(out: Path) -> None:
    """A folder for results."""
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Turn an :class:`OSError` into one line.

    Raises:
        UserError: a path where no files can be.
        MachineError: a full disk and the like.
    """
    try:
        yield
    except OSError as error:
        raise refusal(f"--out {out} cannot be written", error) from error


def check_writable(out: Path) -> None:
    """Refuse a file that cannot be written, before the work whose results it is for.

    Raises:
        UserError, MachineError: as of :func:`writing_to`.
    """
    with writing_to(out):
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=out.parent):
            pass


def name_output(folder: Path, number: int, name: str, ending: str) -> str:
    """The output file name of an image: ``0003-NAME.png``, truncated to what the file system allows.

    Args:
        number: index of the image, by which images of one name differ.
        name: of the image: a path, or a shard and a member. Its folders and suffix are dropped.
        ending: of the file name, with the suffix.
    """
    try:
        most = os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # not on Windows, nor on every file system
        most = 255
    start = f"{number:04d}-"
    stem = re.sub(r'[\x00-\x1f\x7f-\x9f\u2028\u2029/\\:*?"<>|]', "_", Path(readable(name)).stem)
    room = most - len(start) - len(ending)
    return start + stem.encode()[:room].decode(errors="ignore") + ending


def check_settings(folder: Path, before: dict[str, Any], now: dict[str, Any], what: str) -> None:
    """Refuse to resume in a folder that holds ``what`` of other settings, or of other "files".

    Raises:
        UserError: names the first setting that differs.
    """
    for key, value in now.items():
        if before.get(key) != value:
            difference = "of other images" if key == "files" else f"with {key} {before.get(key)}, not {value}"
            raise UserError(f"{folder} holds {what} {difference}; choose another --out")
