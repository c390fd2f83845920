"""Layers and means over the batch of all processes, so that several of them compute what one would."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def precise(x: Tensor) -> Tensor:
    """At least in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def processes() -> int:
    """How many train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def batch_shares(counts: list[int], device: torch.device) -> Tensor:
    """Factors that turn means over this process's samples into means over those of all, once gradients are averaged.

    Without them, objects of an image that shares a process with few others would count for more.

    Args:
        counts: of samples that a loss is the mean of, here.
    """
    own = torch.tensor(counts, dtype=torch.float32, device=device)
    if processes() == 1:
        return torch.ones_like(own)
    total = own.clone()
    dist.all_reduce(total)
    return own * processes() / total.clamp(min=1)


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batch of all processes, on any device (torch's own is for GPUs alone)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or processes() == 1:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        wide = precise(x)  # half precision has too few digits for sums
        count = wide.new_full((1,), wide.numel() / wide.shape[1])
        sums = _sum_over_processes(torch.cat([wide.sum(dim=(0, 2, 3)), count]))
        total = sums[-1].detach()
        mean = sums[:-1] / total
        centred = wide - mean[:, None, None]
        variance = _sum_over_processes(centred.square().sum(dim=(0, 2, 3))) / total
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean), momentum)
            self.running_var.lerp_((variance * total / (total - 1)).to(self.running_var), momentum)
        scale = (variance + self.eps).rsqrt() * self.weight
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        dist.all_reduce(grad)
        return grad


def _sum_over_processes(x: Tensor) -> Tensor:
    return _SumOverProcesses.apply(x)


def sync_batch_norm(module: nn.Module) -> nn.Module:
    """Replace each batch norm of a network, which stays the same otherwise, in place."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            synced = SyncedBatchNorm2d(child.num_features, child.eps, child.momentum)
            synced.load_state_dict(child.state_dict())
            setattr(module, name, synced)
        else:
            sync_batch_norm(child)
    return module
