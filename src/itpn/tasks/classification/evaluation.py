"""Evaluation of classifiers, and of frozen features by nearest neighbours and a linear classifier."""

import functools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from itpn.checkpoints.contents import read_contents
from itpn.checkpoints.files import Checkpoint
from itpn.data.augment import EvaluationTransform
from itpn.data.evaluation import make_evaluation_loader, view_labelled
from itpn.data.labelled import LabelledImages, find_labelled, read_split
from itpn.data.normalize import Normalize
from itpn.errors import UserError
from itpn.metrics.classification import (
    Answers,
    Scores,
    join,
    judge,
    rank_classes,
    score,
    warn_of_other_order,
    write_scores,
)
from itpn.metrics.features import knn_votes
from itpn.models.backbone import Backbone
from itpn.system.console import print_aside
from itpn.tasks.classification.config import ClassificationConfig
from itpn.tasks.classification.data import find_data
from itpn.tasks.classification.network import resolve
from itpn.tasks.evaluation import Evaluator, match_classes, nothing_readable, real_paths
from itpn.tasks.features import compute_features, join_features
from itpn.training.config import image_size


class ClassificationEvaluator(Evaluator[Scores]):
    """Top-1 and top-5 accuracy, cross-entropy, calibration and confusion."""

    names = ("top1", "top5", "loss")
    best = "top1"
    files = ("evaluation.json", "classes.csv", "confusion.csv", "confusion.png")

    def __init__(self, config: ClassificationConfig, images: LabelledImages) -> None:
        self.config = config
        self.about: Mapping[str, Any] = {"by": "classifier"}
        self.notes = images.notes
        self.matched_by_name = True
        self.images = images
        self.classes = images.classes
        self.normalize = make_normalize(config)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, rank: int, world_size: int) -> Iterable[dict[str, Any]]:
        return make_batches(self.images, self.config, rank, world_size)

    def to(self, device: torch.device) -> None:
        self.normalize.to(device)

    def compare(self, network: nn.Module, batch: dict[str, Any]) -> Answers:
        images = self.normalize(batch["image"].to(self.normalize.mean.device, non_blocking=True))
        return judge(batch["index"], batch["label"], network(images).float().log_softmax(dim=-1).cpu())

    def score(self, parts: Sequence[Answers]) -> Scores:
        return score(join(parts), len(self.classes))

    def metrics(self, scores: Scores) -> dict[str, float]:
        return {name: getattr(scores, name) for name in self.names}

    def warn(self, scores: Scores) -> None:
        if not self.matched_by_name:
            warn_of_other_order(scores)

    def write(self, scores: Scores, folder: Path, about: Mapping[str, Any]) -> None:
        write_scores(scores, self.classes, folder, about)

    def rows(self, scores: Scores, about: Mapping[str, Any]) -> dict[str, str]:
        classes = self.classes
        rows = {
            "images": f"{scores.images:,} of {len(classes)} classes, {about['images_skipped']} skipped; "
            f"{about['data']}",
            "top-1": f"{scores.top1:.2%}",
            **({"top-5": f"{scores.top5:.2%}"} if len(classes) > 5 else {}),
            **({"cross-entropy": f"{scores.loss:.4f}"} if math.isfinite(scores.loss) else {}),
            "calibration": f"{scores.calibration_error:.2%} expected error of the confidence",
        }
        present = [i for i in range(len(classes)) if not scores.per_class[i].isnan()]
        rows |= rank_classes({classes[i]: float(scores.per_class[i]) for i in present})
        if mix := most_confused(scores, classes):
            rows["most confused"] = mix
        return rows

    def summarize(self, metrics: Mapping[str, float | None]) -> dict[str, str]:
        shown = f"{metrics['top1']:.1%} top-1, {metrics['top5']:.1%} top-5"
        if metrics.get("ema_top1") is not None:
            shown += f"; EMA {metrics['ema_top1']:.1%} top-1, {metrics['ema_top5']:.1%} top-5"
        return {"accuracy": f"{shown} of {len(self):,} images"}


class KnnEvaluator(ClassificationEvaluator):
    """k nearest neighbours among the features of training images (Wu et al. 2018), without a classifier.

    Args:
        known: the training images.
    """

    def __init__(self, config: ClassificationConfig, images: LabelledImages, known: LabelledImages) -> None:
        super().__init__(config, images)
        self.about = {"by": f"{config.evaluation.knn_k} nearest neighbours"}
        self.known = known

    def batches(self, rank: int, world_size: int) -> Iterable[dict[str, Any]]:
        for known, images in ((True, self.known), (False, self.images)):
            for batch in make_batches(images, self.config, rank, world_size):
                yield {**batch, "known": known}

    def compare(self, network: nn.Module, batch: dict[str, Any]) -> Any:
        return batch["known"], compute_features(network, self.normalize, batch)

    def score(self, parts: Sequence[Any]) -> Scores:
        known, images = ([own for is_known, own in parts if is_known is wanted] for wanted in (True, False))
        if not known or not images:
            raise nothing_readable([])
        device = self.normalize.mean.device
        (_, train_labels, train), (index, labels, test) = (join_features(own) for own in (known, images))
        votes = knn_votes(
            train.to(device),
            train_labels.to(device),
            test.to(device),
            len(self.classes),
            self.config.evaluation.knn_k,
        )
        return score(judge(index, labels, votes.log().cpu()), len(self.classes))


