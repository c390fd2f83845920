"""Which units are hidden."""

from typing import Any

import torch
from torch import Tensor


def draw_random_mask(
    batch: int,
    units: int,
    ratio: float,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hide the same number of units in every image, uniformly at random (He et al. 2022, section 3).

    Without a generator the draw comes from torch's global state, which the training task seeds by step and rank.

    Returns:
        bool [batch, units], True where hidden; exactly ``units - int(units * (1 - ratio))`` per row.
    """
    keep = int(units * (1 - ratio))
    # torch.compile takes no generator, not even None, where the batch size is dynamic
    given: dict[str, Any] = {} if generator is None else {"generator": generator}
    order = torch.rand(batch, units, device=device, **given).argsort(dim=1)
    mask = torch.ones(batch, units, dtype=torch.bool, device=device)
    return mask.scatter(1, order[:, :keep], False)


def split_mask(mask: Tensor, visible: int) -> tuple[Tensor, Tensor]:
    """Indices of visible and of hidden units, ascending, for a mask with ``visible`` False entries in every row.

    The count is given, not read from the mask, so that a step on a GPU never waits for the device.

    Returns:
        int64 [B, visible] and [B, N - visible].
    """
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, :visible], order[:, visible:]
