"""A run's folder: who may use it, what was run in it, and its checkpoints."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from itpn.errors import FULL, WRONG_PATH, MachineError, UserError, refusal
from itpn.system.console import print_note
from itpn.system.writing import open_whole, remove_partial_files
from itpn.training.config import (
    AnyConfig,
    RunConfig,
    StoredSettings,
    from_dict,
    not_settings,
    read_yaml,
    to_dict,
    write_yaml,
)
from itpn.training.metrics_file import read_steps
from itpn.training.run_state import CorruptCheckpoint, find_settings, read_state


def is_open(value: Any) -> bool:
    """Whether images decide on a setting of this value: on percentiles, too."""
    return value in (None, (), "auto") or (isinstance(value, tuple) and str(value[0]).endswith("%"))


class RunFolder:
    """``OUTPUT_DIR/RECIPE/NAME``.

    Attributes:
        resumed: the checkpoint that the run resumes from; None where there is none.
        restarted: whether an earlier run in this folder was stopped before its first checkpoint.
    """

    def __init__(self, config: RunConfig, recipe: str) -> None:
        self.recipe = recipe
        self.path = Path(config.output_dir) / recipe / config.name
        self.checkpoints = self.path / "checkpoints"
        self.visualizations = self.path / config.visualizations
        self.settings = self.path / "config.yaml"
        self.weights = self.path / "model.safetensors"
        self.metrics = self.path / "metrics.csv"
        self.summary = self.path / "summary.json"
        self.events = self.path / "tensorboard"
        self.logger_ids = self.path / "loggers.json"
        self.last = self.checkpoints / "last.ckpt"
        self.best = self.checkpoints / "best.ckpt"
        self.keep = config.trainer.keep_checkpoints
        self.resumed: Path | None = None
        self.restarted = False
        self._earlier: StoredSettings | None = None  # in the checkpoint
        self._last_step = 0
        self._signature: tuple[int, ...] = ()  # of the file of `resumed`, as it was when it was read
        self._corrupt: list[tuple[Path, str]] = []  # files and reasons, not yet put aside
        self._lock = FileLock(self.path / ".lock")

    @property
    def begun(self) -> bool:
        """Whether there is a run to resume.

        Raises:
            MachineError: the folder of its checkpoints cannot be read.
        """
        return any(self._list_checkpoints())

    def open(self, config: RunConfig) -> None:
        """Make the folder, take it for this process, find the checkpoint to resume from, and write the settings.

        Raises:
            UserError: another process uses it, it is no folder, it holds a run with other settings, or no checkpoint
                in it is whole.
            MachineError: it cannot be read or written, or checkpoints that were there have gone.
        """
        self._list_checkpoints()  # a folder that cannot be read, or a link into nowhere, before anything is made
        self._check_kinds()
        try:
            for folder in (self.checkpoints, self.visualizations):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)  # let go by the system, however this process ends
        except Timeout:
            raise UserError(
                f"run folder {self.path} is in use by another process; wait for it, or choose another --name"
            ) from None
        except OSError as error:
            raise refusal(f"run folder {self.path} (see --output-dir) cannot be written", error) from error
        try:
            with self.writing(self.path):
                for folder in (self.path, self.checkpoints, self.visualizations):
                    remove_partial_files(folder)
            resumed, _ = self.newest_checkpoint(main=True)
            if resumed is None:
                self._begin_again(config)
            elif (earlier := self._read_settings()) is not None:
                _check_same_run(earlier, config, self.path)
            with self.writing(self.settings):
                write_yaml(self.settings, self.recipe, config)
        except BaseException:
            self.close()
            raise

    def restore(self, config: AnyConfig) -> AnyConfig:
        """Settings of a run that has begun, with those that it has found in its images where they leave them open.

        Raises:
            UserError: the run is of another task.
        """
        self.newest_checkpoint(main=False)
        if self._earlier is None:
            return config
        before, sections = _settings_of(self._earlier, config, self.path), {}
        for section, keys in config.from_images.items():
            own, known = getattr(config, section), getattr(before, section)
            found = {name: getattr(known, name) for name in keys if is_open(getattr(own, name, 0))}
            sections[section] = dataclasses.replace(own, **found)
        return dataclasses.replace(config, **sections)

    def check_same_run(self, config: RunConfig) -> None:
        """Raise :class:`UserError` where the checkpoint that was found is of a run with other settings."""
        if self._earlier is not None:
            _check_same_run(self._earlier, config, self.path)

    def close(self) -> None:
        self._lock.release()

    def newest_checkpoint(self, main: bool) -> tuple[Path | None, int]:
        """The newest whole checkpoint and its optimizer step, (None, 0) where there is none.

        A corrupt one is passed over with a remark, and put aside by the ``main`` process once a whole one is found.

        Raises:
            UserError: there are checkpoints, but none is whole.
            MachineError: one cannot be read, which may pass; nothing is renamed.
        """
        if self.resumed is None or self._signature != sign(self.resumed):
            self._find_newest(main)
        if self.resumed is not None and main:
            for path, reason in self._corrupt:
                print_note(f"checkpoint {path} is corrupt ({reason}): passing to the one before, {self.resumed.name}")
                with self.writing(path):
                    path.replace(path.with_suffix(".corrupt"))
            self._corrupt = []
        return self.resumed, self._last_step

    def _find_newest(self, main: bool) -> None:
        """Read checkpoints, the newest first, until one is whole."""
        names = self._list_checkpoints()
        corrupt: list[tuple[Path, str]] = []
        self.resumed, self._last_step, self._corrupt = None, 0, corrupt
        for path in (self.checkpoints / name for name in names if name.endswith(".ckpt")):
            if not main and not os.path.lexists(path):
                continue  # the main process has just put it aside
            try:
                state = read_state(path)
                settings = find_settings(state)
            except CorruptCheckpoint as error:
                corrupt.append((path, str(error)))
                continue
            # not the state itself: a file that is mapped takes its room after it is removed
            self.resumed, self._last_step, self._signature = path, state["global_step"], sign(path)
            self._earlier = settings
            break
        else:
            if names:
                reason = f": {corrupt[0][0].name} is corrupt ({corrupt[0][1]})" if corrupt else f": {', '.join(names)}"
                raise UserError(
                    f"none of the checkpoints in {self.checkpoints} can be read{reason}; choose another --name"
                )

    def put_checkpoint(self, write: Callable[[IO[bytes]], None], step: int, best: bool) -> None:
        """Write ``last.ckpt``; the one before stays under its step's name. Killed at any moment, a whole one is there.

        Args:
            write: writes it to a file.
            step: that it is of.
            best: whether it becomes ``best.ckpt`` too.
        """
        with open_whole(self.last) as file:
            write(file)
            if self.last.exists() and self._last_step != step:
                before = self.checkpoints / f"step-{self._last_step:08d}.ckpt"
                before.unlink(missing_ok=True)
                try:
                    os.link(self.last, before)
                except OSError:  # a file system without hard links
                    os.replace(self.last, before)
        self._last_step = step
        if best:
            self.put_best(self.last)
        older = sorted(self.checkpoints.glob("step-*.ckpt"), reverse=True)
        for path in older[self.keep - 1 :]:
            path.unlink()

    def put_best(self, source: Path) -> None:
        """Let a checkpoint be ``best.ckpt`` as well."""
        link = self.checkpoints / "best.ckpt.tmp"
        link.unlink(missing_ok=True)
        try:
            os.link(source, link)  # the same bytes under a second name, for nothing
        except OSError:  # a file system without hard links
            with source.open("rb") as whole, open_whole(self.best) as file:
                shutil.copyfileobj(whole, file)
        else:
            os.replace(link, self.best)

    def find_best(self, step: int) -> Path | None:
        """The file of the best checkpoint: ``best.ckpt`` if it is of that step, else whichever is; None if none is."""
        names = [name for name in self._list_checkpoints() if name.endswith(".ckpt")]
        for path in (self.checkpoints / name for name in sorted(names, key=lambda name: name != self.best.name)):
            with contextlib.suppress(CorruptCheckpoint):
                if read_state(path, whole=False)["global_step"] == step:
                    return path
        return None

    def read_scores(self, checkpoint: Path) -> dict[str, Any] | None:
        """What a checkpoint says of how good it is, and the best before; None where it is not there or corrupt."""
        if not os.path.lexists(checkpoint):
            return None
        try:
            scores = read_state(checkpoint, whole=False)["callbacks"]["Checkpointing"]
        except (CorruptCheckpoint, KeyError):
            return None
        return dict(scores)

    def is_finished(self, step: int) -> bool:
        """Whether weights and summary have been written after the last step."""
        summary = self.read_summary()
        return summary.get("finished") is True and summary.get("steps") == step and self.weights.exists()

    def read_summary(self) -> dict[str, Any]:
        """The run's ``summary.json``; empty where there is none that can be used."""
        try:
            summary = json.loads(self.summary.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return summary if isinstance(summary, dict) else {}

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Raise :class:`MachineError` for a file of the run that cannot be written: which, why, and what is kept."""
        try:
            yield
        except OSError as error:
            full = error.errno in FULL - {errno.EFBIG}  # which is a limit of files
            kept = f"is of step {self._last_step}" if self._last_step else "is yet to come"
            raise MachineError(
                f"{'the disk is full: ' if full else ''}{path} cannot be written: {error.strerror or error}; the last "
                f"complete checkpoint {kept}: once {'there is room' if full else 'that is mended'}, the same command "
                f"{self.describe_resuming()}"
            ) from error

    def describe_resuming(self) -> str:
        """Where the same command begins, in words."""
        last = self._last_complete()
        return "starts at step 0" if last is None else f"resumes from {last}"

    def _last_complete(self) -> Path | None:
        if not self._last_step:
            return None
        before = self.checkpoints / f"step-{self._last_step:08d}.ckpt"
        present = [path for path in (self.last, before, self.resumed) if path is not None and os.path.lexists(path)]
        return present[0] if present else self.last  # on a disk that has gone

    def _list_checkpoints(self) -> list[str]:
        """Names of checkpoints, the newest first, and of what were some.

        Raises:
            UserError: it, or a checkpoint in it, is something else than a folder or a file.
            MachineError: the folder is there, but cannot be read.
        """
        check_kind(self.checkpoints, folder=True)
        try:
            names = os.listdir(self.checkpoints)
        except OSError as error:
            # below a link that leads nowhere there may be checkpoints again, once its disk is mounted
            if isinstance(error, FileNotFoundError) and not os.path.islink(self.checkpoints):
                return []
            if error.errno in WRONG_PATH and not isinstance(error, FileNotFoundError):
                raise refusal(f"run folder {self.path} (see --output-dir) cannot be written", error) from error
            raise MachineError(
                f"the folder of checkpoints {self.checkpoints} cannot be read: {error.strerror}; nothing was changed"
            ) from error
        older = sorted((n for n in names if n.startswith("step-") and n.endswith(".ckpt")), reverse=True)
        for name in ("last.ckpt", *older, "best.ckpt"):
            check_kind(self.checkpoints / name)
        # older versions said "damaged"
        corrupt = sorted(name for name in names if name.endswith((".corrupt", ".damaged")))
        return [name for name in ("last.ckpt", *older, "best.ckpt", *corrupt) if name in names]

    def _check_kinds(self) -> None:
        """Raise UserError where a folder or a pipe, say, has the name of a file of the run, or a file of a folder."""
        for path in (self.path, self.visualizations, self.events):
            check_kind(path, folder=True)
        files = (self.settings, self.metrics, self.summary, self.weights, self.logger_ids)
        for path in (Path(self._lock.lock_file), *files):
            check_kind(path)

    def _read_settings(self) -> StoredSettings | None:
        """The settings that the run began with: of its checkpoint, which is whole, or else of its config.yaml."""
        if not self.settings.exists():
            return self._earlier
        try:
            stored = read_yaml(self.settings)
        except UserError:
            if self._earlier is None:
                raise
            stored = None
        if self._earlier is None:
            return stored
        if stored is None or stored.task != self._earlier.task:
            print_note(f"{self.settings} is corrupt: its settings are taken from {self.resumed}")
        return self._earlier

    def _begin_again(self, config: RunConfig) -> None:
        """Start at step 0, unless the folder shows that there was a checkpoint.

        Raises:
            MachineError: it does.
        """
        self.restarted = self.settings.exists()
        steps = read_steps(self.metrics)
        every = config.trainer.checkpoint_every_n_steps
        with contextlib.suppress(UserError, OSError, LookupError, TypeError, ValueError):
            every = int(read_yaml(self.settings).values["trainer"]["checkpoint_every_n_steps"])
        if self.read_summary().get("steps") and self.read_summary().get("finished"):
            sign = f"{self.summary} is of a finished run"
        elif steps and steps[-1] > every:  # at that step itself it may have been killed before it was written
            sign = f"{self.metrics} has rows up to step {steps[-1]}"
        else:
            with self.writing(self.metrics):
                self.metrics.unlink(missing_ok=True)  # rows of the steps that are taken again
            return
        raise MachineError(
            f"there are no checkpoints in {self.checkpoints}, but {sign}: if they are on a disk that is not mounted, "
            f"mount it; to start at step 0, choose another --name or remove {self.path}"
        )


def sign(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written to; empty if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _settings_of(earlier: StoredSettings, config: RunConfig, path: Path) -> Any:
    """What a run in this folder began with, as settings of the same task."""
    if earlier.task != config.task:
        raise UserError(f"{path} holds a run of {earlier.task}, not of {config.task}; choose another --name")
    try:
        return from_dict(earlier.values, type(config))
    except (TypeError, ValueError, AttributeError) as error:
        raise not_settings(path / "config.yaml", error) from error


def _check_same_run(earlier: StoredSettings, config: RunConfig, path: Path) -> None:
    before, now = to_dict(_settings_of(earlier, config, path)), to_dict(config)
    resolved = before["data"].get("dtype") is not None  # or else of an earlier version
    for section in [name for name in now if isinstance(now[name], dict)]:
        for key, value in now[section].items():
            unknown = before[section][key] is None and key in config.from_images.get(section, ())
            unknown &= not (resolved and section == "data")  # where the images have left it open, it is so
            if value != before[section][key] and not unknown and key not in config.free.get(section, frozenset()):
                _refuse(path, f"--{section}.{key.replace('_', '-')}", before[section][key], value)
    if before["seed"] != now["seed"]:
        _refuse(path, "--seed", before["seed"], now["seed"])


def _refuse(path: Path, option: str, before: Any, now: Any) -> None:
    raise UserError(
        f"{path} holds a run with {option} {before}, not {now}; choose another --name "
        f"(and --model.checkpoint {path}/checkpoints/last.ckpt to start from its weights)"
    )


def check_kind(path: Path, folder: bool = False) -> None:
    """Raise UserError where there is something else than a regular file, or than a folder; a pipe would block."""
    with contextlib.suppress(OSError):  # not there, or not to be seen: what opens it says so
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode):
            return
        kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        found, wanted = kinds.get(stat.S_IFMT(mode), "device"), "folder" if folder else "file"
        raise UserError(f"{path} is a {found}, where a run has a {wanted}: move it away, or choose another --name")
