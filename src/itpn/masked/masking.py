"""Which units are hidden."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

ATTEMPTS = 10  # placements in a row that may fail before an image has to do with the blocks it has


class Split(NamedTuple):
    """Visible and hidden units of images.

    Attributes:
        visible, hidden: int64 [B, V] and [B, M], ascending, together all units; where an image hides fewer than M,
            ``hidden`` begins with visible ones.
        order: one after the other, [B, N]: the order of tokens in a decoder, as attention does not care.
    """

    visible: Tensor
    hidden: Tensor
    order: Tensor


def count_hidden(units: int, ratio: float) -> int:
    """How many of ``units`` a mask ratio hides; ValueError if that is none or all of them."""
    hidden = units - int(units * (1 - ratio))
    if not 0 < hidden < units:
        raise ValueError(f"mask_ratio {ratio} leaves no visible or no hidden unit of {units}")
    return hidden


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
    keep = units - count_hidden(units, ratio)
    # torch.compile takes no generator, not even None, where the batch size is dynamic
    given: dict[str, Any] = {} if generator is None else {"generator": generator}
    order = torch.rand(batch, units, device=device, **given).argsort(dim=1)
    mask = torch.ones(batch, units, dtype=torch.bool, device=device)
    return mask.scatter(1, order[:, :keep], False)


def draw_block_mask(
    batch: int,
    grid: tuple[int, int],
    hidden: int,
    min_block: int | None = None,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    exact: bool = False,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hide units in rectangles, which may overlap (BEiT: Bao et al. 2022, algorithm 1).

    A block's area is uniform between ``min_block`` and what is left to hide, its aspect log-uniform, its place
    uniform. It is taken if it is smaller than the grid both ways and hides at least one more unit, but no more than
    are left to hide. An image is done when none are left, or when ten blocks in a row could not be taken.

    Random numbers come from where `draw_random_mask` takes them.

    Args:
        grid: rows and columns of units.
        hidden: units to hide in an image.
        min_block: smallest area drawn; None for 16 of 196 units, or the same share of another grid.
        aspect: smallest and largest height of a block, as a multiple of its width.
        exact: hide single units at random where the blocks hide too few.

    Returns:
        bool [batch, rows * cols], True where hidden; never more than ``hidden`` in a row, but unless ``exact`` often
        fewer: 74.5 on average where 75 of 14 x 14 are wanted. Where 147 are, 3 images in 100,000 get none at all.

    Raises:
        ValueError: more units to hide than there are, or less than none, or blocks without area.
    """
    units = grid[0] * grid[1]
    if not 0 <= hidden <= units:
        raise ValueError(f"cannot hide {hidden} of {units} units")
    if min_block is None:
        min_block = max(1, round(16 * units / 196))
    if min_block < 1:
        raise ValueError(f"the smallest block has {min_block} units: it needs at least 1")
    # A loop cannot depend on the values, or a GPU would have to be waited for. After so many blocks hardly an image
    # is not done: going on would hide 0.00 units more on average of 14 x 14, and 0.06 of 32 x 32 (75 % of them).
    blocks = min(hidden, 6 + round(18 * hidden / units))

    # torch.compile takes no generator, not even None, where the batch size is dynamic
    given: dict[str, Any] = {} if generator is None else {"generator": generator}
    draws = torch.rand(blocks, 4, ATTEMPTS, batch, device=device, **given)
    mask = _place_blocks_op(draws, grid[0], grid[1], hidden, min_block, aspect[0], aspect[1])
    if exact:
        noise = torch.rand(batch, units, device=device, **given).masked_fill(mask, 2)
        mask = mask.scatter(1, noise.topk(hidden, dim=1).indices, True)
    return mask


def _place_blocks(
    draws: Tensor, rows: int, cols: int, hidden: int, min_block: int, min_aspect: float, max_aspect: float
) -> Tensor:
    """Place one block after the other in all images at once, without a look at the values.

    Args:
        draws: random numbers in [0, 1) [blocks, 4, ATTEMPTS, batch] for area, aspect, top and left. The batch is
            last because long inner loops are quick.

    Returns:
        bool [batch, rows * cols], True where hidden.
    """
    batch, device = draws.shape[-1], draws.device
    log_aspect = math.log(min_aspect) + math.log(max_aspect / min_aspect) * draws[:, 1]
    stretches = (torch.stack((log_aspect, -log_aspect), dim=1) / 2).exp()  # of height and of width
    limit = torch.stack([torch.full((1, 1), float(side), device=device) for side in (rows, cols)])
    smallest = torch.full((), float(min_block), device=device)
    order = torch.arange(ATTEMPTS, dtype=torch.float32, device=device)[:, None]
    # One row and one column of hidden units come before the first, so that sums of all units above and to the left,
    # each unit itself included, are at hand for every corner of a block.
    row, col = [torch.arange(side + 1, dtype=torch.float32, device=device)[:, None] for side in (rows, cols)]
    visible = ((row[:, None] > 0) & (col > 0)).expand(-1, -1, batch)
    remaining = torch.full((1, batch), float(hidden), device=device)
    active = torch.ones(1, batch, dtype=torch.bool, device=device)
    for draw, stretch in zip(draws, stretches, strict=True):
        # A failure changes nothing for the next attempt: all ten are made side by side, and the first to fit counts.
        # Less than min_block may be left, and the area then lies between the two all the same.
        area = torch.lerp(smallest, remaining, draw[0])
        size = (area.sqrt() * stretch).round()
        fits = (size < limit).all(dim=0)
        size = size.minimum(limit)  # keeps what does not fit within the table
        start = ((limit - size + 1) * draw[2:]).floor()
        edges = torch.stack((start, start + size), dim=1)  # [rows or columns, start or end, ATTEMPTS, batch]
        sums = visible.cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32).flatten(0, 1)
        corners = (edges[0, :, None] * (cols + 1) + edges[1]).long()  # [2, 2, ATTEMPTS, batch]
        # The sums at a block's four corners, differenced both ways, count its visible units: [1, ATTEMPTS, batch].
        new = sums.gather(0, corners.flatten(0, 2)).view_as(corners).diff(dim=0).diff(dim=1)[0]
        fits = fits & (new[0] > 0) & (new[0] <= remaining) & active
        first = order.where(fits, ATTEMPTS).amin(dim=0, keepdim=True)
        active = first < ATTEMPTS
        # Where none fits these sums are 0: a block of no units.
        chosen = (torch.cat((edges.flatten(0, 1), new)) * (order == first)).sum(dim=1, keepdim=True)
        top, bottom, left, right, count = chosen
        in_rows, in_cols = (row > top) & (row <= bottom), (col > left) & (col <= right)
        visible = visible & ~(in_rows[:, None] & in_cols)
        remaining = remaining - count
    return ~visible[1:, 1:].flatten(0, 1).T.contiguous()


# To torch.compile one call: as a graph of its own, hundreds of small steps take minutes to compile and run no faster.
_place_blocks_op = torch.library.custom_op("itpn::place_blocks", _place_blocks, mutates_args=())


@_place_blocks_op.register_fake
def _(draws: Tensor, rows: int, cols: int, hidden: int, min_block: int, min_aspect: float, max_aspect: float) -> Tensor:
    return draws.new_empty((draws.shape[-1], rows * cols), dtype=torch.bool)


def split_mask(mask: Tensor, visible: int) -> Split:
    """Indices of visible and of hidden units, for a mask bool [B, N] with at least ``visible`` False in every row.

    The count is given, not read from the mask, so that a step on a GPU never waits for the device.
    """
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    return Split(order[:, :visible], order[:, visible:], order)
