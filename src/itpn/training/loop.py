"""A run of any kind from its settings to its last file."""

import inspect
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from itpn.checkpoints.io import hold_the_same
from itpn.data.skipped import SkippedImages
from itpn.errors import RunStopped, UserError
from itpn.system.console import Output, make_table
from itpn.system.text import one_line
from itpn.system.writing import write_whole
from itpn.training.callbacks import Monitor, Pictures, Watcher
from itpn.training.checkpointing import CheckpointFiles, Checkpointing, restoring
from itpn.training.compilation import compile_networks
from itpn.training.completion import Completion
from itpn.training.config import RunConfig
from itpn.training.launch import (
    Launch,
    choose_devices,
    choose_precision,
    describe_machine,
    device_name,
    quieten_libraries,
    read_launch,
)
from itpn.training.module import TrainingTask
from itpn.training.run_folder import RunFolder
from itpn.training.tensorboard import EventFiles, leave_to_caller


@dataclass
class Job:
    """What one kind of run adds to what all kinds have.

    Attributes:
        task: what Lightning trains.
        pictures: draws what the network predicts.
        rows: of the table at the start, by title: "data", what the images are, "size", what is made of them, and more.
        images: single files, of which only a share may be broken; None where that is not known beforehand.
        watcher: looks at the network now and then, and adds to its figures.
        save: writes ``model.safetensors``.
        compiled: what torch.compile may take, each as a graph of its own.
        compile_by_default: whether it does so on a GPU unless it is told not to.
    """

    task: TrainingTask
    pictures: Callable[[RunFolder], Pictures] | None
    rows: dict[str, str]
    images: int | None
    save: Callable[[Path], dict[str, Any]]
    watcher: Watcher | None = None
    compiled: Sequence[nn.Module] = ()
    compile_by_default: bool = False


Run = Callable[[RunConfig, str, Callable[[], list[str]], Callable[[], Job]], Path]  # as `fit`


def fit(
    config: RunConfig, recipe: str, load: Callable[[], list[str]], make: Callable[[], Job], launch: Launch | None = None
) -> Path:
    """Run, or go on with, a run.

    Args:
        load: takes the weights that a new run begins with, and says what is remarkable about them.
        make: called when the folder is open and those weights are there.

    Returns:
        The run's folder.

    Raises:
        UserError: something in the settings, the weights or the folder is wrong.
        RunStopped: a signal stopped the run; its checkpoint is written.
        NonFiniteLoss: the loss became infinite or not a number; the evidence is written.
    """
    launch = launch or read_launch()
    check_strategy(config, launch)
    console = Output(quiet=not launch.main)
    quieten_libraries()
    folder = RunFolder(config, recipe)
    notes = [] if folder.begun else load()  # before the folder: a refusal leaves nothing behind
    if launch.main:
        folder.open(config, recipe)
    job = None
    try:
        resume, step = folder.newest_checkpoint(launch.main)
        if resume is not None:
            console.print(f"going on from {resume}, step {step}", markup=False, highlight=False)
        elif folder.restarted:
            line = f"the run in {folder.path} was stopped before its first checkpoint: starting at step 0"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        for note in notes:
            console.print(one_line(note), markup=False, highlight=False, soft_wrap=True)
        job = make()
        train_job(config, recipe, launch, console, folder, job)
        return folder.path
    finally:
        if job is not None and job.task.loader is not None:
            job.task.loader.close()
        folder.close()


def train_job(config: RunConfig, recipe: str, launch: Launch, console: Console, folder: RunFolder, job: Job) -> None:
    """Take the steps that are left, and write what comes of them; see :func:`fit`."""
    watcher = [] if job.watcher is None else [job.watcher]
    skipped = SkippedImages(job.images, config.data.max_broken)
    compilation = compile_networks(job.compiled, config.trainer, launch, job.compile_by_default, console)
    monitor = Monitor(folder, skipped, console, config.trainer.log_every_n_steps, job.watcher, compilation)
    checkpointing = Checkpointing(folder, monitor, config.trainer.checkpoint_every_n_steps)
    # one process draws, and of a sharded network it would miss the others' parts
    pictures = job.pictures(folder) if job.pictures and config.trainer.strategy == "ddp" else None
    drawing = [] if pictures is None else [pictures]
    completion = Completion(folder, monitor, pictures, checkpointing)
    start = StartTable(console, folder, job.rows)
    resume, step = folder.newest_checkpoint(launch.main)
    trainer = make_trainer(
        config,
        folder,
        launch,
        step,
        [start, *watcher, monitor, *drawing, checkpointing, completion],
        job.task.static_graph,
    )
    compilation.guard(trainer)
    began = time.perf_counter()
    hook, threading.excepthook = threading.excepthook, leave_to_caller
    checkpointing.signals.set()
    try:
        with restoring(resume):
            trainer.fit(job.task, ckpt_path=resume, weights_only=True if resume else None)
        if trainer.is_global_zero:
            finish(console, folder, trainer, job, completion, recipe, time.perf_counter() - began)
    except RunStopped as stop:
        monitor.stop_bar()
        if launch.main:
            write_summary(folder, summarize(trainer, job.task, monitor, recipe, time.perf_counter() - began, False))
        line = f"stopped at step {trainer.global_step}; the same command {folder.describe_resuming()}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
        stop.told = True
        raise
    finally:
        checkpointing.signals.restore()
        threading.excepthook = hook


