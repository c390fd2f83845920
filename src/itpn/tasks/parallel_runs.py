"""Runs side by side, a process and a thread each: networks too small for a second thread to help."""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from itpn.errors import MachineError, RunStopped
from itpn.system.signals import stopped_by_signals
from itpn.tasks.run import train
from itpn.training.config import RunConfig
from itpn.training.run_folder import RunFolder


@dataclass(frozen=True)
class PlannedRun:
    """A run to come.

    Attributes:
        config: with ``trainer.max_steps``.
        after: title of the plan that has to be done before.
    """

    recipe: str
    config: RunConfig
    after: str | None = None

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config, self.recipe)


def train_side_by_side(plans: dict[str, PlannedRun], logs: Path, console: Console, workers: int = 2) -> None:
    """Train all plans, by title, in their order as far as what they wait for allows.

    Args:
        logs: folder for what the runs would say in a terminal.

    Raises:
        UserError: a run's process was killed.
        Exception: of the first run that fails, as of :func:`itpn.tasks.run.train`; the others stop.
        RunStopped: a signal stopped the runs; the same call resumes.
    """
    logs.mkdir(parents=True, exist_ok=True)
    left, done, bars = list(plans), set[str](), dict[str, TaskID]()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    progress = Progress(TextColumn("{task.description:<24}"), *columns, console=console)
    with stopped_by_signals(), progress, _start_workers(workers) as idle:
        busy: dict[Connection, str] = {}
        while left or busy:
            for title in [title for title in left if plans[title].after in {None, *done}][: len(idle)]:
                left.remove(title)
                worker = idle.pop()
                try:
                    worker.send((plans[title], logs / f"{title}.log"))
                except OSError:  # its process has ended
                    raise _lost(logs / f"{title}.log") from None
                busy[worker] = title
                bars[title] = progress.add_task(title, total=plans[title].config.trainer.max_steps)
            ready = wait(list(busy), timeout=1)
            for worker in [worker for worker in busy if worker in ready]:
                title = busy.pop(worker)
                seconds = _receive(worker, logs / f"{title}.log")
                idle.append(worker)
                done.add(title)
                progress.remove_task(bars.pop(title))
                progress.console.print(f"{title:<24} {seconds:4.0f} s", highlight=False)
            for title, bar in bars.items():
                progress.update(bar, completed=_last_step(plans[title].folder.metrics))


@contextlib.contextmanager
def _start_workers(count: int) -> Iterator[list[Connection]]:
    """Processes that train what they are sent, one plan after the other."""
    context = multiprocessing.get_context("spawn")  # threads and CUDA do not survive a fork
    workers, processes = [], []
    for _ in range(count):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=_train_what_comes, args=(theirs,)))
        processes[-1].start()
        theirs.close()  # so that ours ends with the process
        workers.append(ours)
    try:
        yield list(workers)
    finally:
        for process in processes:
            process.terminate()  # a run writes its checkpoint first
        for worker in workers:
            worker.close()  # for one that was between two runs, and took the signal for its last one's
        for process in processes:
            process.join()


def _train_what_comes(pipe: Connection) -> None:
    """A worker process: returns the seconds of each run, or the exception that ended it."""
    os.setsid()  # Ctrl-C is for the parent, which passes it on
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError, RunStopped):  # the parent has gone, or wants this to end
        while True:
            plan, log = pipe.recv()
            began = time.perf_counter()
            try:
                with (
                    log.open("a", encoding="utf-8") as file,
                    contextlib.redirect_stdout(file),
                    contextlib.redirect_stderr(file),
                ):
                    train(plan.config, plan.recipe)
            except RunStopped:
                raise
            except Exception as error:
                pipe.send(error)
            else:
                pipe.send(time.perf_counter() - began)


def _receive(worker: Connection, log: Path) -> float:
    try:
        answer = worker.recv()
    except EOFError:
        raise _lost(log) from None
    if isinstance(answer, Exception):
        raise answer
    return float(answer)


def _lost(log: Path) -> MachineError:
    return MachineError(f"a run was killed, perhaps for want of memory; it wrote {log}")


def _last_step(metrics: Path) -> int:
    """The step of the last row of a run's metrics; 0 where there is none yet."""
    try:
        return int(metrics.read_text(encoding="utf-8").splitlines()[-1].partition(",")[0])
    except (OSError, ValueError, IndexError):
        return 0
