"""`itpn train --profile`: a few steps of a run, and where their time goes."""

import gzip
import io
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.profiler import ProfilerAction, ProfilerActivity, record_function, schedule

from itpn.errors import RunStopped, refusal
from itpn.system.console import Output
from itpn.system.signals import SignalHandlers, stop_at_once
from itpn.system.writing import open_whole, write_whole
from itpn.training.config import AnyConfig, RunConfig
from itpn.training.data import read_batches
from itpn.training.launch import choose_devices, count_cores, describe_machine, quieten_libraries, read_launch
from itpn.training.loop import set_up, take_step
from itpn.training.profile_summary import advise, draw_summary
from itpn.training.profile_trace import (
    MARK,
    OTHER,
    OURS,
    PARTS,
    read_device,
    read_operators,
    summarize_device,
    summarize_operations,
)
from itpn.training.run_folder import RunFolder
from itpn.training.sharding import make_training_fabric
from itpn.training.state import Job, Training

STEPS, SETTLE = 10, 2


@dataclass(frozen=True)
class ProfilePlan:
    """Optimizer steps: some to warm up, some that are timed alone, some to settle, some that are recorded."""

    warmup: int
    timed: int
    recorded: int

    @property
    def record_from(self) -> int:
        return self.warmup + self.timed + SETTLE

    @property
    def total(self) -> int:
        return self.record_from + self.recorded


def make_plan(config: RunConfig, compiled: bool) -> ProfilePlan:
    passes = config.trainer.accumulate_grad_batches
    # what workers have read ahead during the first, slow steps must be used up before waiting for data shows
    warmup = (10 if compiled else 5) + 2 * config.data.num_workers
    steps = max(2, math.ceil(STEPS / passes))
    return ProfilePlan(math.ceil(warmup / passes), steps, steps)


def without_learning(config: AnyConfig) -> AnyConfig:
    """Settings of the same work, of which no step at the peak learning rate can diverge."""
    return replace(config, optimizer=replace(config.optimizer, lr=0.0))


def profile(job: Job) -> Path:
    """Take some steps, and write and print where their time goes.

    No checkpoint is read or written, and nothing outside ``OUTPUT_DIR/RECIPE/NAME/profile``.

    Args:
        job: with settings of :func:`without_learning`.

    Returns:
        That folder, with ``trace.json.gz``, ``summary.txt`` and ``summary.json``.

    Raises:
        UserError: something in the settings, the weights or the folder is wrong.
        RunStopped: a signal came; nothing is written.
    """
    launch = read_launch()
    console = Output(quiet=not launch.main)
    quieten_libraries()
    config, recipe = job.module.config, job.module.recipe
    folder = RunFolder(replace(config, name=f"{config.name}/profile"), recipe)
    fabric = make_training_fabric(job.module, launch)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refusal(f"folder {folder.path} (see --output-dir) cannot be written", error) from error
    signals = SignalHandlers(stop_at_once)  # there is nothing to be saved
    signals.set()
    try:
        run = set_up(fabric, console, folder, job)
        plan = make_plan(config, run.compilation.active)
        console.print(
            f"profiling {recipe} / {config.name}: {plan.warmup} steps to warm up, {plan.timed} timed, "
            f"{plan.recorded} recorded; nothing is kept of them",
            highlight=False,
            soft_wrap=True,
        )
        found = record(run, plan)
        if launch.main:
            cores = count_cores() * choose_devices(config.trainer, launch).nodes // run.processes
            report(console, folder.path, summarize(run, plan, found, max(1, cores)))
    except RunStopped as stop:
        console.print("stopped; nothing of the profile is kept")
        stop.reported = True
        raise
    finally:
        signals.restore()
        if job.module.loader is not None:
            job.module.loader.close()
    return folder.path


class Clock:
    """Keeps the host's seconds of each part of a step, and marks parts in a trace."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._begin = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        with record_function(MARK + name):
            yield
        self._seconds[name] += time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """The seconds of each part, and of what belongs to none."""
        passed = time.perf_counter() - self._begin
        return {**self._seconds, OTHER: passed - sum(self._seconds.values())}


@dataclass
class Record:
    """What was found: the host's seconds of the timed steps by part, those of all recorded steps, and their trace."""

    host: dict[str, float]
    recorded_seconds: float
    trace: torch.profiler.profile


