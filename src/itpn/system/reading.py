"""Files that are read whole: only regular ones, and no more of them than such a file can have."""

import os
import stat

MAX_TEXT = 2**24  # bytes of names, labels, settings and indexes: ImageNet-21K's 21,841 class names have 0.7 million


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
