"""Masks: random or block-wise, and the split of patches into visible and masked ones."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

ATTEMPTS = 10  # an image is done after so many failed placements in a row


class Split(NamedTuple):
    """Visible and masked patches of images.

    Attributes:
        visible, masked: int64 [B, V] and [B, M], ascending, together all patches. For an image with fewer than M masked
            patches, ``masked`` begins with visible ones.
        order: ``visible`` followed by ``masked``, [B, N]: the order of tokens in a decoder.
    """

    visible: Tensor
    masked: Tensor
    order: Tensor


def count_masked(patches: int, ratio: float) -> int:
    """Number of masked patches for a mask ratio.

    Raises:
        ValueError: the ratio masks none or all of them.
    """
    masked = patches - int(patches * (1 - ratio))
    if not 0 < masked < patches:
        raise ValueError(f"mask_ratio {ratio} leaves no visible or no masked patch of {patches}")
    return masked


def draw_random_mask(
    batch: int,
    patches: int,
    ratio: float,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mask the same number of patches in every image, uniformly at random (He et al. 2022, section 3).

    Without a generator, random numbers come from torch's global generator, which the training task seeds by step and
    rank.

    Returns:
        bool [batch, patches], True where masked; exactly ``patches - int(patches * (1 - ratio))`` per row.
    """
    keep = patches - count_masked(patches, ratio)
    # torch.compile takes no generator, not even None, where the batch size is dynamic
    given: dict[str, Any] = {} if generator is None else {"generator": generator}
    order = torch.rand(batch, patches, device=device, **given).argsort(dim=1)
    mask = torch.ones(batch, patches, dtype=torch.bool, device=device)
    return mask.scatter(1, order[:, :keep], False)


