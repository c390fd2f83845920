"""Checkpoints of a run, and how all its processes stop at the same step."""

import contextlib
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from itpn.errors import MachineError, RunStopped, UserError
from itpn.system.signals import SignalHandlers
from itpn.system.text import one_line
from itpn.training.callbacks import Aside, Monitor
from itpn.training.run_folder import RunFolder
from itpn.training.run_state import DAMAGE, save_to

STATE = "Checkpointing"  # where a checkpoint holds what :class:`Checkpointing` keeps


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints in place; Lightning's own way is through a file in the folder of temporary files.

    Attributes:
        problem: why the last one could not be written; None where it was. It is raised once all processes know it.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.problem: str | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.problem = None
        step = checkpoint["global_step"]
        best = checkpoint["callbacks"].get(STATE, {}).get("best_step") == step
        try:
            with self.folder.writing(self.folder.last):
                self.folder.put_checkpoint(lambda file: save_to(file, checkpoint), step, best)
        except MachineError as error:
            self.problem = str(error)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> Any:
        try:
            return torch.load(path, map_location=map_location, weights_only=weights_only)
        except (OSError, MemoryError, RuntimeError) as error:  # it was whole a moment ago
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise MachineError(f"checkpoint {path} cannot be read: {reason}; nothing was changed") from error


@contextlib.contextmanager
def restoring(checkpoint: Path | None) -> Iterator[None]:
    """Raise UserError for what Lightning, or a callback that it asks, does not find in a checkpoint.

    Its bytes are those that were written, but not by a run of this kind and version.
    """
    try:
        yield
    except Exception as error:
        frames = traceback.walk_tb(error.__traceback__)
        inside = any("checkpoint_connector" in frame.f_code.co_filename for frame, _ in frames)
        if not inside or not (isinstance(error, DAMAGE) or "in loading state_dict" in str(error)):
            raise
        raise UserError(
            f"checkpoint {checkpoint} is damaged: no run can be restored from it "
            f"({one_line(f'{type(error).__name__}: {error}'.partition(chr(10))[0])}); nothing was changed: choose "
            "another --name, or move it away to resume from the one before"
        ) from error


class Vote:
    """Whether any process wants to stop; the answer of a step comes with the next, so that nobody waits for it.

    To look at it at once would make the host wait for the device in every step, and the device then for the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # beside the stream that computes, which must not wait for what the other processes say either
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._asked: tuple[Tensor, Callable[[], Any]] | None = None

    def ask(self, stop: bool) -> bool:
        """Vote, all processes together; returns what the vote before this one came to, False where there was none."""
        before = self._asked
        with torch.cuda.stream(self._stream):
            flag = torch.full((), int(stop), device=self.device)
            work = torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, async_op=True)
            assert work is not None
            if self._stream is None:
                self._asked = flag, work.wait
            else:
                work.wait()  # the stream does, not the host
                answer = flag.to("cpu", non_blocking=True)
                self._asked = answer, self._stream.record_event().synchronize
        if before is None:
            return False
        flag, wait = before
        wait()
        return bool(flag)


class Checkpointing(Aside):
    """Writes a checkpoint every so many optimiser steps, at the last one, and when a signal asks to stop.

    Only after a whole optimiser step, so that a resumed run equals an uninterrupted one. Several processes stop a step
    after the one in which the signal came.
    """

    def __init__(self, folder: RunFolder, monitor: Monitor, every_n_steps: int) -> None:
        self.folder = folder
        self.monitor = monitor
        self.every_n_steps = every_n_steps
        self.score_of_step = float("-inf")
        self.best_score = float("-inf")
        self.best_step = -1
        self.restored: dict[str, Any] = {}
        self._signum: int | None = None
        self.signals = SignalHandlers(self._ask_to_stop)

    @property
    def state_key(self) -> str:
        return STATE

    def state_dict(self) -> dict[str, Any]:
        scores = {"score": self.score_of_step, "best_score": self.best_score, "best_step": self.best_step}
        return {**scores, "training": self.monitor.describe()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restored = state_dict
        self.best_score = float(state_dict["best_score"])
        self.best_step = int(state_dict.get("best_step", -1))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self._total = int(trainer.estimated_stepping_batches)
        self._vote = Vote(pl_module.device) if trainer.world_size > 1 else None
        self.signals.set()  # Lightning has just put handlers of its own in the place of ours
        self.restore_best(trainer)

    def restore_best(self, trainer: L.Trainer) -> None:
        """Let ``best.ckpt`` be what the best score is of, all processes together."""
        if self.restored:
            self._step = trainer.global_step
            if trainer.is_global_zero:
                with self.folder.writing(self.folder.best):
                    self._restore_best()
            self.best_score, self.best_step = trainer.strategy.broadcast((self.best_score, self.best_step))

    def _restore_best(self) -> None:
        """Let ``best.ckpt`` be of the best step; a kill can come after a checkpoint and before its second name."""
        best = self.folder.find_best(self.best_step)
        if best is not None:
            if best != self.folder.best:
                self.folder.put_best(best)
            return
        scores = self.folder.read_scores(self.folder.best)
        if scores is None and self.folder.resumed is not None:  # there is none, and nothing to make it from
            scores = {**self.restored, "best_score": self.restored.get("score", self.best_score)}
            scores["best_step"] = self._step
            self.folder.put_best(self.folder.resumed)
        # else it is of a step that is to be taken again, as the last checkpoint was damaged
        self.best_score = (scores or {}).get("best_score", self.best_score)
        self.best_step = (scores or {}).get("best_step", self.best_step)

    def _ask_to_stop(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None and signum == signal.SIGINT:
            raise RunStopped(signum)  # the second Ctrl-C does not wait for the step to end
        self._signum = signum

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # in the middle of an accumulated batch
        self._step = trainer.global_step
        # after the last step all that is left is to write the files; several processes stop at the same step
        stop = self._signum is not None
        if self._step == self._total:
            stop = False
        elif self._vote is not None:
            stop = self._vote.ask(stop)
        watcher = self.monitor.watcher
        judged = watcher is not None and watcher.step == self._step and watcher.score is not None
        better = judged and self.score() > self.best_score
        if stop or better or self._step % self.every_n_steps == 0 or self._step == self._total:
            with self.beside_training(pl_module.device):
                self.save(trainer, batch)
        if stop:
            raise RunStopped(self._signum or signal.SIGTERM)

    def score(self) -> float:
        """How good the network is at this step: the watcher's score at its steps, or else the loss with its sign."""
        watcher = self.monitor.watcher
        if watcher is not None and watcher.score is not None:
            return watcher.score if watcher.step == self._step else float("-inf")
        loss = self.monitor.metrics.get("loss")
        return float("-inf") if loss is None else -loss

    def save(self, trainer: L.Trainer, batch: dict[str, Any]) -> None:
        """Write a checkpoint, all processes together.

        Raises:
            MachineError: it cannot be written; on every process.
        """
        self.monitor.check_finite(trainer, batch, weights=True)
        self.score_of_step = self.score()
        if self.score_of_step > self.best_score:
            self.best_score, self.best_step = self.score_of_step, trainer.global_step
        problem = None
        try:
            if trainer.is_global_zero:
                self.monitor.flush(trainer)
        except MachineError as error:
            problem = str(error)
        trainer.save_checkpoint(self.folder.last)
        files = trainer.strategy.checkpoint_io
        if isinstance(files, CheckpointFiles):
            problem = problem or files.problem
        problem = trainer.strategy.broadcast(problem)  # nobody takes another step before it is written
        if problem is not None:
            raise MachineError(problem)
