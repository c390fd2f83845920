"""What happens beside the training step: figures and pictures."""

import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.distributed.tensor import DTensor

from itpn.data.loader import TrainingLoader
from itpn.data.skipped import SkippedImages
from itpn.errors import NonFiniteLoss
from itpn.models.modes import eval_mode
from itpn.system.console import print_aside, tell_remarks
from itpn.system.writing import open_whole
from itpn.training.compilation import Compilation
from itpn.training.metrics_file import append_row, complete_row, keep_rows
from itpn.training.module import TrainingTask
from itpn.training.run_folder import RunFolder
from itpn.training.run_state import save_to
from itpn.training.tensorboard import EventFiles


class Aside(L.Callback):
    """A callback that takes time beside training, which does not count in the speed of training.

    Attributes:
        seconds: spent so, in this process.
    """

    seconds = 0.0

    @contextmanager
    def beside_training(self, device: torch.device) -> Iterator[None]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the steps that the GPU has yet to compute are training
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - begin


class Watcher(Aside, ABC):
    """Looks at the network at the end of every so many epochs, and of the run.

    A watcher adds :meth:`look`, and ``score`` where checkpoints are judged by it.

    Args:
        names: of the figures that it finds.

    Attributes:
        figures: those found last; None each before.
        score: of the last look, larger is better; None where figures do not say how good a network is.
        step: of the last look.
    """

    def __init__(self, names: Sequence[str], every_n_epochs: int) -> None:
        self.figures: dict[str, float | None] = dict.fromkeys(names)
        self.every_n_epochs = every_n_epochs
        self.score: float | None = None
        self.step = -1
        self._said: set[str] = set()

    def say_skipped(self, trainer: L.Trainer, skipped: list[tuple[str, str]]) -> None:
        """Name images that could not be read, each once in a run."""
        for name, reason in skipped:
            if trainer.is_global_zero and name not in self._said:
                self._said.add(name)
                print_aside(f"skipped {name}: {reason}")

    @abstractmethod
    def look(self, trainer: L.Trainer) -> dict[str, float]:
        """Find the figures anew, on every process together, the task in eval mode."""

    def describe(self) -> dict[str, str]:
        """Rows of the table at the end."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"figures": self.figures, "score": self.score, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.figures = state_dict["figures"]
        self.score = state_dict.get("score")
        self.step = state_dict.get("step", -1)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainingTask)
        self._step = trainer.global_step
        self._total = int(trainer.estimated_stepping_batches)
        self._every = self.every_n_epochs * pl_module.steps_per_epoch()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step:
            return  # in the middle of an accumulated batch
        self._step = step
        if step % self._every == 0 or step == self._total:
            self.evaluate(trainer, pl_module)

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the metrics of this step, on every process together."""
        with self.beside_training(pl_module.device), eval_mode(pl_module):
            self.figures = {**self.figures, **self.look(trainer)}
        self.step = trainer.global_step


