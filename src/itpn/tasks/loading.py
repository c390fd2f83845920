"""The training loader of any run."""

from typing import Any

import torch

from itpn.data.batches import Transform
from itpn.data.files import ImageSource
from itpn.data.loader import TrainingLoader
from itpn.data.readers import Reader
from itpn.training.config import RunConfig


def make_training_loader(
    config: RunConfig,
    source: ImageSource | Reader,
    transform: Transform,
    rank: int,
    world_size: int,
    batch_size: int | None = None,
    **own: Any,
) -> TrainingLoader:
    """The training loader of any run.

    Args:
        batch_size: None for that of the settings.
        own: what only some kinds of runs have, as of :class:`TrainingLoader`.
    """
    return TrainingLoader(
        source,
        transform,
        batch_size=batch_size or config.data.batch_size,
        num_workers=config.data.num_workers,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        max_pixels=config.data.max_pixels,
        pin_memory=torch.cuda.is_available(),
        **own,
    )
