"""Token migration and token gathering: cheaper deep blocks (Tian et al., "Fast-iTPN", TPAMI 2024, section 3).

*Token migration* lets redundant tokens skip the deep blocks. Afterwards they are put back unchanged, for the pyramid
and the classifier. *Token gathering* replaces global attention by attention inside windows. Each window has a few
gathering tokens, and all tokens attend to the gathering tokens of all windows. No code was published: we implement the
paper's description. Neither has parameters (a gathering token starts as the mean of its patches), so any weights can be
used with them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from itpn.models.position import Grid


def pick_distinct(x: Tensor, keep: int, real: Tensor | None = None) -> Tensor:
    """Pick the tokens with the lowest cosine similarity to the mean of their row; the others are the redundant ones.

    Args:
        x: [B, T, C].
        keep: number of tokens to pick.
        real: bool [B, T], False for padding, which is picked last and does not enter the mean.

    Returns:
        int64 [B, keep], ascending.
    """
    x = x.detach().float()
    weight = x.new_ones(1) if real is None else real.unsqueeze(-1).float()
    similarity = F.cosine_similarity(x, (x * weight).sum(dim=1, keepdim=True), dim=-1)  # [B, T]; sum and mean agree
    if real is not None:
        similarity = similarity.masked_fill(~real, 2.0)
    return similarity.topk(keep, dim=1, largest=False, sorted=False).indices.sort(dim=1).values


def take(x: Tensor, picked: Tensor) -> Tensor:
    """[B, T, C] and int64 [B, K] -> [B, K, C]."""
    return x.gather(1, picked.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def put_back(whole: Tensor, picked: Tensor, x: Tensor) -> Tensor:
    """``whole`` [B, T, C] with the tokens ``picked`` [B, K] replaced by ``x`` [B, K, C]."""
    return whole.scatter(1, picked.unsqueeze(-1).expand_as(x), x.to(whole.dtype))


class Windows:
    """A grid of patches divided into W windows of T patches and G gathering tokens each.

    Args:
        grid: rows and columns of patches; the last windows are padded where the grid is not divisible.
        side: patches of a window's side; T is its square.
        gather_side: its square is G; each gathering token starts as the mean of an equal part of the window.
        mask: bool [B * W, 1, 1, T + W * G], False for the keys of :meth:`add_gathering_tokens` that are padding; None
            without padding.
    """

    # .shape[0], not len(): torch.export would make a dynamic batch size a constant

    def __init__(self, grid: Grid, side: int, gather_side: int, mask: Tensor | None = None) -> None:
        self.grid = grid
        self.side = side
        self.gather_side = gather_side
        self.mask = mask
        self.rows, self.cols = [-(-length // side) for length in grid]
        self.count = self.rows * self.cols
        self.gathering = gather_side**2

    @property
    def real(self) -> Tensor | None:
        """bool [B * W, T], False for patches that are padding; None without padding."""
        return None if self.mask is None else self.mask[:, 0, 0, : -self.count * self.gathering]

    def cut(self, x: Tensor) -> tuple[Tensor, "Windows"]:
        """Patches [B, N, C], row-major -> tokens [B * W, T + G, C], gathering tokens last; and windows with a mask."""
        below, right = self.rows * self.side - self.grid[0], self.cols * self.side - self.grid[1]
        maps = F.pad(x.reshape(x.shape[0], *self.grid, -1), (0, 0, 0, right, 0, below))
        real = F.pad(x.new_ones(1, *self.grid, 1), (0, 0, 0, right, 0, below))
        counts = self._parts(real).sum(dim=2)  # [W, G, 1]
        gathered = self._parts(maps).sum(dim=2) / counts.clamp(min=1).repeat(x.shape[0], 1, 1)  # padding is zero
        mask = None
        if below or right:
            mask = torch.cat([self._cut(real)[..., 0], counts.reshape(1, -1).expand(self.count, -1)], dim=1) > 0
            mask = mask.repeat(x.shape[0], 1)[:, None, None]
        return torch.cat([self._cut(maps), gathered], dim=1), Windows(self.grid, self.side, self.gather_side, mask)

    def _cut(self, maps: Tensor) -> Tensor:
        """[B, rows, cols, C] -> [B * W, T, C]."""
        x = maps.reshape(maps.shape[0], self.rows, self.side, self.cols, self.side, -1).transpose(2, 3)
        return x.reshape(-1, self.side**2, maps.shape[-1])

    def _parts(self, maps: Tensor) -> Tensor:
        """[B, rows, cols, C] -> the patches of each gathering token [B * W, G, T / G, C]."""
        part = self.side // self.gather_side
        x = self._cut(maps).reshape(-1, self.gather_side, part, self.gather_side, part, maps.shape[-1])
        return x.transpose(2, 3).reshape(x.shape[0], self.gathering, part**2, -1)

    def join(self, x: Tensor) -> Tensor:
        """Tokens [B * W, T, C] back to patches [B, N, C], without padding."""
        x = x.reshape(-1, self.rows, self.cols, self.side, self.side, x.shape[-1]).transpose(2, 3)
        x = x.reshape(x.shape[0], self.rows * self.side, self.cols * self.side, -1)
        return x[:, : self.grid[0], : self.grid[1]].flatten(1, 2)

    def add_gathering_tokens(self, x: Tensor) -> Tensor:
        """Give each window the gathering tokens of all windows of its image, for keys or values.

        [B * W, heads, T + G, D] -> [B * W, heads, T + W * G, D]; after migration T is smaller.
        """
        own, gathered = x.tensor_split([x.shape[2] - self.gathering], dim=2)
        heads, dim = x.shape[1], x.shape[-1]
        gathered = gathered.reshape(-1, 1, self.count, heads, self.gathering, dim).transpose(2, 3)
        gathered = gathered.expand(-1, self.count, -1, -1, -1, -1)  # [B, W, heads, W, G, D]
        return torch.cat([own, gathered.reshape(x.shape[0], heads, self.count * self.gathering, dim)], dim=2)

    def pick(self, picked: Tensor) -> "Windows":
        """These windows with only the picked patches, int64 [B * W, K]."""
        mask = self.mask
        if mask is not None:
            own, gathered = mask.tensor_split([mask.shape[-1] - self.count * self.gathering], dim=-1)
            mask = torch.cat([own.gather(-1, picked[:, None, None]), gathered], dim=-1)
        return Windows(self.grid, self.side, self.gather_side, mask)
