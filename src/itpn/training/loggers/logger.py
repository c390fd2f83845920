"""What a logger of a run can be told, and where it keeps the id under which its service knows the run."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from itpn.errors import UserError
from itpn.system.text import one_line
from itpn.system.writing import write_whole
from itpn.training.run_folder import RunFolder

Ending = Literal["finished", "stopped", "failed"]
"""Of a run in this process; a stopped one is resumed later."""


class Logger:
    """Shows a run beside its ``metrics.csv``: its settings, metrics, visualizations and final files.

    Used by the main process alone. Its methods are called in the order of steps.
    """

    def start(self) -> None:
        """Begin, or continue what an earlier process has logged; before every other method.

        Raises:
            UserError: it is not installed, or its settings or the user's account are wrong.
            MachineError: it cannot be reached, or has no room.
        """

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Log those that are known."""
        raise NotImplementedError

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        raise NotImplementedError

    def log_files(self, files: Sequence[Path]) -> None:
        """Files that the run ends with."""

    def flush(self) -> None:
        """Bring to its place what was logged: a checkpoint follows, after which it is not logged again."""

    def close(self, ending: Ending) -> None:
        raise NotImplementedError


def import_library(name: str) -> Any:
    """The library of a logger.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        return import_module(name)
    except Exception as error:  # of versions that do not fit together libraries raise anything
        raise UserError(
            f"--trainer.logger {name}: {name} cannot be imported ({describe(error)}): pip install 'itpn[{name}]'"
        ) from error


def describe(error: Exception) -> str:
    """An error of a library in one line of bounded length: a database's holds all that it was to store."""
    text = one_line(f"{type(error).__name__}: {error}")
    return text if len(text) <= 300 else f"{text[:300]} ..."


def read_run_id(folder: RunFolder, logger: str) -> str | None:
    """The id under which a logger's service knows this run; None where that is not known."""
    return _read_ids(folder).get(logger)


def keep_run_id(folder: RunFolder, logger: str, run_id: str) -> None:
    """Remember an id, so that a resumed run is continued there."""
    ids = {**_read_ids(folder), logger: run_id}
    with folder.writing(folder.logger_ids):
        write_whole(folder.logger_ids, (json.dumps(ids, indent=2) + "\n").encode())


def _read_ids(folder: RunFolder) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        ids = json.loads(folder.logger_ids.read_bytes())
        if isinstance(ids, dict):
            return {name: run_id for name, run_id in ids.items() if isinstance(run_id, str)}
    return {}
