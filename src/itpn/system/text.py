"""What comes from outside: regular files of bounded size, text in UTF-8, and file names of any bytes.

Standard library only, so that it is quick.
"""

import codecs
import os
import re
import stat
import unicodedata
from collections.abc import Sequence

from itpn.errors import MachineError, UserError

MAX_TEXT = 2**24  # bytes of names, labels, settings and indexes: ImageNet-21K's 21,841 class names have 0.7 million
# what editors on Windows write; UTF-32 first, for its mark begins with that of UTF-16
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_bounded(path: str | os.PathLike[str], most: int, start: bytes = b"") -> bytes:
    """The content of a regular file.

    Args:
        start: what it starts with, a byte-order mark and blanks aside: a large file of zeros takes no memory then.

    Raises:
        ValueError: a pipe or a device, which may never end, more than ``most`` bytes, or another start.
        OSError: it is not there or cannot be read.
    """
    # opening a pipe that nobody writes to would block
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > most:
            raise ValueError(f"{status.st_size:,} bytes, more than the {most:,} that are read")
        if start and not file.peek(4096).lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n").startswith(start):
            raise ValueError(f"it does not start with {start.decode()}")
        content = file.read(status.st_size + 1)  # which takes that memory at once
        while len(content) <= most and (more := file.read(2**20)):  # it grew, or its system does not tell its size
            content += more
        if len(content) > most:
            raise ValueError(f"more than the {most:,} bytes that are read")
        return content


def read_text(path: str | os.PathLike[str], most: int = MAX_TEXT) -> str:
    """A text file in UTF-8, with or without a byte order mark, or in UTF-16 with one; lines end with ``\\n`` alone.

    The locale does not matter.

    Args:
        most: bytes of the largest file that is read.

    Raises:
        UserError: there is no such file, or it is in another encoding.
        MachineError: it cannot be read.
    """
    try:
        return decode_text(read_bounded(path, most), str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a text file") from None
    except OSError as error:
        raise MachineError(
            f"{path} cannot be read: {error.strerror or error}; check the disk and permissions"
        ) from None
    except ValueError as error:  # a pipe, or too large
        raise UserError(f"{path} cannot be read: {error}") from None


def decode_text(data: bytes, what: str) -> str:
    """As :func:`read_text`, of the content of ``what``."""
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise UserError(
            f"{what} is not text in UTF-8 (byte 0x{byte:02x} in line {line}): save it as UTF-8, e.g. by "
            "iconv -f LATIN1 -t UTF-8"
        ) from None
    if "\0" in text:
        raise UserError(
            f"{what} is not text in UTF-8 (line {text.count(chr(10), 0, text.index(chr(0))) + 1} holds a "
            "zero byte): save it as UTF-8"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | os.PathLike[str], strip: bool = True) -> list[str]:
    """The lines of a text file, without blanks around them and without empty ones at the end.

    Args:
        strip: else blanks are kept, and belong to a line.

    Raises:
        UserError, MachineError: as of :func:`read_text`.
    """
    text = read_text(path)
    return [line.strip() for line in text.rstrip().split("\n")] if strip else text.rstrip("\n").split("\n")


def readable(name: str) -> str:
    """A file name as text that every file and terminal can hold: bytes that are not UTF-8 become ``\\xNN``."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a character of two, as JSON may hold it
        return name.encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(text: str) -> str:
    """:func:`readable`, with line breaks and other control characters as escapes: what is printed or drawn."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: ascii(found[0])[1:-1], readable(text))


def either(names: Sequence[str]) -> str:
    """Choices in a sentence: "a", "a or b", "a, b or c"."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def as_class(name: str) -> str:
    """A class's name, its letters in one piece (Unicode's form C): macOS takes é apart in the names of folders."""
    return unicodedata.normalize("NFC", one_line(name))


def as_file_name(name: str) -> str:
    """A name from a text file the way the operating system's functions take it: only a C locale makes a difference."""
    try:
        return os.fsdecode(name.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:  # half a character of two, as JSON may hold it: no file is called so
        return readable(name)
