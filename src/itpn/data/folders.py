"""Output folders that a command fills file by file: if it is stopped, the same command resumes."""

import os
import re
from pathlib import Path
from typing import Any

from itpn.errors import UserError
from itpn.system.text import readable


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
