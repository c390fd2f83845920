"""How good the backbone's features are: k-NN and a linear classifier on labelled images."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from itpn.data.augment import EvaluationTransform
from itpn.data.evaluation import view_labelled
from itpn.data.labelled import LabelledImages
from itpn.metrics.features import knn_accuracy, linear_accuracy
from itpn.tasks.features import FeatureEvaluator, join_sets
from itpn.tasks.pixels import make_normalize, pixels_of
from itpn.tasks.pretraining.config import PretrainingConfig
from itpn.tasks.pretraining.data import PretrainingData
from itpn.training.config import image_size


class ProbeEvaluator(FeatureEvaluator[dict[str, float]]):
    """Top-1 accuracy of k-NN and of a linear classifier on the mean features of frozen images.

    Args:
        known: images to learn from.
        images: to be tested on.
    """

    names = ("knn", "linear")

    def __init__(self, config: PretrainingConfig, known: LabelledImages, images: LabelledImages) -> None:
        data = config.data
        view = functools.partial(
            view_labelled, EvaluationTransform(image_size(data), 1.0, data.interpolation, pixels_of(config))
        )
        super().__init__(config, images, make_normalize(config), view)
        self.known = known

    @property
    def batch_size(self) -> int:
        return int(self.config.data.batch_size)

    def score(self, parts: Sequence[Any]) -> dict[str, float]:
        (_, train_labels, train), (_, labels, test) = join_sets(parts)
        with torch.random.fork_rng(devices=[]):  # a new layer draws weights, of which training must not notice
            return {
                "knn": knn_accuracy(train, train_labels, test, labels),
                "linear": linear_accuracy(train, train_labels, test, labels),
            }

    def metrics(self, scores: dict[str, float]) -> dict[str, float]:
        return scores

    def summarize(self, metrics: Mapping[str, float | None]) -> dict[str, str]:
        return {"probe": f"{metrics['knn']:.1%} by k-NN, {metrics['linear']:.1%} by a linear classifier"}


def build_evaluator(config: PretrainingConfig, data: PretrainingData) -> ProbeEvaluator:
    assert data.val is not None
    return ProbeEvaluator(config, *data.val)
