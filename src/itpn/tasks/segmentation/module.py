"""Segmentation as it is trained, and how an image of any size is segmented."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from itpn.checkpoints.architecture import describe_segmenter
from itpn.config import SegmentationConfig, to_dict
from itpn.data.masks import IGNORED
from itpn.data.normalize import Normalize
from itpn.models.detector import fit_sides
from itpn.models.segmenter import Segmenter
from itpn.models.synced import batch_shares
from itpn.tasks.finetuning import FineTuningTask
from itpn.training.module import MakeLoader

WINDOWS = 4  # that are segmented at a time
ROWS = 64  # of the image that are classified at a time


class SegmentationTask(FineTuningTask):
    """Trains a segmenter on uint8 images [B, 3, H, W] and the classes of their pixels, uint8 [B, H, W].

    Args:
        recipe, classes, make_loader: as of :class:`FineTuningTask`.
        colours: of the classes, where their file says them.
    """

    def __init__(
        self,
        model: Segmenter,
        config: SegmentationConfig,
        recipe: str,
        classes: tuple[str, ...],
        make_loader: MakeLoader | None = None,
        colours: tuple[tuple[int, int, int], ...] | None = None,
    ) -> None:
        mean, std = config.data.mean, config.data.std
        assert mean is not None
        assert std is not None
        super().__init__(model, config, recipe, classes, Normalize(3, mean, std), make_loader)
        self.model: Segmenter
        self.colours = colours

    def training_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        target = batch["target"].long()
        logits = self.model(self.normalize(batch["image"]))
        losses = {f"loss_{name}": pixel_loss(own, target) for name, own in logits.items()}
        loss = losses["loss_out"] + self.config.model.auxiliary_weight * losses.get("loss_aux", 0.0)
        metrics = {"loss": loss, **losses} if len(losses) > 1 else {"loss": loss}
        return {"loss": loss, "metrics": {name: value.detach() for name, value in metrics.items()}}

    def describe(self) -> dict[str, Any]:
        data = self.config.data
        size = {"size": [data.img_size, data.img_size], "short_side": data.short}
        return {
            "task": self.config.task,
            "settings": to_dict(self.config),
            "architecture": describe_segmenter(self.model).to_dict(),
            "preprocessing": {"mean": data.mean, "std": data.std, "interpolation": data.interpolation, **size},
            "classes": list(self.classes),
            "colours": None if self.colours is None else [list(colour) for colour in self.colours],
        }


def pixel_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of logits [B, classes, H, W], a mean over the labelled pixels of all processes' batch.

    Args:
        target: int64 [B, H, W], `IGNORED` where there is no class.
    """
    count = int((target != IGNORED).sum())
    (share,) = batch_shares([count], logits.device)
    return F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum") / max(count, 1) * share


@dataclass(frozen=True)
class Segmentation:
    """How an image is segmented: at the size of training, by windows, at several scales, mirrored.

    Args:
        short: short side of an image of scale 1, in pixels; the long one is at most four times that.
        window: side of the windows; None for the image as a whole.
        stride: step of the windows as a share of their side; the last ones end where the image does.
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
    def __call__(self, model: Segmenter, normalize: Normalize, image: Tensor) -> Tensor:
        """uint8 [3, H, W] -> classes of its pixels, uint8 [H, W], on the CPU.

        Probabilities are kept at the size that the network sees, and brought to the image's a few rows at a time, so
        that memory grows with ``short``, not with the image.
        """
        return enlarge_labels(self.probabilities(model, normalize, image), image.shape[-2:])

    def probabilities(self, model: Segmenter, normalize: Normalize, image: Tensor) -> Tensor:
        """[classes, h, w], means over scales and mirror images, of the size that scale 1 has."""
        base = fit_sides(image.shape[-2:], self.short, 4 * self.short)
        total: Tensor | None = None
        for scale in self.scales:
            short = scale * self.short
            sides = fit_sides(image.shape[-2:], short, 4 * short)
            resized = resize(image, sides, InterpolationMode(self.interpolation), antialias=True)
            x = normalize(resized[None])
            for mirrored in (False, True) if self.flip else (False,):
                own = self._segment(model, x.flip(-1) if mirrored else x)
                own = own.flip(-1) if mirrored else own
                own = F.interpolate(own, base, mode="bilinear", align_corners=False) if sides != base else own
                total = own if total is None else total + own
        assert total is not None
        return total[0] / (len(self.scales) * (1 + self.flip))

    def _segment(self, model: Segmenter, x: Tensor) -> Tensor:
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

    As interpolating [classes, h, w] to [classes, H, W] and asking for the largest, a few rows at a time.
    """
    height, width = size
    rows = probabilities.shape[-2]
    labels = torch.empty(height, width, dtype=torch.uint8)
    # where the image's rows are between those of the probabilities, as of F.interpolate
    places = ((torch.arange(height, device=probabilities.device) + 0.5) * (rows / height) - 0.5).clamp(min=0)
    above = places.long().clamp(max=rows - 1)
    below, share = (above + 1).clamp(max=rows - 1), places - above
    for first in range(0, height, ROWS):
        part = slice(first, first + ROWS)
        weight = share[part, None].to(probabilities.dtype)
        mixed = probabilities[:, above[part]] * (1 - weight) + probabilities[:, below[part]] * weight
        wide = F.interpolate(mixed[None], (mixed.shape[-2], width), mode="bilinear", align_corners=False)
        labels[part] = wide[0].argmax(dim=0).to(torch.uint8).cpu()
    return labels
