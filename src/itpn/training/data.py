"""Batches to train on, and how they come to the device."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils._pytree import tree_leaves

from itpn.data.loader import TrainingLoader
from itpn.training.state import Training


def read_batches(run: Training) -> Iterator[tuple[dict[str, Any], bool, bool]]:
    """Batches on the device, epoch after epoch, and whether each is the first or the last of an optimizer step.

    An epoch ends with a step, of fewer passes if need be.
    """
    accumulate = run.config.trainer.accumulate_grad_batches
    while True:
        place, batches = run.loader.state_dict(), iter(run.loader)
        run.epoch = place["epoch"]
        for number in range(place["batch"], len(run.loader)):
            with run.mark("data wait"):
                batch = next(batches)
            with run.mark("copy to device"):
                batch = copy_batch(run.loader, batch, run.device, run.copies)
            yield batch, number % accumulate == 0, (number + 1) % accumulate == 0 or number + 1 == len(run.loader)


def copy_batch(loader: TrainingLoader, batch: Any, device: torch.device, copies: torch.cuda.Stream | None) -> Any:
    """A batch on the device: from pinned memory it is copied while the step before still computes."""
    if copies is None:
        return move_data_to_device(loader.finish(batch, device), device)
    with torch.cuda.stream(copies):
        batch = move_data_to_device(loader.finish(batch, device), device)
    computing = torch.cuda.current_stream(device)
    computing.wait_stream(copies)
    for tensor in tree_leaves(batch):
        if isinstance(tensor, Tensor) and tensor.is_cuda:
            tensor.record_stream(computing)
    return batch
