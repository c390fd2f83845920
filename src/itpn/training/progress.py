"""How far a run is, and how fast."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from itpn.training.state import Training

SECONDS = 10  # between lines: a log file wants few


class Speed:
    """Images and seconds of training: neither the first pass of a compiled network counts, nor evaluation,
    visualizations and checkpoints.

    Attributes:
        seconds: of training, in this process.
        interval: seconds between the last two calls of :meth:`measure`.
    """

    def __init__(self, device: torch.device) -> None:
        self.images = 0
        self.seconds = self.wait_fraction = self.interval = 0.0
        self._device = device
        self._beside = 0.0
        self._made = time.perf_counter()
        self._earlier = 0.0  # of the process that took the last step, where it is not this one
        self._begin = self._made

    @property
    def now(self) -> float:
        """A clock that stands still beside training."""
        return time.perf_counter() - self._beside

    @property
    def duration(self) -> float:
        """Seconds of the whole run in the process that took its last step."""
        return self._earlier or time.perf_counter() - self._made

    def restart(self, waited: float) -> float:
        """Begin to measure, when a loader has been waited for so many seconds; returns the seconds until now."""
        seconds, self._begin = self.now - self._begin, self.now
        self._mark, self._mark_images = self._begin, 0
        self._begin_wait = self._mark_wait = waited
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what is done beside training."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the steps that the GPU has yet to compute are training
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._beside += time.perf_counter() - begin

    def measure(self, waited: float) -> dict[str, float]:
        """The speed since the last call."""
        now = self.now
        self.interval, self.seconds = now - self._mark, now - self._begin
        self.wait_fraction = (waited - self._begin_wait) / self.seconds
        found = {
            "images_per_second": (self.images - self._mark_images) / self.interval,
            "data_wait_fraction": (waited - self._mark_wait) / self.interval,
        }
        self._mark, self._mark_images, self._mark_wait = now, self.images, waited
        return found

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("images", "seconds", "wait_fraction", "duration")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For a run that has no step left to take."""
        self.images, self.seconds = state.get("images", 0), state.get("seconds", 0.0)
        self.wait_fraction, self._earlier = state.get("wait_fraction", 0.0), state.get("duration", 0.0)


class ProgressReport:
    """A bar in a terminal, or now and then a line in a log file."""

    def __init__(self, run: Training) -> None:
        self._run = run
        self._printed = 0.0
        self._bar: Progress | None = None
        if run.main and run.console.is_terminal:
            columns = ("epoch {task.fields[epoch]}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[metrics]}"), console=run.console)
            self._bar.add_task("", total=run.length.total_steps, completed=run.step, epoch=run.epoch, metrics="")
            self._bar.start()

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._run.step, epoch=self._run.epoch)

    def report(self, metrics: str, seconds_per_step: float) -> None:
        run, total = self._run, self._run.length.total_steps
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], metrics=metrics)
        elif time.perf_counter() - self._printed > SECONDS or run.at_end:
            self._printed = time.perf_counter()
            left = f"{(total - run.step) * seconds_per_step:.0f} s left"
            run.console.print(f"step {run.step}/{total}  epoch {run.epoch}  {metrics}  {left}", highlight=False)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
