"""TensorBoard's event files of a run."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from itpn.training.loggers.logger import Ending, Logger
from itpn.training.run_folder import RunFolder


class EventFiles(Logger):
    """Writes ``tensorboard/`` of a run.

    TensorBoard writes in a thread of its own; what goes wrong there is raised by the next call.

    Args:
        purge_step: events of an earlier process from this step on are hidden; None for a new run.

    Raises:
        MachineError: events cannot be written; by every method.
    """

    def __init__(self, folder: RunFolder, purge_step: int | None) -> None:
        self._folder = folder
        self._purge_step = purge_step
        self._writer: Any = None

    def _write(self, method: str, *args: Any, **options: Any) -> None:
        with self._folder.writing(self._folder.events):
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter  # slow to import, and for the main process alone

                self._writer = SummaryWriter(str(self._folder.events), purge_step=self._purge_step)
            getattr(self._writer, method)(*args, **options)

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None:
        for name, value in metrics.items():
            if value is not None:
                self._write("add_scalar", name, value, step)

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        self._write("add_image", name, np.asarray(image), step, dataformats="HWC")

    def flush(self) -> None:
        if self._writer is not None:
            self._write("flush")

    def close(self, ending: Ending) -> None:
        self.flush()
        if self._writer is not None:
            self._write("close")


@contextmanager
def quiet_thread() -> Iterator[None]:
    """No traceback of TensorBoard's thread, whose error the next call raises."""
    hook, threading.excepthook = threading.excepthook, _leave_to_caller
    try:
        yield
    finally:
        threading.excepthook = hook


def _leave_to_caller(arguments: threading.ExceptHookArgs) -> None:
    if not type(arguments.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(arguments)
