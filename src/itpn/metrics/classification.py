"""How good a classifier is: each image of a set once, over any number of processes, and the figures that follow."""

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_accuracy,
    multiclass_confusion_matrix,
)

from itpn.data.normalize import Normalize
from itpn.errors import UserError
from itpn.models.hivit import HiViT
from itpn.system.console import print_aside, tell_remarks
from itpn.system.writing import open_whole, open_whole_text, write_whole

LONGEST_NAME = 32  # of a class beside a row or column of a picture
TOP = 5
Anything = TypeVar("Anything")


class HasClasses(Protocol):
    """Images whose classes have names and numbers."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    def rename(self, classes: Sequence[str]) -> Any: ...


Named = TypeVar("Named", bound=HasClasses)


@dataclass
class Answers:
    """What a network says about images, one row each, on the CPU.

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
    """Figures of a classifier on a set.

    Attributes:
        top1, top5: shares of images whose class is the likeliest, or among the five likeliest.
        loss: mean cross-entropy.
        calibration_error: expected difference of confidence and accuracy, in 15 bins (Guo et al. 2017).
        per_class: top-1 of each class's images, NaN where there are none, float64 [classes].
        confusion: images by class (rows) and answer (columns), int64 [classes, classes].
        images: how many there were.
    """

    top1: float
    top5: float
    loss: float
    calibration_error: float
    per_class: Tensor
    confusion: Tensor
    images: int


@torch.no_grad()
def collect_answers(
    classifiers: Sequence[Callable[[Tensor], Tensor]],
    batches: Iterable[dict[str, Any]],
    device: torch.device,
    skipped: list[tuple[str, str]],
) -> list[Answers]:
    """Ask networks about the images of an evaluation loader, each image read once.

    Args:
        classifiers: uint8 [B, 3, H, W] -> logarithms of probabilities [B, classes], each.
        skipped: takes (name, reason) of images that cannot be read.
    """
    parts: list[list[Answers]] = [[] for _ in classifiers]
    for batch in batches:
        skipped += batch["corrupt"]
        tell_remarks(batch["warnings"])
        if len(batch["index"]):  # or else none of its images can be read
            images = batch["image"].to(device, non_blocking=True)
            for classify, own in zip(classifiers, parts, strict=True):
                own.append(judge(batch["index"], batch["label"], classify(images).cpu()))
    return [join(own) for own in parts]


def judge(index: Tensor, label: Tensor, log_probabilities: Tensor) -> Answers:
    """Args: int64 [n], int64 [n], float [n, classes]; classes of probability 0 are no answers."""
    top = log_probabilities.topk(min(TOP, log_probabilities.shape[1]), dim=1)
    own = log_probabilities.gather(1, label.unsqueeze(1)).squeeze(1)
    return Answers(index, label, top.indices.masked_fill(top.values.isneginf(), -1), top.values[:, 0].exp(), -own)


def join(parts: Sequence[Answers]) -> Answers:
    """One after the other."""
    if not parts:
        return judge(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1))
    return Answers(**{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])})


def gather(answers: Answers, world_size: int) -> Answers:
    """The answers of all processes, in the order of the set, so that every sum is the same however they were shared."""
    joined = join([part for part in share(answers, world_size) if len(part.index)])
    order = joined.index.argsort()
    return Answers(**{name: column[order] for name, column in vars(joined).items()})


def gather_skipped(skipped: list[tuple[str, str]], world_size: int) -> list[tuple[str, str]]:
    return sorted({(name, reason) for part in share(skipped, world_size) for name, reason in part})


def tell_asides(notes: Iterable[str], skipped: Iterable[tuple[str, str]]) -> None:
    """What is remarkable about the weights, and the images that could not be read."""
    for note in notes:
        print_aside(note)
    for name, reason in skipped:
        print_aside(f"skipped {name}: {reason}")


def match_classes(images: Named, names: Sequence[str] | None, count: int, what: str = "images") -> Named:
    """Images with the numbers that a model's classes have.

    Args:
        names: of the model's classes; None where its file does not hold them.
        count: of the model's classes.
        what: has the classes, in a message.

    Raises:
        UserError: classes that the model does not know, or another number of them.
    """
    if names is not None:
        return images.rename(names)
    if len(images.classes) != count:
        raise UserError(
            f"the {what} have {len(images.classes)} classes and the model {count}, whose names its file does not hold: "
            "they cannot be matched"
        )
    return images


def nothing_readable(skipped: Sequence[tuple[str, str]]) -> UserError:
    """None of the images to evaluate on can be read: why the first cannot."""
    first = f": {skipped[0][0]} {skipped[0][1]}" if skipped else ""
    return UserError(f"none of the images to evaluate on can be read{first}")


def share(thing: Anything, world_size: int) -> list[Anything]:
    """What each process has, to each."""
    if world_size == 1:
        return [thing]
    things: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(things, thing)
    return things


