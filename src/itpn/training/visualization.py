"""Visualizations of what the network predicts, during a run."""

import math
from pathlib import Path

import torch

from itpn.system.writing import open_whole
from itpn.training.loggers.group import Loggers
from itpn.training.state import Training


class Visualizations:
    """What the network makes of the same images at the start, during and at the end of a run; by the main process.

    Of a sharded network there are none: one process would miss the others' parts.

    Attributes:
        latest: the file of the last step's.
    """

    def __init__(self, run: Training, loggers: Loggers) -> None:
        self.latest: Path | None = None
        self._run = run
        self._draw = run.job.draw if run.main and not run.sharded else None
        self._loggers = loggers
        self._every = run.config.trainer.visualize_every_n_steps or math.ceil(run.length.total_steps / 10)

    @property
    def due(self) -> bool:
        run = self._run
        return self._draw is not None and (run.step % self._every == 0 or run.at_end)

    def write(self) -> None:
        if self._draw is None:
            return
        run, self.latest = self._run, self.path
        # these few images are of no size worth compiling for
        with run.fabric.autocast(), torch.compiler.set_stance("force_eager"):
            drawn = self._draw()
        with run.folder.writing(self.latest), open_whole(self.latest) as file:
            drawn.save(file, "PNG")
        self._loggers.log_image(run.folder.visualizations.name, drawn, run.step)

    @property
    def path(self) -> Path:
        return self._run.folder.visualizations / f"step-{self._run.step:08d}.png"