def record(run: Training, plan: ProfilePlan) -> Record:
    """Take the steps of a plan; only the main process records, the others take the same steps."""
    clock, batches = Clock(), read_batches(run)
    run.mark = clock.part

    def take(steps: int, what: str = "", trace: torch.profiler.profile | None = None) -> dict[str, float]:
        """Take some steps; returns the host's seconds by part."""
        clock.begin()
        for left in reversed(range(steps)):
            take_step(run, batches, lambda *_: None)
            if not left:
                if run.device.type == "cuda":
                    with record_function(MARK + OURS):
                        torch.cuda.synchronize(run.device)
                seconds = clock.read()
            if trace is not None:
                trace.step()
        if what:
            run.console.print(f"{what} at step {run.step}/{plan.total}", highlight=False)
        return seconds

    take(plan.warmup, "warmed up")
    host = take(plan.timed, "timed")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its remarks are not for users
    cuda = [ProfilerActivity.CUDA] if run.device.type == "cuda" else []
    when = schedule(wait=0, warmup=SETTLE, active=plan.recorded, repeat=1) if run.main else record_nothing
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *cuda], schedule=when) as trace:
        take(SETTLE, trace=trace)
        recorded = take(plan.recorded, "recorded", trace)
    return Record(host, sum(recorded.values()), trace)


def record_nothing(step: int) -> ProfilerAction:
    return ProfilerAction.NONE


def summarize(run: Training, plan: ProfilePlan, found: Record, cores: int) -> dict[str, Any]:
    """Write the trace, and find what the summary says."""
    config, batch, path = run.config, run.length.global_batch, run.folder.path / "trace.json.gz"
    write_trace(found.trace, path)
    device = None
    if run.device.type == "cuda":
        with gzip.open(path) as file:
            device = read_device(json.load(file)["traceEvents"])
        device = device if device.operations else None  # where the driver does not give them
    operations = read_operators(found.trace.events() or ()) if device is None else device.operations
    step = sum(found.host.values()) / plan.timed
    return {
        "recipe": run.module.recipe,
        "name": config.name,
        "task": config.task,
        "batch": batch,
        "steps": plan.timed,
        "images_per_second": batch / step,
        "step_ms": 1e3 * step,
        "recorded_step_ms": 1e3 * found.recorded_seconds / plan.recorded,
        "host_ms": {part: 1e3 * seconds / plan.timed for part, seconds in found.host.items()},
        **summarize_device(device, 1e3 * step, plan.recorded),
        **summarize_operations(operations, plan.recorded),
        "compiled": run.compilation.active,
        "num_workers": config.data.num_workers,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "gpu_memory_gb": None if device is None else torch.cuda.mem_get_info(run.device)[1] / 1e9,
        **describe_machine(run.device, run.processes, run.precision),
    }


def write_trace(trace: torch.profiler.profile, path: Path) -> None:
    """Write a compressed trace; torch would compress it by way of the folder of temporary files, and leave it there."""
    plain = path.with_name("trace.json")
    try:
        trace.export_chrome_trace(str(plain))
        with plain.open("rb") as content, open_whole(path) as file, gzip.open(file, "wb") as packed:
            shutil.copyfileobj(content, packed)
    finally:
        for left in (plain, plain.with_name("trace.json.tmp")):
            left.unlink(missing_ok=True)


def report(console: Console, folder: Path, metrics: dict[str, Any]) -> None:
    """Print the summary, and write it as text and as JSON."""
    advice = advise(metrics)
    page = io.StringIO()
    # the folder by its name alone: it may be moved, and its path may be longer than a line
    Console(file=page, width=100).print(draw_summary(metrics, advice, Path(folder.name)))
    lines = "".join(f"{line.rstrip()}\n" for line in page.getvalue().splitlines())
    write_whole(folder / "summary.txt", lines.encode())
    write_whole(folder / "summary.json", (json.dumps({**metrics, "advice": advice}, indent=2) + "\n").encode())
    console.print(draw_summary(metrics, advice, folder))