def make_trainer(
    config: RunConfig,
    folder: RunFolder,
    launch: Launch,
    step: int,
    callbacks: list[L.Callback],
    static_graph: bool = False,
) -> L.Trainer:
    settings = config.trainer
    devices = choose_devices(settings, launch)
    try:
        trainer = L.Trainer(
            accelerator=settings.accelerator,
            devices=devices.count,
            num_nodes=devices.nodes,
            strategy=make_strategy(config, devices.processes, static_graph),
            precision=choose_precision(settings.precision, devices.cuda),
            max_epochs=settings.max_epochs,
            max_steps=settings.max_steps or -1,
            accumulate_grad_batches=settings.accumulate_grad_batches,
            gradient_clip_val=config.optimizer.clip_grad,
            log_every_n_steps=settings.log_every_n_steps,
            logger=EventFiles(folder, purge_step=step if step or folder.restarted else None),
            callbacks=callbacks,
            plugins=[launch.environment, CheckpointFiles(folder)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder.path,
        )
    except (RuntimeError, ValueError, L.fabric.utilities.exceptions.MisconfigurationException) as error:
        raise UserError(f"cannot train on these devices: {str(error).splitlines()[0]}") from error
    # in every pass Lightning broadcasts whether SIGTERM came and makes the host wait for the answer; we vote on it
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


def check_strategy(config: RunConfig, launch: Launch) -> None:
    """Raise :class:`UserError` for what cannot be sharded."""
    if config.trainer.strategy == "ddp":
        return
    reason, devices = None, choose_devices(config.trainer, launch)
    if (problem := config.sharding_problem()) is not None:
        reason = problem
    elif not devices.several:
        reason = "needs several processes, see --trainer.devices"
    elif choose_precision(config.trainer.precision, devices.cuda) == "16-mixed":
        reason = "has no loss scaling: choose another --trainer.precision"
    elif config.trainer.compile:
        reason = "does not go with --trainer.compile"
    if reason is not None:
        raise UserError(f"--trainer.strategy fsdp {reason}; without it each process holds a copy of everything")


def make_strategy(config: RunConfig, processes: int, static_graph: bool) -> Any:
    """How processes share the work; DDP sums gradients while the backward pass still runs."""
    if processes == 1:
        return "auto"
    if config.trainer.strategy == "fsdp":
        # a checkpoint is one whole file
        return ModelParallelStrategy(processes, 1, save_distributed_checkpoint=False)
    known = inspect.signature(DistributedDataParallel).parameters
    # no buffer differs between processes: tables of positions never change, and batch norms sum over all
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    buffers: dict[str, Any] = {name: False}
    return DDPStrategy(
        gradient_as_bucket_view=True,
        find_unused_parameters=False,
        # Every step of a pre-training uses the same parameters in the same way, with recomputed activations, stochastic
        # depth and torch.compile as well; a detector takes other branches where there are no objects. With accumulation
        # torch's reducer fails: it counts uses in the first pass, which is not to be synchronised.
        static_graph=static_graph and config.trainer.accumulate_grad_batches == 1,
        **buffers,
    )


class StartTable(L.Callback):
    """What is about to run, as a table."""

    def __init__(self, console: Console, folder: RunFolder, rows: dict[str, str]) -> None:
        self.console = console
        self.folder = folder
        self.rows = rows

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        task = pl_module
        assert isinstance(task, TrainingTask)
        assert task.loader is not None
        if trainer.global_step >= trainer.estimated_stepping_batches:
            return
        config = task.config
        name = config.model.name or "a network of its own sizes"
        parameters = sum(p.numel() for p in task.model.parameters()) / 1e6
        passes = (
            f" x {config.trainer.accumulate_grad_batches} passes" if config.trainer.accumulate_grad_batches > 1 else ""
        )
        processes = f" x {trainer.world_size} processes" if trainer.world_size > 1 else ""
        per_process = min(config.data.batch_size, task.loader.images)
        rows = {
            "model": f"{name}, {parameters:.2f} M parameters, patch size {config.model.patch_size}",
            **{title: row for title, row in self.rows.items() if title != "size"},
            "data": f"{task.loader.images:,} images ({self.rows['data']}), {self.rows['size']}",
            "batch": f"{per_process}{processes}{passes}" + (f" = {task.global_batch()}" if processes or passes else ""),
            "steps": f"{int(trainer.estimated_stepping_batches):,} ({task.steps_per_epoch():,} an epoch)",
            "learning rate": f"{task.peak_lr():.3g} at its peak",
            "device": f"{device_name(task.device)}, {trainer.precision}",
            "folder": str(self.folder.path),
        }
        self.console.print(make_table(f"{task.recipe} / {config.name}", rows))


def summarize(
    trainer: L.Trainer, task: TrainingTask, monitor: Monitor, recipe: str, seconds: float, finished: bool
) -> dict[str, Any]:
    return {
        "recipe": recipe,
        "name": task.config.name,
        "task": task.config.task,
        "finished": finished,
        "epochs": trainer.global_step / task.steps_per_epoch(),
        "steps": trainer.global_step,
        "images_seen": monitor.images_seen,
        "images_skipped": monitor.skipped.count,
        "images_per_second": monitor.images / monitor.seconds if monitor.seconds else 0.0,
        "data_wait_fraction": monitor.wait_fraction,
        "duration_seconds": seconds,
        "metrics": {name: value for name, value in monitor.metrics.items() if value is not None},
        **describe_machine(monitor.device, trainer.world_size, str(trainer.precision)),
    }


def write_summary(folder: RunFolder, summary: dict[str, Any]) -> None:
    with folder.writing(folder.summary):
        write_whole(folder.summary, (json.dumps(summary, indent=2) + "\n").encode())


def renew_weights(folder: RunFolder, save: Callable[[Path], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
    """Write the weights of a complete run unless they are there.

    Returns:
        What ``save`` does, and whether they were missing, or other ones.
    """
    fresh = folder.weights.with_name(f"{folder.weights.name}.tmp")
    with folder.writing(folder.weights):
        written = save(fresh)
        same = hold_the_same(fresh, folder.weights)
        if same:
            fresh.unlink()
        else:
            fresh.replace(folder.weights)
    return written, not same


def finish(
    console: Console,
    folder: RunFolder,
    trainer: L.Trainer,
    job: Job,
    completion: Completion,
    recipe: str,
    seconds: float,
) -> None:
    """Write weights and summary, and show them."""
    monitor, pictures = completion.monitor, completion.pictures
    monitor.stop_bar()
    if monitor.started:
        with folder.writing(folder.weights):
            written = job.save(folder.weights)
    else:
        written, renewed = renew_weights(folder, job.save)
        missing = renewed or completion.missing
        console.print(
            f"{folder.path} is complete at step {trainer.global_step}; raise --trainer.max-epochs or max-steps "
            "to go on, or choose another --name" + ("; writing the weights and summary it lacked" if missing else ""),
            markup=False,
            highlight=False,
        )
        if not missing:
            return
        seconds = seconds if monitor.duration is None else monitor.duration
    summary = {**summarize(trainer, job.task, monitor, recipe, seconds, True), **written}
    write_summary(folder, summary)
    shown = job.watcher.describe() if job.watcher is not None else {}
    rows = {
        "steps": f"{summary['steps']:,} ({summary['epochs']:.4g} epochs)",
        "loss": f"{summary['metrics'].get('loss', float('nan')):.4f}",
        **shown,
        "images": f"{summary['images_seen']:,} seen, {summary['images_skipped']} files skipped",
        "speed": f"{summary['images_per_second']:.1f} images/s, {summary['data_wait_fraction']:.1%} waiting for data",
        "peak memory": f"{summary['peak_memory_gb']:.2f} GB",
        "time": f"{seconds:.0f} s",
        "weights": str(folder.weights),
        **({} if pictures is None or pictures.latest is None else {"picture": str(pictures.latest)}),
        "summary": str(folder.summary),
    }
    console.print(make_table("finished", rows))
