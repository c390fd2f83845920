"""How good the features of a pre-training run are, on images and labels that are at hand."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from itpn.checkpoints.files import read_checkpoint
from itpn.checkpoints.loading import build_from, load_weights
from itpn.config import Config
from itpn.metrics.features import knn_accuracy, linear_accuracy
from itpn.models.modes import eval_mode
from itpn.seeding import derive_seed
from itpn.tasks.pretraining.module import PretrainingTask


@dataclass
class Accuracy:
    """Shares of test images named rightly from frozen features."""

    knn: float
    linear: float
    pyramid_knn: float
    pyramid_linear: float


def probe(config: Config, weights: Path | None, sets: list[tuple[Tensor, Tensor]]) -> Accuracy:
    """Ask nearest neighbours and a linear classifier, of the backbone's features and of the pyramid's.

    Args:
        weights: of a run with these settings; None for those that it began with.
        sets: to learn from and to be asked about: uint8 images [n, 3, H, W] and int64 labels [n].
    """
    torch.manual_seed(derive_seed(config.seed, "weights"))
    model = build_from(config)
    if weights is not None:
        load_weights(model, read_checkpoint(weights))
    task = PretrainingTask(model, config, "probe")
    (known, labels), (asked, answers) = [(compute_features(task, x.split(128)), labels) for x, labels in sets]
    figures = [
        f(x, labels, y, answers) for x, y in zip(known, asked, strict=True) for f in (knn_accuracy, linear_accuracy)
    ]
    return Accuracy(*figures)


@torch.no_grad()
def compute_features(task: PretrainingTask, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Means over an image of uint8 batches [B, 3, H, W], in eval mode, on the CPU.

    Returns:
        Of the last backbone stage, float32 [n, C], and of the pyramid's levels side by side, [n, 3 * width].
    """
    backbone, pyramid = [], []
    with eval_mode(task):
        for images in batches:
            stages = task.model.backbone.forward_stages(task.normalize(images.to(task.device)))
            levels = [level.mean(dim=(1, 2, 3)) for level in task.model.pyramid(stages)]
            backbone.append(stages[-1].mean(dim=(1, 2, 3)).float().cpu())
            pyramid.append(torch.cat(levels, dim=1).float().cpu())
    return torch.cat(backbone), torch.cat(pyramid)
