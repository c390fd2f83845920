"""Where a command computes: processes, devices, precision."""

import logging
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.strategies.launchers import subprocess_script
from lightning.fabric.utilities.exceptions import MisconfigurationException

from itpn.errors import UserError
from itpn.system.environment import check_environment
from itpn.system.processes import watch_children, watch_parent
from itpn.training.config import TrainerConfig

PROCESSES_PER_CORE = 8  # on a CPU; more only wait for one another, and their start alone takes minutes
PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


@dataclass(frozen=True)
class Launch:
    """Who started this process, and among how many."""

    environment: ClusterEnvironment
    main: bool
    processes: int | None = None  # per machine; None where Lightning starts them
    machines: int | None = None

    @property
    def started_by_first(self) -> bool:
        """Whether Lightning has started this process, in the first one of its machine."""
        return self.processes is None and self.environment.local_rank() > 0


def read_launch() -> Launch:
    """Look for torchrun (inside Slurm as well), then for Slurm with several tasks; else Lightning starts processes.

    Raises:
        UserError: a variable of theirs is no number, or missing.
    """
    check_environment()
    try:
        return _read_launch()
    except KeyError as error:
        raise UserError(
            f"the environment variable {error.args[0]} is missing beside others of torchrun or Slurm: start the "
            "command with either, or unset those"
        ) from error


def _read_launch() -> Launch:
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
    if own.local_rank() > 0:
        watch_parent()
    subprocess_script._launch_process_observer = watch_children  # type: ignore[assignment]
    return Launch(own, own.local_rank() == 0 and own.node_rank() == 0)


@dataclass(frozen=True)
class Devices:
    """What Lightning is told of the devices."""

    count: Any
    nodes: int
    processes: int  # over all nodes
    cuda: bool

    @property
    def several(self) -> bool:
        return self.processes > 1


def choose_devices(settings: TrainerConfig, launch: Launch) -> Devices:
    """The devices that settings and launcher ask for; by default all GPUs, or else one process on the CPU.

    Raises:
        UserError: on a CPU, more processes than its cores can serve.
    """
    devices, nodes = launch.processes or settings.devices, launch.machines or settings.num_nodes or 1
    cuda = torch.cuda.is_available() and settings.accelerator in ("auto", "gpu")
    if cuda:
        torch.set_float32_matmul_precision("high")
    count = devices or (torch.cuda.device_count() if cuda else 1)
    if not cuda and not launch.processes and count > (most := PROCESSES_PER_CORE * count_cores()):
        raise UserError(
            f"--trainer.devices {count} are more than its CPU can serve: this machine has {count_cores()} cores, "
            f"so give {most} at most"
        )
    processes = max(count * nodes, 1)
    return Devices(count if processes > 1 or not cuda else (devices or "auto"), nodes, processes, cuda)


def make_fabric(settings: TrainerConfig, launch: Launch, strategy: Any = "ddp") -> L.Fabric:
    """The devices that settings and whoever started this ask for, before :func:`launch_processes` and any folder.

    Args:
        strategy: how processes share the work, where there are several.

    Raises:
        UserError: there are no such devices.
    """
    devices = choose_devices(settings, launch)
    with _refusing_devices():
        return L.Fabric(
            accelerator=settings.accelerator,
            devices=devices.count,
            num_nodes=devices.nodes,
            strategy=strategy if devices.several else "auto",
            precision=choose_precision(settings.precision, devices.cuda),
            plugins=[launch.environment] if devices.several else [],
        )


def make_single_fabric(settings: TrainerConfig) -> L.Fabric:
    """:func:`make_fabric` of one process on one device, whatever the settings say of others."""
    return make_fabric(replace(settings, devices=1, num_nodes=1), Launch(LightningEnvironment(), True))


def launch_processes(fabric: L.Fabric) -> None:
    """Start or join the processes that compute together.

    Raises:
        UserError: they cannot use these devices.
    """
    with _refusing_devices():
        fabric.launch()


@contextmanager
def launched(fabric: L.Fabric) -> Iterator[None]:
    """:func:`launch_processes`, to compute without training; at the end the processes part."""
    launch_processes(fabric)
    yield
    # not after an error: the others may have ended, and would be waited for
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def _refusing_devices() -> Iterator[None]:
    try:
        yield
    except torch.distributed.DistError:
        raise
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        raise UserError(f"cannot compute on these devices: {str(error).splitlines()[0]}") from error


def choose_precision(wanted: str, cuda: bool) -> Any:
    """Lightning's name of a precision; "auto" is bf16 on GPUs that compute it, fp16 on others, float32 on the CPU."""
    if wanted != "auto":
        return PRECISIONS.get(wanted, wanted)
    if not cuda:
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def quieten_libraries() -> None:
    """Remarks of libraries on what we decide on purpose."""
    for name in ("lightning.fabric", "lightning.pytorch.utilities.rank_zero"):  # what Fabric says goes to the second
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # of torch.compile: there is no GPU


def count_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB (1e9 bytes): of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    size = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * size / 1e9


def describe_machine(device: torch.device, processes: int, precision: str) -> dict[str, Any]:
    """What a summary says of where it was computed."""
    packages = ("itpn", "torch", "torchvision", "timm", "lightning")
    return {
        "peak_memory_gb": peak_memory_gb(device),
        "device": device_name(device),
        "processes": processes,
        "precision": precision,
        "versions": {"python": platform.python_version(), **{p: import_module(p).__version__ for p in packages}},
    }
