"""FSDP2: parameters, gradients and AdamW's averages in parts, one to each process (Zhao et al. 2023)."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from itpn.models.layers import TransformerBlock


def shard_network(model: nn.Module, mesh: DeviceMesh, precision: str) -> None:
    """Divide a network in place over the processes of a mesh of one dimension.

    A transformer block of stage 3, of a decoder or of a head is gathered when it is its turn, all else (stages 1 and 2,
    the pyramid: a small part) once a pass.

    Args:
        precision: Lightning's name of it. With "bf16-mixed" parts stay float32, as they do under autocast, and are
            gathered in bf16, into which autocast would turn the matrices, though not norms, tables and tokens;
            gradients are summed in float32.
    """
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = half if precision == "bf16-mixed" else MixedPrecisionPolicy()
    for module in model.modules():
        if isinstance(module, TransformerBlock):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
