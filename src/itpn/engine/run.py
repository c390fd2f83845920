"""A pre-training run from its settings to its last file."""

import itertools
import json
import logging
import os
import platform
import resource
import sys
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from rich.table import Table
from torch import Tensor

from itpn.checkpoints.files import read_checkpoint, save_weights
from itpn.checkpoints.loading import build_from, load_weights
from itpn.config import Config, check, image_size
from itpn.data.augment import PretrainingTransform
from itpn.data.cache import FeatureCache, read_index
from itpn.data.files import ImageSource, find_training_images
from itpn.data.loader import PretrainingLoader, SkippedImages
from itpn.engine.callbacks import Checkpointing, Monitor, Pictures
from itpn.engine.folder import RunFolder
from itpn.engine.pictures import read_whole_images
from itpn.errors import RunStopped, UserError
from itpn.pretraining.average import MovingAverageTeacher
from itpn.pretraining.teacher import FeatureTeacher, build_teacher
from itpn.seeding import derive_seed
from itpn.tasks.pretrain import PretrainingTask

PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def train(config: Config, recipe: str, source: ImageSource | None = None) -> Path:
    """Run, or go on with, a pre-training run.

    Args:
        source: the images, where they have been looked for already.

    Returns:
        The run's folder.

    Raises:
        UserError: something in the settings, the data or the folder is wrong.
        RunStopped: a signal stopped the run; its checkpoint is written.
        NonFiniteLoss: the loss became infinite or not a number; the evidence is written.
    """
    check(config)
    launch = read_launch()
    console = Console(quiet=not launch.main)
    quieten_libraries()

    images = source or find_training_images(config.data.root)
    if images.cache:
        check_cache(config, images.cache)
    teacher = None if images.cache else make_frozen_teacher(config)
    torch.manual_seed(derive_seed(config.seed, "weights"))
    model = build_from(config)
    folder = RunFolder(config, recipe)
    notes = []
    if config.model.checkpoint is not None and not folder.begun:  # before the folder: a refusal leaves nothing behind
        notes = load_weights(model, read_checkpoint(config.model.checkpoint))
    if launch.main:
        folder.open(config, recipe)
    task = None
    try:
        resume, step = folder.newest_checkpoint(launch.main)
        if resume is not None:
            console.print(f"going on from {resume}, step {step}", highlight=False)
        elif config.model.checkpoint is not None:
            for note in [f"starting from the weights of {config.model.checkpoint}", *notes]:
                console.print(note, highlight=False, soft_wrap=True)
        average = MovingAverageTeacher(model, config.teacher.normalize) if config.teacher.name == "ema" else None
        if config.trainer.compile:
            model.compile()
            if average is not None:
                average.compile()

        task = PretrainingTask(
            model,
            config,
            recipe,
            lambda rank, world: make_loader(config, images, rank, world, teacher.img_size if teacher else None),
            average or teacher,
        )
        skipped = SkippedImages(len(images.images) or None, config.data.max_broken)
        monitor = Monitor(folder, skipped, console, config.trainer.log_every_n_steps)
        pictures = Pictures(folder, lambda: read_samples(images, config), config.trainer.picture_every_n_steps)
        checkpointing = Checkpointing(folder, monitor, config.trainer.checkpoint_every_n_steps)
        start = StartTable(console, folder, images)
        trainer = make_trainer(config, folder, launch, step, [start, monitor, pictures, checkpointing])
        began = time.perf_counter()
        checkpointing.listen()
        try:
            trainer.fit(task, ckpt_path=resume, weights_only=True if resume else None)
        except RunStopped:
            monitor.stop_bar()
            if launch.main:
                write_summary(folder, summarize(trainer, task, monitor, recipe, time.perf_counter() - began, False))
            where = f"goes on from {folder.last}" if folder.last.exists() else "starts it again"
            console.print(f"stopped at step {trainer.global_step}; the same command {where}", soft_wrap=True)
            raise
        finally:
            checkpointing.unlisten()
        if trainer.is_global_zero:
            finish(console, folder, trainer, task, monitor, pictures, recipe, time.perf_counter() - began)
        return folder.path
    finally:
        if task is not None and task.loader is not None:
            task.loader.close()
        folder.close()


