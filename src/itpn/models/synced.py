"""Batch norm and means over the batches of all processes, so that several compute the same as one."""

import torch
from torch import Tensor, nn

from itpn.distributed import sum_of_all, world_size


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; leave float32 and float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def batch_fractions(counts: list[int], device: torch.device) -> Tensor:
    """Factors for losses that are means over the samples of one process.

    DDP averages gradients over processes. With these factors the result is the mean over the samples of all processes;
    without them, samples of a process that has few of them would have a larger weight.

    Args:
        counts: for each loss, the number of samples in its mean on this process.

    Returns:
        float32 [len(counts)]: this process's fraction of all samples, times the number of processes.
    """
    own = torch.tensor(counts, dtype=torch.float32, device=device)
    if world_size() == 1:
        return torch.ones_like(own)
    return own * world_size() / sum_of_all(own).clamp(min=1)


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, on CPUs too, which torch.nn.SyncBatchNorm refuses (torch 2.15)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        wide = at_least_float32(x)  # half precision has too few digits for sums
        count = wide.new_full((1,), wide.numel() / wide.shape[1])
        sums = sum_of_all(torch.cat([wide.sum(dim=(0, 2, 3)), count]))
        total = sums[-1].detach()
        mean = sums[:-1] / total
        centred = wide - mean[:, None, None]
        variance = sum_of_all(centred.square().sum(dim=(0, 2, 3))) / total
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean), momentum)
            self.running_var.lerp_((variance * total / (total - 1)).to(self.running_var), momentum)
        scale = (variance + self.eps).rsqrt() * self.weight
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def sync_batch_norm(module: nn.Module) -> nn.Module:
    """Replace each BatchNorm2d inside a network by a synchronized one with the same weights, in place."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            synced = SyncedBatchNorm2d(child.num_features, child.eps, child.momentum)
            synced.load_state_dict(child.state_dict())
            setattr(module, name, synced)
        else:
            sync_batch_norm(child)
    return module
