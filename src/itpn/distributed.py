"""Collective operations over the processes of a run. With one process they return its own value."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from itpn.errors import MachineError, UserError

T = TypeVar("T")
HEAD_START = 1.0  # seconds in which the first process says why all end: whoever started them kills the others then


def world_size() -> int:
    """Number of processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(thing: T) -> list[T]:
    """The values of all processes, by rank, on each of them."""
    things: list[Any] = [thing] * world_size()
    if len(things) > 1:
        dist.all_gather_object(things, thing)
    return things


def broadcast(thing: T) -> T:
    """The value of the first process, on each of them."""
    things = [thing]
    if world_size() > 1:
        dist.broadcast_object_list(things, src=0)
    return things[0]


def of_first(compute: Callable[[], T]) -> T:
    """What the first process computes, on each of them, while the others wait.

    Raises:
        UserError, MachineError: on all of them, where the first raises one, which has the message alone.
    """
    if world_size() == 1 or dist.get_rank() == 0:
        try:
            thing = compute()
        except Exception as error:  # or else they would wait for ever
            broadcast((None, UserError if isinstance(error, UserError) else MachineError))
            raise
        broadcast((thing, None))
        return thing
    found: tuple[Any, type[UserError | MachineError] | None] = broadcast((None, None))
    if found[1] is not None:
        time.sleep(HEAD_START)
        raise found[1]
    result: T = found[0]
    return result


def mean(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    return sum_of_all(x) / world_size()


def sum_of_all(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes; its gradient is the sum of all gradients."""
    return x if world_size() == 1 else _Sum.apply(x)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Sum.forward(ctx, grads[0])


def start_maximum(x: Tensor) -> "dist.Work":
    """Start an all-reduce of the maximum, in place; wait for the result before reading ``x``."""
    work = dist.all_reduce(x, dist.ReduceOp.MAX, async_op=True)
    assert work is not None
    return work
