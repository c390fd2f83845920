"""What runs of fine-tuning begin with: a network, with a checkpoint's weights or without, and a number of epochs."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from itpn.checkpoints.files import Checkpoint, named_tensors, read_checkpoint, write_safetensors
from itpn.checkpoints.finetuning import settle
from itpn.config import FineTuningRun
from itpn.seeding import derive_seed
from itpn.tasks.finetuning import FineTuningTask

STEPS, EPOCHS = 2000, (10, 200)  # of a run that is left to scale with its images: so many steps, within these epochs

Network = TypeVar("Network", bound=nn.Module)


def read_start(config: FineTuningRun) -> Checkpoint | None:
    """The checkpoint that a run starts from, if any; what the settings leave to it is filled in."""
    path = config.model.checkpoint
    found = None if path is None else read_checkpoint(path)
    settle(config, found)
    return found


def real_paths(*paths: str | None) -> list[str | None]:
    """Places, however they were written, to see whether a network was trained on what it is evaluated on."""
    return [None if path is None else os.path.realpath(path) for path in paths]


def start_network(
    config: FineTuningRun,
    found: Checkpoint | None,
    make: Callable[[], tuple[Network, list[str]]],
) -> tuple[Network, list[str]]:
    """The network that a run begins with, and what is remarkable about its weights.

    Args:
        make: builds it, with the weights of the checkpoint, and says what is not as there.
    """
    torch.manual_seed(derive_seed(config.seed, "weights"))
    model, notes = make()
    return model, notes if found is None else [f"starting from the weights of {found.source}", *notes]


def scale_epochs(config: FineTuningRun, images: int, processes: int = 1) -> None:
    """Settle how long a run takes whose settings leave it to the number of images, in place."""
    if not config.trainer.max_epochs:
        batch = config.data.batch_size * processes * config.trainer.accumulate_grad_batches
        steps = max(1, images // batch)
        config.trainer.max_epochs = min(max(math.ceil(STEPS / steps), EPOCHS[0]), EPOCHS[1])


def save_network(path: Path, task: FineTuningTask) -> dict[str, str]:
    """Write the weights as a file that `itpn.load` reads whole."""
    write_safetensors(path, named_tensors(task.model), {"recipe": task.recipe, **task.describe()})
    return {"saved": "weights"}
