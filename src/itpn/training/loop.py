"""Training, from the settings of a run to its last file: set up, resume, step, log, evaluate, checkpoint, stop."""

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from itpn.errors import RunStopped
from itpn.seeding import derive_seed
from itpn.system.console import Output
from itpn.system.text import one_line
from itpn.training.agreement import check_agreement
from itpn.training.checkpointing import Checkpointing
from itpn.training.compilation import compile_networks
from itpn.training.data import read_batches
from itpn.training.launch import launch_processes, quieten_libraries, read_launch
from itpn.training.loggers.group import open_loggers
from itpn.training.metrics_log import MetricsLog
from itpn.training.optimization import make_optimizer, measure_run
from itpn.training.run_folder import RunFolder
from itpn.training.sharding import distribute, make_training_fabric
from itpn.training.state import Job, Training
from itpn.training.stopping import StopRequest
from itpn.training.summary import complete, finish, print_start, summarize, write_summary
from itpn.training.visualization import Visualizations


def fit(job: Job, folder: RunFolder, notes: Sequence[str] = ()) -> Path:
    """Start or resume a run.

    Args:
        job: with the weights that a new run begins with.
        folder: of the run.
        notes: what is remarkable about it, a sentence each.

    Returns:
        The run's folder.

    Raises:
        UserError: something in the settings, the weights or the folder is wrong.
        RunStopped: a signal stopped the run; its checkpoint is written.
        NonFiniteLoss: the loss became infinite or not a number; the evidence is written.
    """
    launch = read_launch()
    console = Output(quiet=not launch.main)
    quieten_libraries()
    # before the folder: a refusal leaves nothing behind
    fabric = make_training_fabric(job.module, launch)
    try:
        if launch.main:
            folder.open(job.module.config)
        resumed, step = folder.newest_checkpoint(launch.main)
        if resumed is not None:
            notes = [f"resuming from {resumed}, step {step}", *notes]
        elif folder.restarted:
            notes = [f"the run in {folder.path} was stopped before its first checkpoint: starting at step 0", *notes]
        for note in notes:
            console.print(one_line(note), markup=False, highlight=False, soft_wrap=True)
        run_job(fabric, console, folder, job, (resumed, step))
        return folder.path
    finally:
        if job.module.loader is not None:
            job.module.loader.close()
        folder.close()


def run_job(fabric: L.Fabric, console: Output, folder: RunFolder, job: Job, newest: tuple[Path | None, int]) -> None:
    """Take the steps that are left, and write what comes of them; see :func:`fit`.

    Args:
        newest: the checkpoint to resume from and its step.
    """
    stop, (resumed, step) = StopRequest(), newest
    stop.signals.set()
    try:
        run = set_up(fabric, console, folder, job)
        with open_loggers(folder, run.config, step, console, run.main) as loggers:
            log = MetricsLog(run, loggers)
            checkpointing, visualizations = Checkpointing(log), Visualizations(run, loggers)
            if resumed is not None:
                checkpointing.restore(resumed)
            at_end = run.at_end
            if at_end:
                missing = checkpointing.complete(visualizations)
            else:
                train(run, log, checkpointing, visualizations, stop)
            if run.main and at_end:
                complete(log, missing, visualizations.latest)
            elif run.main:
                finish(log, visualizations.latest)
    finally:
        stop.signals.restore()


def set_up(fabric: L.Fabric, console: Output, folder: RunFolder, job: Job) -> Training:
    """Processes, data, model and optimizer."""
    module, config = job.module, job.module.config
    settings = config.trainer
    launch_processes(fabric)
    check_agreement(config)
    compilation = compile_networks(module.compiled(), settings, fabric, module.compiled_by_default, console)
    assert module.make_loader is not None
    module.loader = module.make_loader(fabric.global_rank, fabric.world_size)
    length = measure_run(config, module.loader.images, len(module.loader), fabric.world_size)
    if length.total_steps < (settings.max_steps or 0):
        end = f"the run ends at step {length.total_steps}, after --trainer.max-epochs {settings.max_epochs}"
        console.print(f"{end}, before --trainer.max-steps {settings.max_steps}", highlight=False, soft_wrap=True)
    model = distribute(fabric, module, settings.strategy == "fsdp")
    module.prepare(fabric.device)
    optimizer, schedule = make_optimizer(module, length, str(fabric.strategy.precision.precision))
    copies = torch.cuda.Stream(fabric.device) if fabric.device.type == "cuda" else None
    return Training(
        job, folder, console, fabric, module.loader, length, model, optimizer, schedule, compilation, copies
    )