def make_frozen_teacher(config: Config) -> FeatureTeacher | None:
    """The outside teacher that a run needs, if any, with its weights; its width goes into the settings.

    Raises:
        UserError: its weights cannot be had, or its units cannot match the student's.
    """
    name = config.teacher.name
    if name is None or name == "ema":
        return None
    rows, cols = (side // config.model.patch_size for side in image_size(config.data))
    teacher = build_teacher(name, config.teacher.checkpoint, (rows, cols))
    if config.teacher.width not in (None, teacher.width):
        raise UserError(f"--teacher.width is {config.teacher.width}, but {name} has {teacher.width}: leave it out")
    config.teacher.width = teacher.width
    return teacher


def check_cache(config: Config, folder: str) -> None:
    """Refuse cached crops and features that are not what the settings ask for; their width goes into the settings."""
    index = read_index(folder)
    asked = {"--data.img-size": image_size(config.data), "--model.patch-size": config.model.patch_size}
    held = {"--data.img-size": index.img_size, "--model.patch-size": index.patch_size}
    if config.teacher.name not in (None, "ema"):
        # not the file of its weights, which need not be there any more
        asked["--teacher.name"], held["--teacher.name"] = config.teacher.name, index.teacher
        config.teacher.width = index.width
    for option, value in asked.items():
        if value != held[option]:
            raise UserError(f"{folder} holds features for {option} {held[option]}, not {value}")


def make_loader(
    config: Config,
    source: ImageSource,
    rank: int,
    world_size: int,
    teacher_size: tuple[int, int] | None = None,
) -> PretrainingLoader:
    """Args as of :class:`PretrainingLoader`; ``teacher_size`` is that of a second view, in pixels."""
    data = config.data
    transform = PretrainingTransform(
        image_size(data),
        scale=data.crop_scale,
        ratio=data.crop_ratio,
        interpolation=data.interpolation,
        hflip=data.hflip,
        color_jitter=data.color_jitter,
        teacher_size=teacher_size,
    )
    return PretrainingLoader(
        source,
        transform,
        batch_size=data.batch_size,
        num_workers=data.num_workers,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        max_pixels=data.max_pixels,
        shuffle_buffer=data.shuffle_buffer,
        samples_per_epoch=data.samples_per_epoch,
        pin_memory=torch.cuda.is_available(),
    )


def read_samples(source: ImageSource, config: Config, count: int = 8) -> Tensor:
    """The images of the pictures: readable ones from all over the data, uint8 [n, 3, H, W]."""
    if source.cache:
        return FeatureCache(source.cache).first(count)
    if source.images:
        stride = max(1, len(source.images) // count)
        source = ImageSource(images=source.images[::stride] + source.images)
    images = read_whole_images(source, image_size(config.data), config.data.max_pixels)
    chosen = [image for _, image in itertools.islice(images, count)]
    if not chosen:
        raise UserError(f"none of the images in {', '.join(config.data.root)} can be read")
    return torch.stack(chosen)


@dataclass(frozen=True)
class Launch:
    """Who started this process, and among how many."""

    environment: ClusterEnvironment
    main: bool
    processes: int | None = None  # per machine; None where Lightning starts them
    machines: int | None = None


def read_launch() -> Launch:
    """Look for torchrun (inside Slurm as well), then for Slurm with several tasks; else Lightning starts processes."""
    if TorchElasticEnvironment.detect():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        torchrun = TorchElasticEnvironment()
        return Launch(torchrun, torchrun.global_rank() == 0, local, torchrun.world_size() // local)
    if SLURMEnvironment.detect() and int(os.environ["SLURM_NTASKS"]) > 1:
        machines = int(os.environ.get("SLURM_NNODES", "1"))
        # its requeueing would bring checkpoints of its own; ours resume by themselves
        try:
            slurm = SLURMEnvironment(auto_requeue=False)
        except RuntimeError as error:  # tasks that were not given per node
            raise UserError(str(error)) from error
        return Launch(slurm, slurm.global_rank() == 0, slurm.world_size() // machines, machines)
    own = LightningEnvironment()
    return Launch(own, own.local_rank() == 0 and own.node_rank() == 0)


def make_trainer(
    config: Config, folder: RunFolder, launch: Launch, step: int, callbacks: list[L.Callback]
) -> L.Trainer:
    settings = config.trainer
    devices, nodes = launch.processes or settings.devices, launch.machines or settings.num_nodes
    cuda = torch.cuda.is_available() and settings.accelerator in ("auto", "gpu")
    if cuda:
        torch.set_float32_matmul_precision("high")
    count = devices or (torch.cuda.device_count() if cuda else 1)
    several = count * (nodes or 1) > 1
    try:
        return L.Trainer(
            accelerator=settings.accelerator,
            devices=count if several or not cuda else (devices or "auto"),
            num_nodes=nodes or 1,
            strategy=DDPStrategy(gradient_as_bucket_view=True) if several else "auto",
            precision=choose_precision(settings.precision, cuda),
            max_epochs=settings.max_epochs,
            max_steps=settings.max_steps or -1,
            accumulate_grad_batches=settings.accumulate_grad_batches,
            gradient_clip_val=config.optimizer.clip_grad,
            log_every_n_steps=settings.log_every_n_steps,
            logger=TensorBoardLogger(folder.path, name="", version="tensorboard", purge_step=step or None),
            callbacks=callbacks,
            plugins=[launch.environment],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder.path,
        )
    except (RuntimeError, ValueError, L.fabric.utilities.exceptions.MisconfigurationException) as error:
        raise UserError(f"cannot train on these devices: {str(error).splitlines()[0]}") from error


def choose_precision(wanted: str, cuda: bool) -> Any:
    if wanted != "auto":
        return PRECISIONS.get(wanted, wanted)
    if not cuda:
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def quieten_libraries() -> None:
    """Lightning's remarks on what we decide on purpose."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*smaller than the logging interval.*",
        ".*LeafSpec.*is deprecated.*",
        ".*in eval mode at the start of training.*",  # the teacher is
    ):
        warnings.filterwarnings("ignore", message=message)


class StartTable(L.Callback):
    """What is about to run, as a table."""

    def __init__(self, console: Console, folder: RunFolder, source: ImageSource) -> None:
        self.console = console
        self.folder = folder
        self.source = source

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        task = pl_module
        assert isinstance(task, PretrainingTask)
        assert task.loader is not None
        if trainer.global_step >= trainer.estimated_stepping_batches:
            return
        config = task.config
        parameters = sum(p.numel() for p in task.model.parameters()) / 1e6
        height, width = image_size(config.data)
        kind = "cached features" if self.source.cache else "shards" if self.source.shards else "files"
        passes = (
            f" x {config.trainer.accumulate_grad_batches} passes" if config.trainer.accumulate_grad_batches > 1 else ""
        )
        processes = f" x {trainer.world_size} processes" if trainer.world_size > 1 else ""
        per_process = min(config.data.batch_size, task.loader.images)
        rows = {
            "model": f"{config.model.name}, {parameters:.2f} M parameters, patch size {config.model.patch_size}",
            **({"teacher": describe_teacher(config, self.source)} if config.teacher.name else {}),
            "data": f"{task.loader.images:,} images ({kind}) at {height}x{width} px",
            "batch": f"{per_process}{processes}{passes}" + (f" = {task.global_batch()}" if processes or passes else ""),
            "steps": f"{int(trainer.estimated_stepping_batches):,} ({task.steps_per_epoch():,} an epoch)",
            "learning rate": f"{task.peak_lr():.3g} at its peak",
            "device": f"{device_name(task.device)}, {trainer.precision}",
            "folder": str(self.folder.path),
        }
        self.console.print(make_table(f"{task.recipe} / {config.name}", rows))


def describe_teacher(config: Config, source: ImageSource) -> str:
    if config.teacher.name == "ema":
        return f"moving average, {config.teacher.momentum} to {config.teacher.momentum_end} kept at each step"
    where = f"features in {source.cache}" if source.cache else config.teacher.checkpoint or "weights of timm's hub"
    return f"{config.teacher.name}, {where}"


def make_table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")  # a path must be readable whole
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB (1e9 bytes): of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def summarize(
    trainer: L.Trainer, task: PretrainingTask, monitor: Monitor, recipe: str, seconds: float, finished: bool
) -> dict[str, Any]:
    packages = ("itpn", "torch", "torchvision", "timm", "lightning")
    return {
        "recipe": recipe,
        "name": task.config.name,
        "task": "pretraining",
        "finished": finished,
        "epochs": trainer.global_step / task.steps_per_epoch(),
        "steps": trainer.global_step,
        "images_seen": monitor.images_seen,
        "images_skipped": monitor.skipped.count,
        "images_per_second": monitor.images / monitor.seconds if monitor.seconds else 0.0,
        "data_wait_fraction": monitor.wait_fraction,
        "peak_memory_gb": peak_memory_gb(monitor.device),
        "duration_seconds": seconds,
        "metrics": monitor.metrics,
        "device": device_name(monitor.device),
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def write_summary(folder: RunFolder, summary: dict[str, Any]) -> None:
    unfinished = folder.path / "summary.tmp"
    unfinished.write_text(json.dumps(summary, indent=2) + "\n")
    unfinished.replace(folder.path / "summary.json")


def finish(
    console: Console,
    folder: RunFolder,
    trainer: L.Trainer,
    task: PretrainingTask,
    monitor: Monitor,
    pictures: Pictures,
    recipe: str,
    seconds: float,
) -> None:
    """Write weights and summary, and show them."""
    if not monitor.started:
        console.print(
            f"{folder.path} is complete at step {trainer.global_step}; raise --trainer.max-epochs or max-steps "
            "to go on, or choose another --name",
            highlight=False,
        )
        return
    monitor.stop_bar()
    save_weights(folder.weights, task.model, recipe, task.config)
    summary = summarize(trainer, task, monitor, recipe, seconds, True)
    write_summary(folder, summary)
    rows = {
        "steps": f"{summary['steps']:,} ({summary['epochs']:.4g} epochs)",
        "loss": f"{summary['metrics'].get('loss', float('nan')):.4f}",
        "images": f"{summary['images_seen']:,} seen, {summary['images_skipped']} files skipped",
        "speed": f"{summary['images_per_second']:.1f} images/s, {summary['data_wait_fraction']:.1%} waiting for data",
        "peak memory": f"{summary['peak_memory_gb']:.2f} GB",
        "time": f"{seconds:.0f} s",
        "weights": str(folder.weights),
        "picture": str(pictures.latest),
        "summary": str(folder.path / "summary.json"),
    }
    console.print(make_table("finished", rows))
