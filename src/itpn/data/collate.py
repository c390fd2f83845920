"""From the views of single images to a batch."""

from typing import Any

import torch

View = dict[str, Any]  # what a transform makes of an image
Batch = dict[str, Any]


def stack(views: list[View]) -> Batch:
    """Stack tensors of one size along a new first axis."""
    return {name: torch.stack([view[name] for view in views]) for name in views[0]}


def collect(views: list[View]) -> Batch:
    """Collect tensors of different sizes in lists."""
    return {name: [view[name] for view in views] for name in views[0]}
