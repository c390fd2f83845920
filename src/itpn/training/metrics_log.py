"""The metrics of a run: metrics.csv, loggers, and a line in the terminal."""

import math
import os
from typing import Any

import torch
from torch import Tensor

from itpn.distributed import mean
from itpn.training.guards import CorruptFiles, NonFiniteGuard, is_finite
from itpn.training.loggers.group import Loggers
from itpn.training.metrics_file import append_row, complete_row, keep_rows
from itpn.training.progress import ProgressReport, Speed
from itpn.training.state import Training


class MetricsLog:
    """Collects the metrics of passes, and logs their means every so many optimizer steps.

    They stay on the device until then.

    Attributes:
        metrics: those logged last, with those of the last evaluation.
    """

    def __init__(self, run: Training, loggers: Loggers) -> None:
        self.run = run
        self.loggers = loggers
        self.speed = Speed(run.device)
        self.corrupt = CorruptFiles(run)
        self.guard = NonFiniteGuard(run)
        self.progress: ProgressReport | None = None
        self.metrics: dict[str, float | None] = {}
        self.images_seen = 0
        self._sums: dict[str, Tensor] = {}
        self._passes = 0
        self._logged_step = 0
        self._warned = False

    def start(self) -> None:
        run = self.run
        self.loggers.start()
        self._logged_step, self._compiling = run.step, run.compilation.pending
        self.speed.restart(run.loader.wait_seconds)
        if run.main:
            with run.folder.writing(run.folder.metrics):  # those after it are written again
                keep_rows(run.folder.metrics, lambda step: step <= run.step)
        self.progress = ProgressReport(run)

    def add_pass(self, batch: dict[str, Any], metrics: dict[str, Tensor]) -> None:
        """Take the metrics of a forward and backward pass."""
        run, images = self.run, len(batch["image"]) * self.run.processes
        if self._compiling:
            self._end_compilation()
        else:
            self.speed.images += images
        self.images_seen += images
        self.corrupt.add(batch)
        if run.processes == 1:
            self.corrupt.count(self.images_seen)
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0) + value
        self._passes += 1
        self.guard.add(metrics["loss"], run.passes - 1)
        if run.device.type == "cpu":  # on a GPU only with the metrics: asking makes the device wait
            self.check_finite(batch)

    def _end_compilation(self) -> None:
        self._compiling = False
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)
        seconds = self.speed.restart(self.run.loader.wait_seconds)
        if self.run.compilation.active:
            self.run.console.print(f"compiled in {seconds:.0f} s", highlight=False)

    def check_finite(self, batch: dict[str, Any], weights: bool = False) -> None:
        """Stop if the loss since the last log, or a weight, is not finite; see :class:`NonFiniteGuard`."""
        loss = float(self._sums["loss"]) / self._passes if self._passes else 0.0
        if not math.isfinite(loss):
            self.guard.stop(f"loss is {loss}", loss, batch)
        if weights and not all(is_finite(p) for p in self.run.module.model.parameters()):
            self.guard.stop("weights are not finite", loss, batch)

    def after_step(self, batch: dict[str, Any]) -> None:
        run, evaluation = self.run, self.run.evaluation
        assert self.progress is not None
        self.progress.advance()
        evaluated = evaluation is not None and evaluation.step == run.step
        if run.step % run.config.trainer.log_every_n_steps and not run.at_end and not evaluated:
            return
        self.check_finite(batch)
        self.corrupt.count(self.images_seen)
        speed = self.speed.measure(run.loader.wait_seconds)
        means = mean(torch.stack([*self._sums.values()]) / self._passes)  # all at once
        found = {} if evaluation is None else evaluation.metrics
        rate = max(group["lr"] for group in run.optimizer.param_groups)
        self.metrics = {**dict(zip(self._sums, means.tolist(), strict=True)), "lr": rate, **speed, **found}
        self._sums, self._passes = {}, 0
        steps, self._logged_step = run.step - self._logged_step, run.step
        if run.main:
            self._write({**self.metrics, **(found if evaluated else dict.fromkeys(found))})
            self.progress.report(self.describe(), self.speed.interval / steps)

    def _write(self, row: dict[str, float | None]) -> None:
        run = self.run
        warning = None if self._warned else run.module.warning(self.metrics, run.step)
        if warning is not None:
            self._warned = True
            run.console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
        with run.folder.writing(run.folder.metrics):
            append_row(run.folder.metrics, {"step": run.step, "epoch": run.epoch, **row})
        self.loggers.log_metrics(row, run.step)

    def describe(self) -> str:
        """The last metrics in a line."""
        loss, lr, speed = (self.metrics[name] for name in ("loss", "lr", "images_per_second"))
        found = {} if self.run.evaluation is None else self.run.evaluation.metrics
        shown = "".join(f"  {name} {value:.3f}" for name, value in found.items() if value is not None)
        return f"loss {loss:.4f}  lr {lr:.2e}  {speed:.0f} images/s{shown}"

    def add_evaluation(self, found: dict[str, float | None]) -> None:
        """Log an evaluation that was made after the last step."""
        run = self.run
        self.metrics = {**self.metrics, **found}
        if run.main:
            with run.folder.writing(run.folder.metrics):
                complete_row(run.folder.metrics, {"step": run.step, **found})
            self.loggers.log_metrics(found, run.step)

    def flush(self) -> None:
        """Bring to the disk what was logged, before a checkpoint after which it will not be logged again."""
        rows = self.run.folder.metrics
        if not rows.exists():
            return
        with self.run.folder.writing(rows), rows.open("rb") as file:
            os.fsync(file.fileno())
        self.loggers.flush()

    def state_dict(self) -> dict[str, Any]:
        """What a summary says of training, as numbers that a checkpoint can hold."""
        return {"metrics": self.metrics, **self.speed.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For a run that has no step left to take."""
        self.metrics = state.get("metrics", {})
        self.speed.load_state_dict(state)
