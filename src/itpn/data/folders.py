"""Folders that a command fills file by file: stopped at any moment, the same command goes on."""

from pathlib import Path
from typing import Any

from itpn.errors import UserError


def check_settings(folder: Path, before: dict[str, Any], now: dict[str, Any], what: str) -> None:
    """Refuse to go on in a folder that holds ``what`` of other settings, or of other "files".

    Raises:
        UserError: naming the first that differs.
    """
    for key, value in now.items():
        if before.get(key) != value:
            difference = "of other images" if key == "files" else f"with {key} {before.get(key)}, not {value}"
            raise UserError(f"{folder} holds {what} {difference}; choose another --out")
