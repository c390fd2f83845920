"""TensorBoard's event files of a run."""

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from itpn.training.run_folder import RunFolder


class EventFiles(TensorBoardLogger):
    """Writes ``tensorboard/`` of a run.

    TensorBoard writes in a thread of its own; what goes wrong there is raised by the next call.

    Args:
        purge_step: events of an earlier process from this step on are hidden; None for a new run.

    Raises:
        MachineError: events cannot be written; by every method.
    """

    def __init__(self, folder: RunFolder, purge_step: int | None) -> None:
        super().__init__(folder.path, name="", version="tensorboard", purge_step=purge_step)
        self.folder = folder

    @property
    def experiment(self) -> Any:
        with self.folder.writing(self.folder.events):
            return super().experiment

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with self.folder.writing(self.folder.events):
            for name, value in metrics.items():
                self.experiment.add_scalar(name, value, step)

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        with self.folder.writing(self.folder.events):
            self.experiment.add_image(name, np.asarray(image), step, dataformats="HWC")

    def flush(self) -> None:
        with self.folder.writing(self.folder.events):
            self.experiment.flush()

    def save(self) -> None:
        """Nothing: Lightning would write its own file of settings here."""

    def finalize(self, status: str) -> None:
        if self._experiment is None:
            return
        try:
            with self.folder.writing(self.folder.events):
                self.experiment.flush()
                self.experiment.close()
        except Exception:
            if status == "success":
                raise  # else something else went wrong before, which is what is said


def leave_to_caller(arguments: threading.ExceptHookArgs) -> None:
    """For ``threading.excepthook``: no traceback of TensorBoard's thread, whose error the next call raises."""
    if not type(arguments.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(arguments)
