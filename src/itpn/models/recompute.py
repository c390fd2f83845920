"""Activation checkpointing: what the backward pass finds kept, and what it computes again."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = bool | Literal["selective"]

_aten = torch.ops.aten
# what takes the time: all else in a block (norms, GELU, residual sums, reshapes) is cheap to do twice
PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def run_block(block: Callable[..., Tensor], how: Recompute, x: Tensor, *args: Any) -> Tensor:
    """``block(x, *args)``, of which the backward pass finds everything, what it cannot get cheaply, or nothing.

    Args:
        how: False keeps all activations, ``"selective"`` the results of matrix products and of attention, True only
            ``x`` (Chen et al. 2016, "Training deep nets with sublinear memory cost").
    """
    if not how:
        return block(x, *args)
    options: dict[str, Any] = {}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    return checkpoint(block, x, *args, use_reentrant=False, **options)
