"""Top-1 accuracy on frozen features of a pre-training run, for the benchmarks that compare runs."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from itpn.checkpoints.files import read_checkpoint
from itpn.metrics.features import knn_accuracy, linear_accuracy
from itpn.models.modes import eval_mode
from itpn.seeding import derive_seed
from itpn.tasks.configs import PretrainingConfig
from itpn.tasks.pretraining.module import PretrainingModule
from itpn.tasks.pretraining.network import build_from
from itpn.tasks.pretraining.weights import load_weights


@dataclass
class Accuracy:
    """Top-1 accuracy on frozen features, of the backbone and of the pyramid."""

    knn: float
    linear: float
    pyramid_knn: float
    pyramid_linear: float


def probe(config: PretrainingConfig, weights: Path | None, sets: list[tuple[Tensor, Tensor]]) -> Accuracy:
    """Accuracy of k-NN and of a linear classifier, on the backbone's features and on the pyramid's.

    Args:
        weights: of a run with these settings; None for those that it began with.
        sets: to learn from and to evaluate on: uint8 images [n, 3, H, W] and int64 labels [n].
    """
    torch.manual_seed(derive_seed(config.seed, "weights"))
    model = build_from(config)
    if weights is not None:
        load_weights(model, read_checkpoint(weights))
    module = PretrainingModule(model, config, "probe")
    (known, labels), (unknown, answers) = [(mean_features(module, x.split(128)), labels) for x, labels in sets]
    metrics = [
        f(x, labels, y, answers) for x, y in zip(known, unknown, strict=True) for f in (knn_accuracy, linear_accuracy)
    ]
    return Accuracy(*metrics)


@torch.no_grad()
def mean_features(module: PretrainingModule, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Means over an image of uint8 batches [B, 3, H, W], in eval mode, on the CPU.

    Returns:
        Of the last backbone stage, float32 [n, C], and of the pyramid's levels side by side, [n, 3 * width].
    """
    backbone, pyramid = [], []
    with eval_mode(module):
        for images in batches:
            stages = module.model.backbone.forward_stages(module.normalize(images.to(module.device)))
            levels = [level.mean(dim=(1, 2, 3)) for level in module.model.pyramid(stages)]
            backbone.append(stages[-1].mean(dim=(1, 2, 3)).float().cpu())
            pyramid.append(torch.cat(levels, dim=1).float().cpu())
    return torch.cat(backbone), torch.cat(pyramid)
