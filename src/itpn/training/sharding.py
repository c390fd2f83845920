"""How several processes share the work: each with a copy of everything (DDP), or each with a part (FSDP2)."""

import inspect
from typing import Any

import lightning as L
import torch
from lightning.fabric.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from itpn.errors import UserError
from itpn.training.config import RunConfig
from itpn.training.launch import Launch, choose_devices, choose_precision, make_fabric
from itpn.training.module import TrainingModule


def make_training_fabric(module: TrainingModule, launch: Launch) -> L.Fabric:
    """The devices of a training run, and how its processes share the work.

    Raises:
        UserError: there are no such devices, or the settings cannot be sharded.
    """
    config = module.config
    check_strategy(config, launch)
    # with accumulation torch's reducer fails: it counts uses in the first pass, which is not to be synchronized
    strategy = make_strategy(static_graph=module.static_graph and config.trainer.accumulate_grad_batches == 1)
    return make_fabric(config.trainer, launch, strategy)


def check_strategy(config: RunConfig, launch: Launch) -> None:
    """Raise :class:`UserError` for what cannot be sharded."""
    if config.trainer.strategy == "ddp":
        return
    devices = choose_devices(config.trainer, launch)
    reason = config.sharding_problem()
    if reason is None and not devices.several:
        reason = "needs several processes, see --trainer.devices"
    elif reason is None and choose_precision(config.trainer.precision, devices.cuda) == "16-mixed":
        reason = "has no loss scaling: choose another --trainer.precision"
    elif reason is None and config.trainer.compile:
        reason = "does not go with --trainer.compile"
    if reason is not None:
        raise UserError(f"--trainer.strategy fsdp {reason}; without it each process holds a copy of everything")


def make_strategy(static_graph: bool) -> DDPStrategy:
    """DDP, which sums gradients while the backward pass still runs."""
    known = inspect.signature(DistributedDataParallel).parameters
    # no buffer differs between processes: tables of positions never change, and batch norms sum over all
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    buffers: dict[str, Any] = {name: False}
    return DDPStrategy(gradient_as_bucket_view=True, find_unused_parameters=False, static_graph=static_graph, **buffers)


def distribute(fabric: L.Fabric, module: TrainingModule, sharded: bool) -> nn.Module:
    """Move a module to the device, and return what computes its training step."""
    if sharded:
        mesh = init_device_mesh(fabric.device.type, (fabric.world_size,))
        shard_network(module.model, mesh, str(fabric.strategy.precision.precision))
        return module.to(fabric.device)
    return fabric.strategy.setup_module(module.to(fabric.device))


def shard_network(model: nn.Module, mesh: DeviceMesh, precision: str) -> None:
    """Divide a network in place over the processes of a mesh of one dimension.

    A module whose class sets ``gathered_alone``, as transformer blocks of stage 3, decoders and heads do, is gathered
    when it is its turn; all else (stages 1 and 2, the pyramid: a small part) once a pass.

    Args:
        precision: Lightning's name of it. With "bf16-mixed" parts stay float32, as they do under autocast, and are
            gathered in bf16, into which autocast would turn the matrices, though not norms, tables and tokens;
            gradients are summed in float32.
    """
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = half if precision == "bf16-mixed" else MixedPrecisionPolicy()
    for module in model.modules():
        if getattr(module, "gathered_alone", False):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
