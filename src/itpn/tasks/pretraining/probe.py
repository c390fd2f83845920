"""How good the backbone's features are: k-NN and a linear classifier on labelled images."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from itpn.checkpoints.files import read_checkpoint
from itpn.data.augment import EvaluationTransform
from itpn.data.evaluation import make_evaluation_loader, view_labelled
from itpn.data.labelled import LabelledImages
from itpn.data.normalize import Normalize
from itpn.metrics.features import knn_accuracy, linear_accuracy
from itpn.models.modes import eval_mode
from itpn.seeding import derive_seed
from itpn.tasks.evaluation import Evaluator, nothing_readable
from itpn.tasks.features import compute_features, join_features
from itpn.tasks.pretraining.config import PretrainingConfig
from itpn.tasks.pretraining.module import PretrainingTask
from itpn.tasks.pretraining.network import build_from
from itpn.tasks.pretraining.start import load_weights
from itpn.training.config import image_size


class ProbeEvaluator(Evaluator[dict[str, float]]):
    """Top-1 accuracy of k-NN and of a linear classifier on the mean features of frozen images.

    Args:
        known: images to learn from.
        images: to be tested on.
    """

    names = ("knn", "linear")

    def __init__(self, config: PretrainingConfig, known: LabelledImages, images: LabelledImages) -> None:
        self.config = config
        self.sets = known, images
        self.normalize = Normalize(config.model.in_chans, config.data.mean, config.data.std)

    def __len__(self) -> int:
        return len(self.sets[1])

    def batches(self, rank: int, world_size: int) -> Iterable[dict[str, Any]]:
        data = self.config.data
        view = functools.partial(view_labelled, EvaluationTransform(image_size(data), 1.0, data.interpolation))
        for number, images in enumerate(self.sets):
            for batch in make_evaluation_loader(
                images, view, data.batch_size, data.num_workers, rank, world_size, data.max_pixels
            ):
                yield {**batch, "set": number}

    def to(self, device: torch.device) -> None:
        self.normalize.to(device)

    def compare(self, network: nn.Module, batch: dict[str, Any]) -> Any:
        return batch["set"], compute_features(network, self.normalize, batch)

    def score(self, parts: Sequence[Any]) -> dict[str, float]:
        columns: list[Tensor] = []
        for number in range(2):
            own = [features for which, features in parts if which == number]
            if not own:
                raise nothing_readable([])
            _, labels, features = join_features(own)
            columns += [features, labels]
        with torch.random.fork_rng(devices=[]):  # a new layer draws weights, of which training must not notice
            train, train_labels, test, labels = columns
            return {
                "knn": knn_accuracy(train, train_labels, test, labels),
                "linear": linear_accuracy(train, train_labels, test, labels),
            }

    def metrics(self, scores: dict[str, float]) -> dict[str, float]:
        return scores

    def summarize(self, metrics: Mapping[str, float | None]) -> dict[str, str]:
        return {"probe": f"{metrics['knn']:.1%} by k-NN, {metrics['linear']:.1%} by a linear classifier"}


@dataclass
class Accuracy:
    """Shares of test images named rightly from frozen features."""

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
    task = PretrainingTask(model, config, "probe")
    (known, labels), (unknown, answers) = [(mean_features(task, x.split(128)), labels) for x, labels in sets]
    metrics = [
        f(x, labels, y, answers) for x, y in zip(known, unknown, strict=True) for f in (knn_accuracy, linear_accuracy)
    ]
    return Accuracy(*metrics)


@torch.no_grad()
def mean_features(task: PretrainingTask, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
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