def make_normalize(config: ClassificationConfig) -> Normalize:
    assert config.data.mean is not None
    assert config.data.std is not None
    return Normalize(config.model.in_chans, config.data.mean, config.data.std)


def make_batches(images: LabelledImages, config: ClassificationConfig, rank: int = 0, world_size: int = 1) -> Any:
    """Every image once, as it is evaluated."""
    return make_evaluation_loader(
        images,
        functools.partial(view_labelled, make_evaluation_transform(config)),
        config.evaluation.batch_size,
        config.data.num_workers,
        rank,
        world_size,
        config.data.max_pixels,
    )


def make_evaluation_transform(config: ClassificationConfig) -> EvaluationTransform:
    data = config.data
    assert data.crop_pct is not None
    size = data.test_size or image_size(data)
    return EvaluationTransform(size if isinstance(size, tuple) else (size, size), data.crop_pct, data.interpolation)


def most_confused(scores: Scores, classes: tuple[str, ...]) -> str:
    """The pair of classes that is confused most often."""
    wrong = scores.confusion.clone().fill_diagonal_(0)
    row, column = divmod(int(wrong.argmax()), len(classes))
    count = int(wrong[row, column])
    return f"{classes[row]} taken for {classes[column]}, {count} times" if count else ""


# --- itpn evaluate


def resolve_evaluation(
    config: ClassificationConfig, found: Checkpoint, given: Collection[str], knn: bool
) -> tuple[ClassificationConfig, dict[str, Any]]:
    """Settings with the checkpoint's network and images, but for the settings of the data that were given.

    Where the checkpoint's own run held out a fraction of the very same folder, the same is held out.

    Returns:
        The settings, and arguments of the network that differ from the checkpoint's.

    Raises:
        UserError: the checkpoint has no classifier.
    """
    if not knn and "backbone.head.weight" not in found.tensors:
        raise UserError(
            f"checkpoint {found.source} has no classifier: give --knn to evaluate its features, or fine-tune it first"
        )
    preprocessing = found.preprocessing
    stored = {name for name in ("mean", "std", "crop_pct", "interpolation") if name in preprocessing} - {*given}
    values: dict[str, Any] = {name: preprocessing[name] if name == "interpolation" else None for name in stored}
    data = replace(config.data, img_size=None, **values)
    in_chans = read_contents(found).backbone.get("in_chans", 3)
    model = replace(config.model, name=None, patch_size=None, in_chans=in_chans)
    seed = config.seed
    if trained_on(config, found) and "val_fraction" not in given:
        data, seed = replace(data, val_fraction=found.settings["data"]["val_fraction"]), found.settings["seed"]
    return resolve(replace(config, model=model, data=data, seed=seed), found), {}


def trained_on(config: ClassificationConfig, found: Checkpoint) -> bool:
    """Whether a checkpoint was trained on the folders that the settings name."""
    return real_paths(*found.settings.get("data", {}).get("root", ())) == real_paths(*config.data.root)


def find_evaluation_data(
    config: ClassificationConfig, found: Checkpoint, model: Backbone, given: Collection[str], knn: bool
) -> tuple[Any, str]:
    """The evaluator, and which images it evaluates on.

    Raises:
        UserError: no images, or classes that the model does not know.
    """
    data = config.data
    which = f"of {', '.join(data.val_root or data.root)}"
    if knn:
        found_data = find_data(config)
        if found_data.val is None:
            roots = ", ".join(data.root)
            raise UserError(
                f"there are no images to evaluate on in {roots}: give --data.val-root or --data.val-fraction"
            )
        return KnnEvaluator(config, found_data.val, found_data.train), which
    own = read_split(data.val_root or data.root, "val", optional=data.val_root is None, members=data.members)
    if own is None:
        own = read_split(data.root, "train", members=data.members)
        # a folder of classes alone: a test set, unless the network was trained on it
        if trained_on(config, found) or "val_fraction" in given:
            _, held_out = find_labelled(data.root, None, data.val_fraction, config.seed, data.members)
            if held_out is not None:
                own, which = held_out, f"{data.val_fraction:.0%} held out {which}"
    names = found.metadata.get("classes")
    if names is not None and set(names) == set(own.classes) and list(names) != list(own.classes):
        print_aside("the classes of the images come in another order than the model's: they are matched by name")
    evaluator = ClassificationEvaluator(config, match_classes(own, names, model.num_classes))
    evaluator.matched_by_name = names is not None
    return evaluator, which
