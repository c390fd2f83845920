"""Activation checkpointing: which activations are kept for the backward pass, and which it recomputes."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.utils.checkpoint import checkpoint

Recompute = bool | Literal["selective"]


def run_block(block: Callable[..., Tensor], how: Recompute, x: Tensor, *args: Any) -> Tensor:
    """``block(x, *args)``, with all, some or none of its activations kept for the backward pass.

    Args:
        how: False keeps all activations. ``"selective"`` keeps all but the outputs of norms and activation functions of
            feed-forward layers. True keeps only ``x`` (Chen et al. 2016, "Training deep nets with sublinear memory
            cost").
    """
    if how == "selective":
        return block(x, *args, keep_products=True)
    return checkpoint(block, x, *args, use_reentrant=False) if how else block(x, *args)


def recompute_cheap(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``product(x)``: cheap operations, then one matrix product. Only ``x`` is kept for the backward pass.

    The backward pass recomputes the cheap operations up to the input of the product, and torch stops there. (torch's
    ``create_selective_checkpoint_contexts`` chooses by operator, but it runs Python for each of them; in eager mode
    that takes longer than the GPU's work.)
    """
    return checkpoint(product, x, use_reentrant=False, preserve_rng_state=False)
