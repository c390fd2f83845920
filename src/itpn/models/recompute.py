"""Activation checkpointing: what the backward pass finds kept, and what it computes again."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.utils.checkpoint import checkpoint

Recompute = bool | Literal["selective"]


def run_block(block: Callable[..., Tensor], how: Recompute, x: Tensor, *args: Any) -> Tensor:
    """``block(x, *args)``, of which the backward pass finds everything, what it cannot get cheaply, or nothing.

    Args:
        how: False keeps all activations, ``"selective"`` all but norms and activation functions of feed-forward layers,
            True only ``x`` (Chen et al. 2016, "Training deep nets with sublinear memory cost").
    """
    if how == "selective":
        return block(x, *args, keep_products=True)
    return checkpoint(block, x, *args, use_reentrant=False) if how else block(x, *args)


def recompute_cheap(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``product(x)``, cheap operations and then one matrix product; of these, the backward pass finds only ``x`` kept.

    It runs the cheap ones again, up to the input of the product, which is all that it lacks: torch stops there. (A
    policy for each operator, torch's ``create_selective_checkpoint_contexts``, runs Python for every one of them, in
    eager mode longer than a GPU needs for its work.)
    """
    return checkpoint(product, x, use_reentrant=False, preserve_rng_state=False)