def train(
    run: Training, log: MetricsLog, checkpointing: Checkpointing, visualizations: Visualizations, stop: StopRequest
) -> None:
    """Take the steps that are left.

    Raises:
        RunStopped: a signal came; a checkpoint is written.
    """
    evaluation, pause = run.evaluation, log.speed.paused
    print_start(run)
    log.start()
    try:
        with pause():
            visualizations.write()
        checkpointing.restore_best()
        batches = read_batches(run)
        while not run.at_end:
            batch = take_step(run, batches, log.add_pass)
            if evaluation is not None and (run.at_end or evaluation.is_due(run.step, run.length.steps_per_epoch)):
                with pause():
                    evaluation.update(run.fabric, run.module, run.step)
            log.after_step(batch)
            if visualizations.due:
                with pause():
                    visualizations.write()
            stopping = stop.decide(run)
            if stopping or checkpointing.due:
                with pause():
                    checkpointing.save(batch)
            if stopping:
                raise RunStopped(stop.signum or signal.SIGTERM)
        if evaluation is not None and run.stopped_early:
            stopped = f"stopped early at step {run.step}: {evaluation.since_best} evaluations have found nothing better"
            best = f"than step {checkpointing.best_step}, which is {run.folder.best}"
            run.console.print(f"{stopped} {best}", markup=False, highlight=False, soft_wrap=True)
    except RunStopped as stopped:
        if run.main:
            write_summary(run.folder, summarize(log, finished=False))
        line = f"stopped at step {run.step}; the same command {run.folder.describe_resuming()}"
        run.console.print(line, markup=False, highlight=False, soft_wrap=True)
        stopped.reported = True
        raise
    finally:
        if log.progress is not None:
            log.progress.stop()


def take_step(
    run: Training,
    batches: Iterator[tuple[dict[str, Any], bool, bool]],
    after_pass: Callable[[dict[str, Any], dict[str, Tensor]], None],
) -> dict[str, Any]:
    """Accumulated passes, and then a step of the optimizer; returns the last batch."""
    for batch, first, last in batches:
        metrics = take_pass(run, batch, first, last)
        run.passes += 1
        if last:
            update(run)
        after_pass(batch, metrics)
        if last:
            break
    return batch


def take_pass(run: Training, batch: dict[str, Any], first: bool, last: bool) -> dict[str, Tensor]:
    """A forward and backward pass, once more without the compiler where that fails; returns the metrics."""
    try:
        metrics = pass_once(run, batch, first, last)
    except Exception as error:
        if not run.compilation.gives_up(error, run.fabric, run.in_backward):
            raise
    else:
        run.compilation.pending = False
        return metrics
    if torch.cuda.is_available():  # here, without the error and the activations in its frames
        torch.cuda.empty_cache()
    return pass_once(run, batch, first, last)


def pass_once(run: Training, batch: dict[str, Any], first: bool, last: bool) -> dict[str, Tensor]:
    """A forward and backward pass, the ``first`` or ``last`` of those whose gradients are accumulated."""
    run.in_backward = False
    seed_pass(run.config.seed, run.passes, run.fabric.global_rank)
    if first:
        run.optimizer.zero_grad()
    # processes sum their gradients in the last of accumulated passes
    with run.model.no_sync() if isinstance(run.model, DistributedDataParallel) and not last else nullcontext():
        with run.mark("forward"), run.fabric.autocast():
            found = run.model(batch)
        backpropagate(run, found["loss"])
    metrics: dict[str, Tensor] = found["metrics"]
    return metrics


def seed_pass(seed: int, number: int, rank: int) -> None:
    """What is random in a pass follows from seed, number and rank alone, so that a resumed run draws the same."""
    own = derive_seed(seed, "step", number, rank)
    torch.manual_seed(own)
    random.seed(own)  # timm erases and mixes by these two
    np.random.seed(own % 2**32)


def backpropagate(run: Training, loss: Tensor) -> None:
    """Add the gradients of a pass; processes exchange them meanwhile."""
    run.in_backward = True
    with run.mark("backward"):
        run.fabric.backward(loss / run.config.trainer.accumulate_grad_batches)


def update(run: Training) -> None:
    """Clip the gradients; a step of the optimizer, of the learning rate, and of what else follows the weights."""
    clip = run.config.optimizer.clip_grad
    with run.mark("optimizer"):
        if clip:
            run.fabric.clip_gradients(run.module, run.optimizer, max_norm=clip, error_if_nonfinite=False)
        run.fabric.strategy.optimizer_step(run.optimizer)
        run.module.after_step(run.step, run.length.total_steps)
    run.schedule.step()
    run.step += 1
