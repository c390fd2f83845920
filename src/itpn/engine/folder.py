"""A run's folder: who may use it, what was run in it, and its checkpoints."""

import contextlib
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from itpn.config import RunConfig, read_yaml, to_dict, write_yaml
from itpn.engine.console import print_aside
from itpn.errors import UserError, refusal

# what may differ when a run goes on; anything else would make it another run
FREE = {
    "model": {"checkpoint", "grad_checkpointing"},
    "teacher": {"checkpoint", "min_std"},
    "data": {"num_workers", "max_broken"},
    "probe": {"root", "every_n_epochs", "max_images"},
    "evaluation": {"every_n_epochs", "batch_size", "neighbours"},
    "trainer": {
        "max_epochs",
        "max_steps",
        "precision",
        "accelerator",
        "devices",
        "num_nodes",
        "compile",
        "checkpoint_every_n_steps",
        "keep_checkpoints",
        "log_every_n_steps",
        "picture_every_n_steps",
    },
}


class RunFolder:
    """``OUTPUT_DIR/RECIPE/NAME``."""

    def __init__(self, config: RunConfig, recipe: str) -> None:
        self.path = Path(config.output_dir) / recipe / config.name
        self.checkpoints = self.path / "checkpoints"
        self.pictures = self.path / ("reconstructions" if config.task == "pretraining" else "predictions")
        self.weights = self.path / "model.safetensors"
        self.metrics = self.path / "metrics.csv"
        self.last = self.checkpoints / "last.ckpt"
        self.keep = config.trainer.keep_checkpoints
        self._last_step = 0
        self._lock = FileLock(self.path / ".lock")

    @property
    def begun(self) -> bool:
        """Whether there is a run to go on with."""
        return any(self.checkpoints.glob("*.ckpt"))

    def open(self, config: RunConfig, recipe: str) -> None:
        """Make the folder, take it for this process and write down the settings.

        Raises:
            UserError: another process uses it, it cannot be written, or it holds a run with other settings.
        """
        try:
            for folder in (self.checkpoints, self.pictures):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)  # let go by the system, however this process ends
        except Timeout:
            raise UserError(
                f"run folder {self.path} is in use by another process; wait for it, or choose another --name"
            ) from None
        except OSError as error:
            raise refusal(f"run folder {self.path} (see --output-dir) cannot be written", error) from error
        settings = self.path / "config.yaml"
        if settings.exists() and self.begun:
            _check_same_run(read_yaml(settings)[1], config, self.path)
        write_yaml(settings, recipe, config)
        for leftover in self.checkpoints.glob("*.tmp"):
            leftover.unlink()

    def close(self) -> None:
        self._lock.release()

    def newest_checkpoint(self, main: bool) -> tuple[Path | None, int]:
        """The newest whole checkpoint and its optimiser step, (None, 0) where there is none.

        A damaged one is passed over with a remark, and put aside by the ``main`` process.

        Raises:
            UserError: there are checkpoints, but none can be read.
        """
        older = sorted(self.checkpoints.glob("step-*.ckpt"), reverse=True)
        present = [path for path in [self.last, *older, self.checkpoints / "best.ckpt"] if path.exists()]
        for path in present:
            try:
                if zipfile.ZipFile(path).testzip() is not None:  # reads every byte against its checksum
                    raise zipfile.BadZipFile("checksum")
                stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                self._last_step = int(stored["global_step"])
                return path, self._last_step
            except Exception as error:  # whatever damage raises
                if main:
                    print_aside(f"checkpoint {path} is damaged ({type(error).__name__}): passing to the one before")
                    path.replace(path.with_suffix(".damaged"))
        if present:
            raise UserError(f"none of the checkpoints in {self.checkpoints} can be read; choose another --name")
        return None, 0

    def put_checkpoint(self, unfinished: Path, step: int, best: bool) -> None:
        """Let a finished file become ``last.ckpt``; the one before stays under its step's name."""
        if self.last.exists() and self._last_step != step:
            os.replace(self.last, self.checkpoints / f"step-{self._last_step:08d}.ckpt")
        os.replace(unfinished, self.last)
        self._last_step = step
        if best:
            link = self.checkpoints / "best.tmp"
            try:
                os.link(self.last, link)  # the same bytes under a second name, for nothing
            except OSError:  # a file system without hard links
                shutil.copyfile(self.last, link)
            os.replace(link, self.checkpoints / "best.ckpt")
        older = sorted(self.checkpoints.glob("step-*.ckpt"), reverse=True)
        for path in older[self.keep - 1 :]:
            path.unlink()


def _check_same_run(earlier: RunConfig, config: RunConfig, path: Path) -> None:
    before, now = to_dict(earlier), to_dict(config)
    if earlier.task != config.task:
        raise UserError(f"{path} holds a run of {earlier.task}, not of {config.task}; choose another --name")
    for section in [name for name in now if isinstance(now[name], dict)]:
        for key, value in now[section].items():
            if value != before[section][key] and key not in FREE.get(section, set()):
                _refuse(path, f"--{section}.{key.replace('_', '-')}", before[section][key], value)
    if before["seed"] != now["seed"]:
        _refuse(path, "--seed", before["seed"], now["seed"])


def _refuse(path: Path, option: str, before: Any, now: Any) -> None:
    raise UserError(
        f"{path} holds a run with {option} {before}, not {now}; choose another --name "
        f"(and --model.checkpoint {path}/checkpoints/last.ckpt to start from its weights)"
    )


def make_folder(out: Path) -> None:
    """A folder for results."""
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Raise :class:`UserError` for a path where no files can be, :class:`MachineError` for a full disk and the like."""
    try:
        yield
    except OSError as error:
        raise refusal(f"--out {out} cannot be written", error) from error
