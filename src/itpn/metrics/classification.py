"""Metrics of a classifier, from what it predicts for each image of a set."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_accuracy,
    multiclass_confusion_matrix,
)

from itpn.system.console import print_note
from itpn.system.writing import open_whole, open_whole_text, write_whole

LONGEST_NAME = 40  # of a class beside a row or column of a plot
TOP = 5


@dataclass
class ClassPredictions:
    """What a network predicts for images, one row each, on the CPU.

    Attributes:
        index: of the image in its set, int64 [n].
        label: its class, int64 [n].
        top: the likeliest classes, likeliest first, int64 [n, up to 5]; -1 where there are no more.
        probability: of the likeliest class, float32 [n].
        loss: minus the logarithm of the probability of its class, float32 [n].
    """

    index: Tensor
    label: Tensor
    top: Tensor
    probability: Tensor
    loss: Tensor


@dataclass
class Scores:
    """Metrics of a classifier on a set.

    Attributes:
        top1, top5: fractions of images whose class is the likeliest, or among the five likeliest.
        loss: mean cross-entropy.
        calibration_error: expected difference of confidence and accuracy, in 15 bins (Guo et al. 2017).
        per_class: top-1 of each class's images, NaN where there are none, float64 [classes].
        confusion: images by class (rows) and predicted class (columns), int64 [classes, classes].
        images: how many there were.
    """

    top1: float
    top5: float
    loss: float
    calibration_error: float
    per_class: Tensor
    confusion: Tensor
    images: int


def judge(index: Tensor, label: Tensor, log_probabilities: Tensor) -> ClassPredictions:
    """Args: int64 [n], int64 [n], float [n, classes]; classes of probability 0 are never predicted."""
    top = log_probabilities.topk(min(TOP, log_probabilities.shape[1]), dim=1)
    own = log_probabilities.gather(1, label.unsqueeze(1)).squeeze(1)
    classes = top.indices.masked_fill(top.values.isneginf(), -1)
    return ClassPredictions(index, label, classes, top.values[:, 0].exp(), -own)


def join(parts: Sequence[ClassPredictions]) -> ClassPredictions:
    """Together, in the order of the set, so that every sum is the same however they were divided among processes."""
    joined = {name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])}
    order = joined["index"].argsort()
    return ClassPredictions(**{name: column[order] for name, column in joined.items()})


def score(predictions: ClassPredictions, classes: int) -> Scores:
    """Metrics of predictions for a whole set."""
    best, label = predictions.top[:, 0], predictions.label
    right = best == label
    per_class = multiclass_accuracy(best, label, classes, average="none").double()
    present = torch.bincount(label, minlength=classes) > 0
    return Scores(
        top1=float(right.double().mean()),
        top5=float((predictions.top == label.unsqueeze(1)).any(dim=1).double().mean()),
        loss=float(predictions.loss.double().mean()),
        calibration_error=float(binary_calibration_error(predictions.probability.double(), right.long(), n_bins=15)),
        per_class=per_class.masked_fill(~present, float("nan")),
        confusion=multiclass_confusion_matrix(best, label, classes),
        images=len(label),
    )


def warn_of_other_order(scores: Scores) -> None:
    """Warn where the images of each class are predicted to be of one other class, as by a good network with other class
    indices."""
    agreement = float(scores.confusion.max(dim=1).values.sum()) / max(scores.images, 1)
    predicted = scores.confusion.argmax(dim=1)[scores.confusion.sum(dim=1) > 0]
    several = scores.images >= 4 * len(predicted)  # a single image of a class always agrees with itself
    if several and agreement > 0.5 and scores.top1 < agreement / 2 and len(predicted.unique()) > len(predicted) / 2:
        print_note(
            f"warning: {agreement:.0%} of the images would be right under other names: the classes seem to be in "
            "another order than in training"
        )


def write_scores(scores: Scores, classes: tuple[str, ...], folder: Path, about: Mapping[str, Any]) -> None:
    """Write ``evaluation.json``, ``classes.csv``, ``confusion.csv`` and ``confusion.png``."""
    metrics = {name: getattr(scores, name) for name in ("images", "top1", "top5", "loss", "calibration_error")}
    if len(classes) <= TOP:  # the class is always among them
        del metrics["top5"]
    if not math.isfinite(scores.loss):  # of k-NN, where no neighbour has the class
        metrics["loss"] = None
    write_whole(folder / "evaluation.json", (json.dumps({**about, **metrics}, indent=2) + "\n").encode())
    counts = scores.confusion.sum(dim=1).tolist()
    with open_whole_text(folder / "classes.csv") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "images", "top1"])
        for name, count, accuracy in zip(classes, counts, scores.per_class.tolist(), strict=True):
            writer.writerow([name, count, "" if count == 0 else accuracy])
    write_confusion(scores.confusion, classes, folder)


def write_confusion(confusion: Tensor, classes: tuple[str, ...], folder: Path, what: str = "images") -> None:
    """Write ``confusion.csv`` and ``confusion.png``."""
    with open_whole_text(folder / "confusion.csv") as file:
        writer = csv.writer(file)
        writer.writerow(["class \\ predicted", *classes])
        writer.writerows([name, *row] for name, row in zip(classes, confusion.tolist(), strict=True))
    draw_confusion(confusion, classes, folder / "confusion.png", what)


def draw_confusion(confusion: Tensor, classes: tuple[str, ...], path: Path, what: str = "images") -> None:
    """Fractions of each class's images, or pixels, by predicted class; with numbers and names where they fit."""
    count = len(classes)
    fractions = confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    side = min(max(2.5, 0.42 * count), 16.0)  # inches of the matrix; names and labels add to it
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(side, side), dpi=120)
        axes = figure.add_axes((0, 0, 1, 1))
        image = axes.imshow(fractions.numpy(), cmap="Blues", vmin=0, vmax=1)
        bar = axes.inset_axes((1 + 0.2 / side, 0, 0.15 / side, 1))  # 0.2 inches away, 0.15 wide
        figure.colorbar(image, cax=bar, label=f"fraction of the class's {what}")
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        if count <= 40:
            names = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in classes]
            axes.set_xticks(range(count), names, rotation=90, parse_math=False)
            axes.set_yticks(range(count), names, parse_math=False)
        if count <= 20:
            for row in range(count):
                for column in range(count):
                    if confusion[row, column]:
                        shade = "white" if fractions[row, column] > 0.5 else "black"
                        fraction = float(fractions[row, column])
                        text = f"{int(confusion[row, column])}" if what == "images" else f"{100 * fraction:.0f}"
                        axes.text(column, row, text, ha="center", va="center", color=shade, fontsize=7)
        with open_whole(path) as file:
            figure.savefig(file, format="png", bbox_inches="tight")  # as large as the longest names need


def rank_classes(values: dict[str, float]) -> dict[str, str]:
    """Rows with the classes with the lowest and the highest values; of few classes, with all of them.

    None of the hardest is among the easiest, nor as good as the best class, as shown: where all are alike there are no
    such rows.
    """
    ranked = sorted(values, key=lambda name: values[name])
    percent = {name: f"{values[name]:.0%}" for name in ranked}

    def show(names: Sequence[str]) -> str:
        return ", ".join(f"{name} {percent[name]}" for name in names)

    if len(ranked) <= 6:
        return {"classes": show(ranked[::-1])}
    lowest, highest = percent[ranked[0]], percent[ranked[-1]]
    if lowest == highest:
        return {}
    return {
        "hardest": show([name for name in ranked[:3] if percent[name] != highest]),
        "easiest": show([name for name in ranked[:-4:-1] if percent[name] != lowest]),
    }
