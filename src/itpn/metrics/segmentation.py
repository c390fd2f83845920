"""Metrics of segmentation, from one confusion matrix over all pixels of a set."""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from itpn.data.masks import IGNORED
from itpn.metrics.classification import write_confusion
from itpn.system.writing import open_whole_text, write_whole

PIXELS = 2**20  # that are compared at a time


@dataclass
class PixelScores:
    """Metrics of a segmenter on a set, from 0 to 1.

    Attributes:
        confusion: pixels by class (rows) and predicted class (columns), int64 [classes, classes].
        images: how many there were.
    """

    confusion: Tensor
    images: int

    @property
    def iou(self) -> Tensor:
        """Intersection over union of each class, NaN where it is neither there nor predicted, float64 [classes]."""
        right = self.confusion.diag().double()
        return right / (self.confusion.sum(dim=0) + self.confusion.sum(dim=1) - right)

    @property
    def recall(self) -> Tensor:
        """Fraction of each class's pixels that are right, NaN where there are none, float64 [classes]."""
        return self.confusion.diag().double() / self.confusion.sum(dim=1)

    @property
    def metrics(self) -> dict[str, float]:
        """Means over the classes that there are, and the fraction of all pixels that are right."""
        return {
            "miou": float(self.iou.nanmean()),
            "mean_accuracy": float(self.recall.nanmean()),
            "pixel_accuracy": float(self.confusion.diag().sum() / self.confusion.sum()),
        }


def compare(labels: Tensor, target: Tensor, classes: int) -> Tensor:
    """Pixels by class and predicted class, int64 [classes, classes], those of no class left out."""
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    # a part at a time, for they are compared as numbers of eight bytes
    for some, true in zip(labels.flatten().split(PIXELS), target.flatten().split(PIXELS), strict=True):
        confusion += multiclass_confusion_matrix(
            some.long(), true.long(), classes, ignore_index=IGNORED, validate_args=False
        )
    return confusion


def write_pixel_scores(scores: PixelScores, classes: tuple[str, ...], folder: Path, about: Mapping[str, Any]) -> None:
    """Write ``evaluation.json``, ``classes.csv``, ``confusion.csv`` and ``confusion.png``."""
    content = json.dumps({**about, "images": scores.images, **scores.metrics}, indent=2) + "\n"
    write_whole(folder / "evaluation.json", content.encode())
    with open_whole_text(folder / "classes.csv") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "iou", "accuracy", "pixels"])
        pixels = scores.confusion.sum(dim=1).tolist()
        for row in zip(classes, scores.iou.tolist(), scores.recall.tolist(), pixels, strict=True):
            writer.writerow(["" if value != value else value for value in row])  # NaN is unlike itself
    write_confusion(scores.confusion, classes, folder, what="pixels")