@torch.no_grad()
def collect_features(
    backbone: HiViT,
    normalize: Normalize,
    batches: Iterable[dict[str, Any]],
    device: torch.device,
    skipped: list[tuple[str, str]],
    world_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """Means of the last stage over each image of an evaluation loader, of all processes in the order of the set.

    Returns:
        float32 [n, C], and the labels, int64 [n], on the CPU.
    """
    columns: list[tuple[Tensor, ...]] = []
    for batch in batches:
        skipped += batch["corrupt"]
        tell_remarks(batch["warnings"])
        if len(batch["index"]):  # or else none of its images can be read
            images = normalize(batch["image"].to(device, non_blocking=True))
            features = backbone.forward_stages(images)[-1].mean(dim=(1, 2, 3)).float().cpu()
            columns.append((batch["index"], batch["label"], features))
    columns = [row for rows in share(columns, world_size) for row in rows]
    if not columns:
        raise nothing_readable(gather_skipped(skipped, world_size))
    index, label, features = (torch.cat(column) for column in zip(*columns, strict=True))
    order = index.argsort()
    return features[order], label[order]


def score(answers: Answers, classes: int) -> Scores:
    """Figures of answers about a whole set."""
    best, label = answers.top[:, 0], answers.label
    right = best == label
    per_class = multiclass_accuracy(best, label, classes, average="none").double()
    present = torch.bincount(label, minlength=classes) > 0
    return Scores(
        top1=float(right.double().mean()),
        top5=float((answers.top == label.unsqueeze(1)).any(dim=1).double().mean()),
        loss=float(answers.loss.double().mean()),
        calibration_error=float(binary_calibration_error(answers.probability.double(), right.long(), n_bins=15)),
        per_class=per_class.masked_fill(~present, float("nan")),
        confusion=multiclass_confusion_matrix(best, label, classes),
        images=len(label),
    )


def warn_of_other_order(scores: Scores) -> None:
    """A good network that is asked for the wrong names answers each class with one other class."""
    agreement = float(scores.confusion.max(dim=1).values.sum()) / max(scores.images, 1)
    answers = scores.confusion.argmax(dim=1)[scores.confusion.sum(dim=1) > 0]
    several = scores.images >= 4 * len(answers)  # of a single image, its answer is always the same
    if several and agreement > 0.5 and scores.top1 < agreement / 2 and len(answers.unique()) > len(answers) / 2:
        print_aside(
            f"warning: {agreement:.0%} of the images would be right under other names: the classes seem to be in "
            "another order than in training"
        )


def write_scores(scores: Scores, classes: tuple[str, ...], folder: Path, about: dict[str, Any]) -> None:
    """Write ``evaluation.json``, ``classes.csv``, ``confusion.csv`` and ``confusion.png``."""
    figures = {name: getattr(scores, name) for name in ("images", "top1", "top5", "loss", "calibration_error")}
    if not math.isfinite(scores.loss):  # of neighbours, none of whom has the class
        figures["loss"] = None
    write_whole(folder / "evaluation.json", (json.dumps({**about, **figures}, indent=2) + "\n").encode())
    counts = scores.confusion.sum(dim=1).tolist()
    with open_whole_text(folder / "classes.csv") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "images", "top1"])
        for name, count, accuracy in zip(classes, counts, scores.per_class.tolist(), strict=True):
            writer.writerow([name, count, "" if count == 0 else accuracy])
    write_confusion(scores.confusion, classes, folder)


def write_confusion(confusion: Tensor, classes: tuple[str, ...], folder: Path, unit: str = "images") -> None:
    """Write ``confusion.csv`` and ``confusion.png``."""
    with open_whole_text(folder / "confusion.csv") as file:
        writer = csv.writer(file)
        writer.writerow(["class \\ answer", *classes])
        writer.writerows([name, *row] for name, row in zip(classes, confusion.tolist(), strict=True))
    draw_confusion(confusion, classes, folder / "confusion.png", unit)


def draw_confusion(confusion: Tensor, classes: tuple[str, ...], path: Path, unit: str = "images") -> None:
    """Shares of each class's images, or pixels, by answer; numbers and names where there is room for them."""
    count = len(classes)
    shares = confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    side = min(max(4.0, 0.42 * count + 2.2), 16.0)
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(side + 0.8, side), dpi=120, layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(image, ax=axes, label=f"share of the class's {unit}", fraction=0.046)
        axes.set_xlabel("answer")
        axes.set_ylabel("class")
        if count <= 40:
            names = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in classes]
            axes.set_xticks(range(count), names, rotation=90, parse_math=False)
            axes.set_yticks(range(count), names, parse_math=False)
        if count <= 20:
            for row in range(count):
                for column in range(count):
                    if confusion[row, column]:
                        shade = "white" if shares[row, column] > 0.5 else "black"
                        share = float(shares[row, column])
                        text = f"{int(confusion[row, column])}" if unit == "images" else f"{100 * share:.0f}"
                        axes.text(column, row, text, ha="center", va="center", color=shade, fontsize=7)
        with open_whole(path) as file:
            figure.savefig(file, format="png")


def rank_classes(figures: dict[str, float]) -> dict[str, str]:
    """Rows with the classes of the lowest and of the highest figures; of few classes, with all of them."""
    ranked = sorted(figures, key=lambda name: figures[name])
    shown = {name: f"{name} {figures[name]:.0%}" for name in ranked}
    if len(ranked) <= 6:
        return {"classes": ", ".join(shown[name] for name in ranked[::-1])}
    return {
        "hardest": ", ".join(shown[name] for name in ranked[:3]),
        "easiest": ", ".join(shown[name] for name in ranked[:-4:-1]),
    }
