"""The loggers of a run, told everything together."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image
from rich.console import Console

from itpn.errors import RunStopped
from itpn.training.config import RunConfig
from itpn.training.loggers.logger import Ending, Logger
from itpn.training.loggers.mlflow import MLflowRun
from itpn.training.loggers.tensorboard import EventFiles, quiet_thread
from itpn.training.loggers.wandb import WandbRun
from itpn.training.run_folder import RunFolder


class Loggers:
    """Loggers of a run; none of a process that is not the main one.

    They begin with :meth:`start`, or with what is logged first.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = loggers
        self._started: list[Logger] = []

    def start(self) -> None:
        for logger in self._loggers[len(self._started) :]:
            logger.start()
            self._started.append(logger)

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None:
        self.start()
        for logger in self._loggers:
            logger.log_metrics(metrics, step)

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        self.start()
        for logger in self._loggers:
            logger.log_image(name, image, step)

    def log_files(self, files: Sequence[Path]) -> None:
        self.start()
        for logger in self._loggers:
            logger.log_files(files)

    def flush(self) -> None:
        for logger in self._started:
            logger.flush()

    def close(self, ending: Ending) -> None:
        for logger in self._started:
            logger.close(ending)


@contextmanager
def open_loggers(folder: RunFolder, config: RunConfig, step: int, console: Console, main: bool) -> Iterator[Loggers]:
    """The loggers that the settings ask for, until the run ends in this process.

    Args:
        step: of the checkpoint that the run resumes from; 0 for none.
        main: whether this is the process that logs.
    """
    purge_step = step if step or folder.restarted else None
    makers = {
        "tensorboard": lambda: EventFiles(folder, purge_step),
        "wandb": lambda: WandbRun(folder, config, step > 0, console),
        "mlflow": lambda: MLflowRun(folder, config, step > 0, console),
    }
    loggers = Loggers([makers[name]() for name in dict.fromkeys(config.trainer.logger)] if main else [])
    with quiet_thread():
        try:
            yield loggers
            loggers.close("finished")
        except BaseException as error:
            with suppress(Exception):  # something else went wrong before, which is what is said
                loggers.close("stopped" if isinstance(error, RunStopped | KeyboardInterrupt) else "failed")
            raise
