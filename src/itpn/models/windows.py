"""Fewer tokens and fewer pairs of tokens in deep blocks (Tian et al., "Fast-iTPN", TPAMI 2024, section 3).

*Token migration* lets redundant tokens skip the deep blocks: they are put back as they left, for the pyramid and the
classifier. *Token gathering* replaces global attention by attention inside windows, with a few gathering tokens in
each window that see one another. Both are ours from the paper's description, for no code was published, and neither
has parameters: a gathering token starts as the mean of what it gathers. Any weights can be run with them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]  # rows, columns of units


def pick_distinct(x: Tensor, keep: int, real: Tensor | None = None) -> Tensor:
    """The tokens least like the mean of their row, which the others can speak for.

    Args:
        x: [B, T, C].
        real: bool [B, T], False for padding, which is picked last.

    Returns:
        int64 [B, keep], ascending.
    """
    mean = x.mean(dim=1, keepdim=True)
    if real is not None:
        weight = real.unsqueeze(-1).to(x.dtype)
        mean = (x * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True)
    likeness = F.cosine_similarity(x.detach().float(), mean.detach().float(), dim=-1)  # [B, T]
    if real is not None:
        likeness = likeness.masked_fill(~real, 2.0)
    return likeness.topk(keep, dim=1, largest=False, sorted=False).indices.sort(dim=1).values


def take(x: Tensor, picked: Tensor) -> Tensor:
    """[B, T, C] and int64 [B, K] -> [B, K, C]."""
    return x.gather(1, picked.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def put_back(whole: Tensor, picked: Tensor, x: Tensor) -> Tensor:
    """``whole`` [B, T, C] with the tokens ``picked`` [B, K] replaced by ``x`` [B, K, C]."""
    return whole.scatter(1, picked.unsqueeze(-1).expand_as(x), x.to(whole.dtype))


class Windows:
    """The windows that a grid of units is cut into, W of them with T units and G gathering tokens each.

    Args:
        grid: rows and columns of units; the last windows are padded where they do not divide.
        side: units of a window's side; T is its square.
        gather_side: a window has this many gathering tokens squared, each of an equal part of it.
    """

    def __init__(self, grid: Grid, side: int, gather_side: int) -> None:
        self.grid = grid
        self.side = side
        self.gather_side = gather_side
        self.rows, self.cols = (-(-units // side) for units in grid)
        self.gathering = gather_side**2
        self.real: Tensor | None = None  # bool [B * W, T], after padding
        self.gathering_real: Tensor | None = None  # bool [B * W, G]

    @property
    def count(self) -> int:
        return self.rows * self.cols

    def cut(self, x: Tensor) -> Tensor:
        """Units [B, N, C], row-major -> tokens [B * W, T + G, C], gathering tokens last."""
        batch = len(x)
        maps = x.reshape(batch, *self.grid, -1)
        real = None
        below, right = self.rows * self.side - self.grid[0], self.cols * self.side - self.grid[1]
        if below or right:
            maps = F.pad(maps, (0, 0, 0, right, 0, below))
            real = F.pad(x.new_ones(1, *self.grid, 1), (0, 0, 0, right, 0, below))
            part = self._parts(real).mean(dim=2).clamp(min=0.5 / self.side**2)  # share that is real, [W, G, 1]
            self.real = (self._cut(real)[..., 0] > 0).repeat(batch, 1)
            self.gathering_real = (self._parts(real).sum(dim=2)[..., 0] > 0).repeat(batch, 1)
        gathered = self._parts(maps).mean(dim=2)  # [B * W, G, C]
        if real is not None:
            gathered = gathered / part.repeat(batch, 1, 1)
        return torch.cat([self._cut(maps), gathered], dim=1)

    def _cut(self, maps: Tensor) -> Tensor:
        """[B, rows, cols, C] -> [B * W, T, C]."""
        x = maps.reshape(len(maps), self.rows, self.side, self.cols, self.side, -1).transpose(2, 3)
        return x.reshape(-1, self.side**2, maps.shape[-1])

    def _parts(self, maps: Tensor) -> Tensor:
        """[B, rows, cols, C] -> the units of each gathering token [B * W, G, T / G, C]."""
        part = self.side // self.gather_side
        x = self._cut(maps).reshape(-1, self.gather_side, part, self.gather_side, part, maps.shape[-1])
        return x.transpose(2, 3).reshape(len(x), self.gathering, part**2, -1)

    def join(self, x: Tensor) -> Tensor:
        """Tokens [B * W, T, C] back to units [B, N, C]; padding is left out."""
        x = x.reshape(-1, self.rows, self.cols, self.side, self.side, x.shape[-1]).transpose(2, 3)
        x = x.reshape(len(x), self.rows * self.side, self.cols * self.side, -1)
        return x[:, : self.grid[0], : self.grid[1]].flatten(1, 2)

    def share(self, x: Tensor) -> Tensor:
        """Keys or values of windows, with the gathering tokens of the whole image in place of a window's own.

        [B * W, heads, T + G, D] -> [B * W, heads, T + W * G, D]; T may have become smaller.
        """
        own, gathered = x[:, :, : -self.gathering], x[:, :, -self.gathering :]
        heads, dim = x.shape[1], x.shape[-1]
        gathered = gathered.reshape(-1, 1, self.count, heads, self.gathering, dim).transpose(2, 3)
        gathered = gathered.expand(-1, self.count, -1, -1, -1, -1)  # [B, W, heads, W, G, D]
        return torch.cat([own, gathered.reshape(len(x), heads, self.count * self.gathering, dim)], dim=2)

    def mask(self) -> Tensor | None:
        """Which keys of :meth:`share` are real, bool [B * W, 1, 1, T + W * G]; None where all are."""
        if self.real is None or self.gathering_real is None:
            return None
        gathered = self.gathering_real.reshape(-1, 1, self.count * self.gathering).expand(-1, self.count, -1)
        return torch.cat([self.real, gathered.flatten(0, 1)], dim=1)[:, None, None]

    def pick(self, picked: Tensor) -> None:
        """Go on with some units of each window, int64 [B * W, K]."""
        if self.real is not None:
            self.real = self.real.gather(1, picked)
