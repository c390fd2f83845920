"""`itpn train --profile`: a few steps of a run, and where their time goes."""

import gzip
import io
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.profilers import Profiler
from rich.console import Console
from torch.profiler import ProfilerActivity, record_function, schedule

from itpn.errors import RunStopped, refusal
from itpn.system.console import Output
from itpn.system.signals import SignalHandlers, stop_at_once
from itpn.system.writing import open_whole, write_whole
from itpn.training.compilation import compile_networks
from itpn.training.config import RunConfig
from itpn.training.launch import (
    Launch,
    count_cores,
    describe_machine,
    quieten_libraries,
    read_launch,
)
from itpn.training.loop import Job, check_strategy, make_trainer
from itpn.training.profile_summary import advise, draw_summary
from itpn.training.profile_trace import (
    MARK,
    OTHER,
    OURS,
    PARTS,
    read_device,
    read_operators,
    tell_device,
    tell_operations,
)
from itpn.training.run_folder import RunFolder

STEPS, SETTLE = 10, 2


@dataclass(frozen=True)
class Plan:
    """Optimiser steps: some to warm up, some that are timed alone, some to settle, some that are recorded."""

    warmup: int
    timed: int
    recorded: int

    @property
    def record_from(self) -> int:
        return self.warmup + self.timed + SETTLE

    @property
    def total(self) -> int:
        return self.record_from + self.recorded


def make_plan(config: RunConfig, compiled: bool) -> Plan:
    passes = config.trainer.accumulate_grad_batches
    # what workers have read ahead during the first, slow steps must be used up before waiting for data shows
    warmup = (10 if compiled else 5) + 2 * config.data.num_workers
    steps = max(2, math.ceil(STEPS / passes))
    return Plan(math.ceil(warmup / passes), steps, steps)


def profile(
    config: RunConfig, recipe: str, load: Callable[[], list[str]], make: Callable[[], Job], launch: Launch | None = None
) -> Path:
    """Take some steps, and write and print where their time goes; called as :func:`itpn.training.loop.fit` is.

    No checkpoint is read or written, and nothing outside ``OUTPUT_DIR/RECIPE/NAME/profile``.

    Returns:
        That folder, with ``trace.json.gz``, ``summary.txt`` and ``summary.json``.

    Raises:
        UserError: something in the settings, the weights or the folder is wrong.
        RunStopped: a signal came; nothing is written.
    """
    launch = launch or read_launch()
    check_strategy(config, launch)
    console = Output(quiet=not launch.main)
    quieten_libraries()
    folder = RunFolder(replace(config, name=f"{config.name}/profile"), recipe)
    load()  # how many boxes a detector proposes depends on its weights
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refusal(f"folder {folder.path} (see --output-dir) cannot be written", error) from error
    job = make()
    compilation = compile_networks(job.compiled, config.trainer, launch, job.compile_by_default, console)
    plan = make_plan(config, compilation.active)
    length = replace(config.trainer, max_steps=plan.total, max_epochs=-1)
    # the same work, and no step of these few at the peak learning rate that could diverge
    still: Any = replace(config.optimizer, lr=0.0)
    job.task.config = replace(config, optimizer=still)
    recorder = Recorder(plan, console, launch.main)
    trainer = make_trainer(replace(config, trainer=length), folder, launch, 0, [recorder], job.task.static_graph)
    trainer.loggers = []
    trainer.profiler = recorder.clock  # type: ignore[attr-defined]
    console.print(
        f"profiling {recipe} / {config.name}: {plan.warmup} steps to warm up, {plan.timed} timed, "
        f"{plan.recorded} recorded; nothing is kept of them",
        highlight=False,
        soft_wrap=True,
    )
    compilation.guard(trainer)
    recorder.signals.set()
    try:
        trainer.fit(job.task)
        if launch.main:
            compiled = compilation.active
            report(console, folder.path, figure_out(config, recipe, trainer, job, recorder, folder.path, compiled))
    except RunStopped as stop:
        console.print("stopped; nothing of the profile is kept")
        stop.told = True
        raise
    finally:
        recorder.signals.restore()
        recorder.stop()
        if job.task.loader is not None:
            job.task.loader.close()
    return folder.path


