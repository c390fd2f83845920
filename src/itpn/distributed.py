"""What the processes of a run tell one another."""

from typing import Any, TypeVar

import torch

T = TypeVar("T")


def gather(thing: T, world_size: int) -> list[T]:
    """What each process has, to each of them."""
    if world_size == 1:
        return [thing]
    things: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(things, thing)
    return things