class Monitor(L.Callback):
    """Keeps the figures of a run: progress bar, metrics.csv, TensorBoard, images that were skipped.

    Losses stay on the device and are read back every ``log_every_n_steps`` optimiser steps. Speed is that of training:
    it counts neither the first pass of a compiled network nor evaluation, visualizations and checkpoints.
    """

    def __init__(
        self,
        folder: RunFolder,
        skipped: SkippedImages,
        console: Console,
        every_n_steps: int,
        watcher: Watcher | None = None,
        compilation: Compilation | None = None,
    ) -> None:
        self.folder = folder
        self._compilation = compilation
        self._first_compiles = compilation is not None and compilation.pending
        self.every_n_steps = every_n_steps
        self.skipped = skipped
        self.console = console
        self.images_seen = 0
        self.watcher = watcher
        self.metrics: dict[str, float | None] = {}
        self.seconds = 0.0  # of training, in this process
        self.images = 0  # likewise
        self.wait_fraction = 0.0
        self.duration: float | None = None  # of the process that took the last step, where it is not this one
        self.started = False
        self._made = time.perf_counter()
        self.device = torch.device("cpu")
        self._collapsed = False
        self._broken: list[tuple[str, str]] = []
        self._remarks: dict[str, tuple[str, str]] = {}
        self._first_bad: Tensor | None = None
        self._sums: dict[str, Tensor] = {}
        self._passes = 0
        self._progress: Progress | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"images_seen": self.images_seen, "skipped": self.skipped.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.images_seen = int(state_dict["images_seen"])
        self.skipped.load_state_dict(state_dict["skipped"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.device = pl_module.device  # after the run, Lightning has moved everything to the CPU
        self._step = trainer.global_step
        self._total = int(trainer.estimated_stepping_batches)
        self.started = self._step < self._total  # Lightning calls this for a complete run as well
        if not self.started:
            return
        self._marked_step = self._step
        self._printed = 0.0
        self._start_clock(trainer, 0.0)
        if trainer.is_global_zero:
            with self.folder.writing(self.folder.metrics):  # those after it are written again
                keep_rows(self.folder.metrics, lambda step: step <= trainer.global_step)
            if self.console.is_terminal:
                self._progress = Progress(
                    TextColumn("epoch {task.fields[epoch]}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeRemainingColumn(),
                    TextColumn("{task.fields[figures]}"),
                    console=self.console,
                )
                self._bar = self._progress.add_task(
                    "", total=self._total, completed=trainer.global_step, epoch=trainer.current_epoch, figures=""
                )
                self._progress.start()

    def _start_clock(self, trainer: L.Trainer, waited: float) -> None:
        self._begin = self._mark = self._trained(trainer)
        self._begin_wait = self._mark_wait = waited
        self._mark_images = 0

    @staticmethod
    def _trained(trainer: L.Trainer) -> float:
        """A clock that stands still beside training: each of these callbacks tells how long."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        return time.perf_counter() - sum(callback.seconds for callback in callbacks if isinstance(callback, Aside))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        if self._first_compiles:
            self._first_compiles = False
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()
            if self._compilation is not None and self._compilation.active:
                self.console.print(f"compiled in {self._trained(trainer) - self._begin:.0f} s", highlight=False)
            self._start_clock(trainer, self._loader(trainer).wait_seconds)
        else:
            self.images += len(batch["image"]) * trainer.world_size
        self.images_seen += len(batch["image"]) * trainer.world_size
        self._broken += batch["corrupt"]
        self._remarks = {**batch["warnings"], **self._remarks}
        if trainer.world_size == 1:
            self._count_skipped(trainer)
        for name, figure in outputs["figures"].items():
            self._sums[name] = self._sums.get(name, 0) + figure
        self._passes += 1
        number = torch.full((), trainer.fit_loop.epoch_loop.total_batch_idx, device=pl_module.device)
        first = torch.full_like(number, -1) if self._first_bad is None else self._first_bad
        self._first_bad = torch.where((first < 0) & ~torch.isfinite(outputs["figures"]["loss"]), number, first)

        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        if self._progress is not None:
            self._progress.update(self._bar, completed=self._step, epoch=trainer.current_epoch)
        watched = self.watcher is not None and self.watcher.step == self._step
        due = stepped and (self._step % self.every_n_steps == 0 or self._step == self._total or watched)
        # on a GPU only with the figures: asking makes the device wait
        if due or pl_module.device.type == "cpu":
            self.check_finite(trainer, batch)
        if due:
            self._report(trainer)

    def _count_skipped(self, trainer: L.Trainer) -> None:
        """Name and count new broken files of all processes; all stop together where there are too many."""
        told: list[Any] = [(self._broken, self._remarks)]
        if trainer.world_size > 1:
            told = [None] * trainer.world_size
            torch.distributed.all_gather_object(told, (self._broken, self._remarks))
        self._broken, self._remarks = [], {}
        for message in self.skipped.update(item for broken, _ in told for item in broken):
            print_aside(f"skipped {message}", self.console)
        for _, remarks in told:
            tell_remarks(remarks, self.console)
        images = self._loader(trainer).images
        self.skipped.check(min(self.images_seen, images), epoch_ended=self.images_seen >= images)

    @staticmethod
    def _loader(trainer: L.Trainer) -> TrainingLoader:
        task = trainer.lightning_module
        assert isinstance(task, TrainingTask)
        assert task.loader is not None
        return task.loader

    def check_finite(self, trainer: L.Trainer, batch: dict[str, Any], weights: bool = False) -> None:
        """Stop if the loss since the last report, or a weight, is not finite.

        Raises:
            NonFiniteLoss: after writing batch, step and the names of such weights beside the checkpoints.
        """
        task = trainer.lightning_module
        assert isinstance(task, TrainingTask)
        loss = float(self._sums["loss"]) / self._passes if self._passes else 0.0
        finite = math.isfinite(loss)
        if finite and weights:
            finite = all(is_finite(p) for p in task.model.parameters())
        if finite:
            return
        broken = [n for n, p in task.model.named_parameters() if not is_finite(p)]
        step = trainer.global_step
        evidence = self.folder.path / f"nonfinite-step-{step:08d}-rank-{trainer.global_rank}.pt"
        found = {
            "step": step,
            "epoch": trainer.current_epoch,
            "loss": loss,
            # on a GPU the loss is read now and then, so the batch at hand may come after the first bad one, which
            # the same settings make again
            "first_batch_with_nonfinite_loss": int(self._first_bad) if self._first_bad is not None else -1,
            "batch": {"image": move_data_to_device(batch["image"], "cpu"), "key": batch["key"]},
            "nonfinite_parameters": broken,
        }
        where = f"are in {evidence}"
        try:
            with open_whole(evidence) as file:
                save_to(file, found)
        except OSError as error:  # which must not hide what happened
            where = f"could not be written to {evidence} ({error.strerror or error})"
        what = f"loss is {loss}" if broken == [] or not weights else "weights are not finite"
        raise NonFiniteLoss(
            f"{what} at step {step}, epoch {trainer.current_epoch}: stopped; the batch and the names of weights that "
            f"are not finite {where}; checkpoints in {self.folder.checkpoints} are from before; try a lower "
            "--optimizer.lr, --optimizer.clip-grad 1 or --trainer.precision 32-true under another --name"
        )

    def _report(self, trainer: L.Trainer) -> None:
        self._count_skipped(trainer)
        now = self._trained(trainer)
        loader = self._loader(trainer)
        elapsed = now - self._mark
        means = torch.stack([*self._sums.values()]) / self._passes
        means = trainer.strategy.reduce(means, reduce_op="mean")  # all at once
        reduced = dict(zip(self._sums, means.tolist(), strict=True))
        self.metrics = {
            **reduced,
            "lr": max(group["lr"] for group in trainer.optimizers[0].param_groups),
            "images_per_second": (self.images - self._mark_images) / elapsed,
            "data_wait_fraction": (loader.wait_seconds - self._mark_wait) / elapsed,
            **({} if self.watcher is None else self.watcher.figures),
        }
        self.seconds = now - self._begin
        self.wait_fraction = (loader.wait_seconds - self._begin_wait) / self.seconds
        self._mark, self._mark_images, self._mark_wait = now, self.images, loader.wait_seconds
        steps, self._marked_step = self._step - self._marked_step, self._step
        self._sums, self._passes = {}, 0
        if not trainer.is_global_zero:
            return
        self._warn_of_collapse(trainer)
        found = {} if self.watcher is None else self.watcher.figures
        if self.watcher is not None and self.watcher.step != self._step:  # they are of a step before
            found = dict.fromkeys(found)
        row = {**self.metrics, **found}
        with self.folder.writing(self.folder.metrics):
            append_row(self.folder.metrics, {"step": self._step, "epoch": trainer.current_epoch, **row})
        for logger in trainer.loggers:
            logger.log_metrics({name: v for name, v in row.items() if v is not None}, step=self._step)
        figures = (
            f"loss {self.metrics['loss']:.4f}  lr {self.metrics['lr']:.2e}  "
            f"{self.metrics['images_per_second']:.0f} images/s"
        )
        if self.watcher is not None:
            figures += "".join(f"  {name} {v:.3f}" for name, v in self.watcher.figures.items() if v is not None)
        if self._progress is not None:
            self._progress.update(self._bar, figures=figures)
        elif time.perf_counter() - self._printed > 10 or self._step == self._total:  # a log file wants few lines
            self._printed = time.perf_counter()
            left = (self._total - self._step) * elapsed / steps
            self.console.print(
                f"step {self._step}/{self._total}  epoch {trainer.current_epoch}  {figures}  {left:.0f} s left",
                highlight=False,
            )

    def _warn_of_collapse(self, trainer: L.Trainer) -> None:
        """Say once when the targets of a moving average become the same for all units of all images."""
        task = trainer.lightning_module
        assert isinstance(task, TrainingTask)
        spreads = {name: value for name, value in self.metrics.items() if name.startswith("target_std_")}
        low = {name: v for name, v in spreads.items() if v is not None and v < task.config.teacher.min_std}
        if low and not self._collapsed:
            name, value = next(iter(low.items()))
            self._collapsed = True
            self.console.print(
                f"warning: the teacher is collapsing: {name} is {value:.3f} at step {self._step}, below "
                f"--teacher.min-std {task.config.teacher.min_std}; try a higher --teacher.momentum, a lower "
                "--optimizer.lr or more weight on pixels, under another --name",
                style="yellow",
                highlight=False,
                soft_wrap=True,
            )

    def flush(self, trainer: L.Trainer) -> None:
        """Bring to the disk what was logged, before a checkpoint after which it will not be logged again."""
        if not self.folder.metrics.exists():
            return
        with self.folder.writing(self.folder.metrics), self.folder.metrics.open("rb") as file:
            os.fsync(file.fileno())
        for logger in trainer.loggers:
            if isinstance(logger, EventFiles):
                logger.flush()

    def describe(self) -> dict[str, Any]:
        """What a summary says of training, as numbers that a checkpoint can hold."""
        return {
            "metrics": self.metrics,
            "images": self.images,
            "seconds": self.seconds,
            "wait_fraction": self.wait_fraction,
            "duration": time.perf_counter() - self._made,
        }

    def restore(self, described: dict[str, Any]) -> None:
        """Undo :meth:`describe`, for a run that has no step left to take."""
        for name, value in described.items():
            setattr(self, name, value)

    def add_evaluation(self, trainer: L.Trainer) -> None:
        """Log an evaluation that was made after the last step."""
        assert self.watcher is not None
        figures = self.watcher.figures
        self.metrics = {**self.metrics, **figures}
        if trainer.is_global_zero:
            with self.folder.writing(self.folder.metrics):
                complete_row(self.folder.metrics, {"step": trainer.global_step, **figures})
            for logger in trainer.loggers:
                logger.log_metrics({n: v for n, v in figures.items() if v is not None}, step=trainer.global_step)

    def stop_bar(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.stop_bar()


class Pictures(Aside):
    """What the network makes of the same images at the start, during and at the end of a run.

    Args:
        draw: draws it.
        every_n_steps: None for ten pictures in a run.
    """

    def __init__(self, folder: RunFolder, draw: Callable[[], Image.Image], every_n_steps: int | None) -> None:
        self.folder = folder
        self.draw = draw
        self.every_n_steps = every_n_steps
        self.latest: Path | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self._total = int(trainer.estimated_stepping_batches)
        self._every = self.every_n_steps or math.ceil(self._total / 10)
        if trainer.is_global_zero and self._step < self._total:
            self.write(trainer, self._step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step or not trainer.is_global_zero:
            return
        self._step = step
        if step % self._every == 0 or step == self._total:
            self.write(trainer, step)

    def write(self, trainer: L.Trainer, step: int) -> None:
        with self.beside_training(trainer.strategy.root_device):
            self._write(trainer, step)

    def _write(self, trainer: L.Trainer, step: int) -> None:
        # these few images are of no size worth compiling for
        with trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
            picture = self.draw()
        self.latest = self.path(step)
        with self.folder.writing(self.latest), open_whole(self.latest) as file:
            picture.save(file, "PNG")
        for logger in trainer.loggers:
            if isinstance(logger, EventFiles):
                logger.log_image(self.folder.pictures.name, picture, step)

    def path(self, step: int) -> Path:
        return self.folder.pictures / f"step-{step:08d}.png"


def is_finite(parameter: Tensor) -> bool:
    """Of a sharded one, the part that this process holds."""
    own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return bool(torch.isfinite(own).all())