def draw_block_mask(
    batch: int,
    grid: tuple[int, int],
    masked: int,
    min_block: int | None = None,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    exact: bool = False,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mask patches in rectangular blocks, which may overlap (BEiT: Bao et al. 2022, algorithm 1).

    A block's area is uniform between ``min_block`` and the number of patches left to mask, its aspect log-uniform, its
    place uniform. It is accepted if it is smaller than the grid in both directions and masks at least one more patch,
    but no more than are left to mask. An image is done when none are left, or when ten blocks in a row were rejected.

    Random numbers come from the same generator as in `draw_random_mask`.

    Args:
        grid: rows and columns of patches.
        masked: patches to mask in an image.
        min_block: smallest area drawn; None for 16 of 196 patches, or the same fraction of another grid.
        aspect: smallest and largest height of a block, as a multiple of its width.
        exact: where the blocks mask too few patches, mask single ones at random.

    Returns:
        bool [batch, rows * cols], True where masked; never more than ``masked`` per row. Unless ``exact``, often fewer:
        on average 74.5 instead of 75 of 14 x 14 patches. Of 147, 3 images in 100,000 get no mask at all.

    Raises:
        ValueError: ``masked`` is negative or larger than the grid, or ``min_block`` is below 1.
    """
    patches = grid[0] * grid[1]
    if not 0 <= masked <= patches:
        raise ValueError(f"cannot mask {masked} of {patches} patches")
    if min_block is None:
        min_block = max(1, round(16 * patches / 196))
    if min_block < 1:
        raise ValueError(f"the smallest block has {min_block} patches: it needs at least 1")
    # A loop that depends on values would wait for the GPU, so the number of blocks is fixed. Almost every image is done
    # by then: more blocks would mask 0.00 more patches on average of 14 x 14, and 0.06 of 32 x 32 (75 % masked).
    blocks = min(masked, 6 + round(18 * masked / patches))

    # torch.compile takes no generator, not even None, where the batch size is dynamic
    given: dict[str, Any] = {} if generator is None else {"generator": generator}
    draws = torch.rand(blocks, 4, ATTEMPTS, batch, device=device, **given)
    mask = _place_blocks_op(draws, grid[0], grid[1], masked, min_block, aspect[0], aspect[1])
    if exact:
        noise = torch.rand(batch, patches, device=device, **given).masked_fill(mask, 2)
        mask = mask.scatter(1, noise.topk(masked, dim=1).indices, True)
    return mask


def _place_blocks(
    draws: Tensor, rows: int, cols: int, masked: int, min_block: int, min_aspect: float, max_aspect: float
) -> Tensor:
    """Place one block after the other, in all images at once, without control flow that depends on values.

    Args:
        draws: random numbers in [0, 1) [blocks, 4, ATTEMPTS, batch] for area, aspect, top and left. The batch is
            last because long inner loops are fast.

    Returns:
        bool [batch, rows * cols], True where masked.
    """
    batch, device = draws.shape[-1], draws.device
    log_aspect = math.log(min_aspect) + math.log(max_aspect / min_aspect) * draws[:, 1]
    stretches = (torch.stack((log_aspect, -log_aspect), dim=1) / 2).exp()  # of height and of width
    limit = torch.stack([torch.full((1, 1), float(side), device=device) for side in (rows, cols)])
    smallest = torch.full((), float(min_block), device=device)
    order = torch.arange(ATTEMPTS, dtype=torch.float32, device=device)[:, None]
    # The map gets one more row and column of masked patches, above and to the left. Its cumulative sums then exist for
    # every corner of a block.
    row, col = [torch.arange(side + 1, dtype=torch.float32, device=device)[:, None] for side in (rows, cols)]
    visible = ((row[:, None] > 0) & (col > 0)).expand(-1, -1, batch)
    remaining = torch.full((1, batch), float(masked), device=device)
    active = torch.ones(1, batch, dtype=torch.bool, device=device)
    for draw, stretch in zip(draws, stretches, strict=True):
        # A failed attempt does not change the next one: all ten are computed in parallel, and the first to fit counts.
        # Fewer than min_block patches may be left; the area then still lies between the two.
        area = torch.lerp(smallest, remaining, draw[0])
        size = (area.sqrt() * stretch).round()
        fits = (size < limit).all(dim=0)
        size = size.minimum(limit)  # keeps the indices of blocks that do not fit within the table
        start = ((limit - size + 1) * draw[2:]).floor()
        edges = torch.stack((start, start + size), dim=1)  # [rows or columns, start or end, ATTEMPTS, batch]
        sums = visible.cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32).flatten(0, 1)
        corners = (edges[0, :, None] * (cols + 1) + edges[1]).long()  # [2, 2, ATTEMPTS, batch]
        # Differences of the sums at a block's four corners count its visible patches: [1, ATTEMPTS, batch].
        new = sums.gather(0, corners.flatten(0, 2)).view_as(corners).diff(dim=0).diff(dim=1)[0]
        fits = fits & (new[0] > 0) & (new[0] <= remaining) & active
        first = order.where(fits, ATTEMPTS).amin(dim=0, keepdim=True)
        active = first < ATTEMPTS
        # Where no attempt fits, these sums are 0: a block without patches.
        chosen = (torch.cat((edges.flatten(0, 1), new)) * (order == first)).sum(dim=1, keepdim=True)
        top, bottom, left, right, count = chosen
        in_rows, in_cols = (row > top) & (row <= bottom), (col > left) & (col <= right)
        visible = visible & ~(in_rows[:, None] & in_cols)
        remaining = remaining - count
    return ~visible[1:, 1:].flatten(0, 1).T.contiguous()


# One opaque call for torch.compile: its hundreds of small steps would take minutes to compile and run no faster.
_place_blocks_op = torch.library.custom_op("itpn::place_blocks", _place_blocks, mutates_args=())


@_place_blocks_op.register_fake
def _(draws: Tensor, rows: int, cols: int, masked: int, min_block: int, min_aspect: float, max_aspect: float) -> Tensor:
    return draws.new_empty((draws.shape[-1], rows * cols), dtype=torch.bool)


def split_mask(mask: Tensor, visible: int) -> Split:
    """Indices of visible and masked patches, for a mask bool [B, N] with at least ``visible`` False in every row.

    The count is an argument and not read from the mask, so that a step on a GPU never waits for the device.
    """
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    return Split(order[:, :visible], order[:, visible:], order)
