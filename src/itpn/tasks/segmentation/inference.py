"""How an image of any size is segmented: by windows, at several scales, mirrored."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from itpn.data.normalize import Normalize
from itpn.data.pixels import resize_pixels
from itpn.geometry import fit_sides
from itpn.tasks.segmentation.config import SegmentationConfig
from itpn.tasks.tiling import Grid, Tile, blend

WINDOWS = 4  # that are segmented at a time
ROWS = 64  # of the image that are classified at a time


@dataclass(frozen=True)
class Segmentation:
    """How an image is segmented: at the size of training, by windows, at several scales, mirrored.

    Args:
        short: short side of an image of scale 1, in pixels; the long one is at most four times that.
        window: side of the windows; None for the image as a whole.
        stride: step of the windows as a fraction of their side; the last ones end where the image does.
        scales: whose probabilities are averaged.
        flip: average over the mirror image as well.
        interpolation: as in training.
    """

    short: int = 512
    window: int | None = 512
    stride: float = 2 / 3
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    interpolation: Literal["bicubic", "bilinear"] = "bilinear"

    @torch.no_grad()
    def __call__(self, model: Any, normalize: Normalize, image: Tensor) -> Tensor:
        """[C, H, W] as it is stored -> classes of its pixels, uint8 [H, W], on the CPU.

        Probabilities are kept at the size that the network sees, and brought to the image's a few rows at a time, so
        that memory grows with ``short``, not with the image.
        """
        return enlarge_labels(self.probabilities(model, normalize, image), image.shape[-2:])

    @torch.no_grad()
    def probabilities(self, model: Any, normalize: Normalize, image: Tensor) -> Tensor:
        """[classes, h, w], means over scales and mirror images, of the size that scale 1 has."""
        base = fit_sides(image.shape[-2:], self.short, 4 * self.short)
        total: Tensor | None = None
        for scale in self.scales:
            short = scale * self.short
            sides = fit_sides(image.shape[-2:], short, 4 * short)
            resized = resize_pixels(image, sides, self.interpolation, normalize.pixels.nodata)
            x = normalize(resized[None])
            for mirrored in (False, True) if self.flip else (False,):
                own = self._segment(model, x.flip(-1) if mirrored else x)
                own = own.flip(-1) if mirrored else own
                own = F.interpolate(own, base, mode="bilinear", align_corners=False) if sides != base else own
                total = own if total is None else total + own
        assert total is not None
        return total[0] / (len(self.scales) * (1 + self.flip))

    def _segment(self, model: Any, x: Tensor) -> Tensor:
        """Normalised [1, 3, H, W] -> probabilities [1, classes, H, W]."""
        height, width = x.shape[-2:]
        if self.window is None:
            return model(x)["out"].softmax(dim=1)
        sides = min(self.window, height), min(self.window, width)
        places = [(top, left) for top in self._starts(height, sides[0]) for left in self._starts(width, sides[1])]
        total, count = x.new_zeros(1, model.num_classes, height, width), x.new_zeros(1, 1, height, width)
        for first in range(0, len(places), WINDOWS):
            chosen = places[first : first + WINDOWS]
            logits = model(torch.cat([x[..., top : top + sides[0], left : left + sides[1]] for top, left in chosen]))[
                "out"
            ]
            for (top, left), own in zip(chosen, logits, strict=True):
                total[0, :, top : top + sides[0], left : left + sides[1]] += own
                count[..., top : top + sides[0], left : left + sides[1]] += 1
        return (total / count).softmax(dim=1)

    def _starts(self, whole: int, side: int) -> Iterator[int]:
        step = max(1, int(self.stride * side))
        return (min(start, whole - side) for start in range(0, max(whole - side, 0) + step, step))


def enlarge_labels(probabilities: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """The likeliest class of each pixel of a larger image, uint8 [H, W], on the CPU.

    As interpolating [classes, h, w] to [classes, H, W] and taking the largest, a few rows at a time.
    """
    height, width = size
    rows = probabilities.shape[-2]
    labels = torch.empty(height, width, dtype=torch.uint8)
    # where the image's rows are between those of the probabilities, as of F.interpolate
    places = ((torch.arange(height, device=probabilities.device) + 0.5) * (rows / height) - 0.5).clamp(min=0)
    above = places.long().clamp(max=rows - 1)
    below, fraction = (above + 1).clamp(max=rows - 1), places - above
    for first in range(0, height, ROWS):
        part = slice(first, first + ROWS)
        weight = fraction[part, None].to(probabilities.dtype)
        mixed = probabilities[:, above[part]] * (1 - weight) + probabilities[:, below[part]] * weight
        wide = F.interpolate(mixed[None], (mixed.shape[-2], width), mode="bilinear", align_corners=False)
        labels[part] = wide[0].argmax(dim=0).to(torch.uint8).cpu()
    return labels


def segment_tiles(
    probabilities: Callable[[Tensor], Tensor], read: Callable[[Tile], Tensor], grid: Grid, tiles: Iterable[Tile]
) -> Iterator[tuple[Tile, Tensor]]:
    """Parts of a large image and the classes of their pixels, uint8 [height, width], on the CPU.

    Probabilities of each class are blended where tiles overlap; then the likeliest is taken.

    Args:
        probabilities: of the pixels of a tile, as :meth:`Segmentation.probabilities` gives them.
        read: the pixels of a tile.
        tiles: those of the grid.
    """

    def segment(tile: Tile) -> Tensor:
        own = probabilities(read(tile))
        if own.shape[-2:] == (tile.height, tile.width):
            return own
        return F.interpolate(own[None], (tile.height, tile.width), mode="bilinear", align_corners=False)[0]

    for part, blended in blend(grid, map(segment, tiles)):
        yield part, blended.max(dim=0).indices.to(torch.uint8).cpu()  # argmax takes several times as long


def make_segmentation(config: SegmentationConfig) -> Segmentation:
    """How the settings segment an image."""
    own = config.evaluation
    window = None if own.mode == "whole" else config.data.img_size
    return Segmentation(config.data.short, window, own.stride, own.scales, own.flip, config.data.interpolation)