class Clock(Profiler):
    """Is told by Lightning what it does, and keeps the host's seconds of each part; marks parts in a trace.

    A part inside another is not counted twice, so that with what belongs to none they add up to the time that passed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reset()
        self._open: list[tuple[str, record_function]] = []

    def reset(self) -> None:
        self.seconds = dict.fromkeys([*PARTS.values(), OTHER], 0.0)
        self._mark = time.perf_counter()

    def charge(self) -> None:
        """Book the time since the last booking on the part at hand."""
        now = time.perf_counter()
        self.seconds[self._open[-1][0] if self._open else OTHER] += now - self._mark
        self._mark = now

    def start(self, action_name: str) -> None:
        part = PARTS.get(action_name.rpartition(".")[2])
        if part is not None:
            self.charge()
            mark = record_function(MARK + part)
            mark.__enter__()
            self._open.append((part, mark))

    def stop(self, action_name: str) -> None:
        if action_name.rpartition(".")[2] in PARTS and self._open:
            self.charge()
            self._open.pop()[1].__exit__(None, None, None)


class Recorder(L.Callback):
    """Times and records the steps of a plan.

    Args:
        main: only this process records; the others take the same steps.

    Attributes:
        seconds: of all timed steps.
        host: the same by part.
        recorded_seconds: of all recorded steps.
        trace: with the recorded steps, at the end.
    """

    def __init__(self, plan: Plan, console: Console, main: bool) -> None:
        self.plan = plan
        self.console = console
        self.main = main
        self.clock = Clock()
        self.seconds = self.recorded_seconds = 0.0
        self.host: dict[str, float] = {}
        self.trace: torch.profiler.profile | None = None
        self.device = torch.device("cpu")
        self.signals = SignalHandlers(stop_at_once)  # there is nothing to be saved

    def stop(self) -> None:
        if self.trace is not None:
            self.trace.stop()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.set()  # Lightning has just put handlers of its own in the place of ours
        self._step = 0
        self.device = pl_module.device  # afterwards, Lightning moves everything to the CPU
        if self.main:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its remarks are not for users
            cuda = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            before = self.plan.warmup + self.plan.timed
            when = schedule(skip_first=before, wait=0, warmup=SETTLE, active=self.plan.recorded, repeat=1)
            self.trace = torch.profiler.profile(activities=[ProfilerActivity.CPU, *cuda], schedule=when)
            self.trace.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step or self.trace is None:
            return  # in the middle of an accumulated batch, or not the process that records
        self._step = step
        plan = self.plan
        ends = {
            plan.warmup: "warmed up",
            plan.warmup + plan.timed: "timed",
            plan.record_from: None,
            plan.total: "recorded",
        }
        if step not in ends:
            self.trace.step()
            return
        if self.device.type == "cuda":
            with record_function(MARK + OURS):
                torch.cuda.synchronize(self.device)
        self.clock.charge()
        elapsed = sum(self.clock.seconds.values())
        if step == plan.warmup + plan.timed:
            self.seconds, self.host = elapsed, self.clock.seconds
        elif step == plan.total:
            self.recorded_seconds = elapsed
        if ends[step]:
            self.console.print(f"{ends[step]} at step {step}/{plan.total}", highlight=False)
        self.trace.step()
        self.clock.reset()


def figure_out(
    config: RunConfig, recipe: str, trainer: L.Trainer, job: Job, recorder: Recorder, folder: Path, compiled: bool
) -> dict[str, Any]:
    """Write the trace, and find what the summary says."""
    trace, plan, task = recorder.trace, recorder.plan, job.task
    assert trace is not None
    write_trace(trace, folder / "trace.json.gz")
    device = None
    if recorder.device.type == "cuda":
        with gzip.open(folder / "trace.json.gz") as file:
            device = read_device(json.load(file)["traceEvents"])
        device = device if device.operations else None  # where the driver does not let itself be asked
    operations = read_operators(trace.events() or ()) if device is None else device.operations
    step = recorder.seconds / plan.timed
    return {
        "recipe": recipe,
        "name": config.name,
        "task": config.task,
        "batch": task.global_batch(),
        "steps": plan.timed,
        "images_per_second": task.global_batch() / step,
        "step_ms": 1e3 * step,
        "recorded_step_ms": 1e3 * recorder.recorded_seconds / plan.recorded,
        "host_ms": {part: 1e3 * seconds / plan.timed for part, seconds in recorder.host.items()},
        **tell_device(device, 1e3 * step, plan.recorded),
        **tell_operations(operations, plan.recorded),
        "compiled": compiled,
        "num_workers": config.data.num_workers,
        "cores": max(1, count_cores() // trainer.num_devices),
        "threads": torch.get_num_threads(),
        "gpu_memory_gb": None if device is None else torch.cuda.mem_get_info(recorder.device)[1] / 1e9,
        **describe_machine(recorder.device, trainer.world_size, str(trainer.precision)),
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


def report(console: Console, folder: Path, figures: dict[str, Any]) -> None:
    """Print the summary, and write it as text and as figures."""
    advice = advise(figures)
    shown = draw_summary(figures, advice, folder)
    page = io.StringIO()
    Console(file=page, width=100).print(shown)
    lines = "".join(f"{line.rstrip()}\n" for line in page.getvalue().splitlines())
    write_whole(folder / "summary.txt", lines.encode())
    write_whole(folder / "summary.json", (json.dumps({**figures, "advice": advice}, indent=2) + "\n").encode())
    console.print(shown)
