"""Evaluation of classifiers, and of frozen features by k-NN."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from itpn.checkpoints.files import Checkpoint
from itpn.data.augment import EvaluationTransform
from itpn.data.evaluation import view_labelled
from itpn.data.labelled import LabelledImages, find_labelled, read_split
from itpn.errors import UserError
from itpn.metrics.classification import (
    TOP,
    ClassPredictions,
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
from itpn.system.console import print_note
from itpn.tasks.classification.config import ClassificationConfig
from itpn.tasks.classification.data import find_data
from itpn.tasks.classification.network import resolve
from itpn.tasks.data import NO_IMAGES, RunData
from itpn.tasks.evaluation import EvaluationRequest, Evaluator, match_classes, real_paths, trained_bands
from itpn.tasks.features import FeatureEvaluator, join_sets
from itpn.tasks.finetuning.network import given_heads
from itpn.tasks.pixels import make_normalize, pixels_of
from itpn.training.config import image_size


class ClassificationEvaluator(Evaluator[Scores]):
    """Top-1 and top-5 accuracy, cross-entropy, calibration and confusion."""

    names: tuple[str, ...] = ("top1", "top5", "loss")
    best = "top1"
    files = ("evaluation.json", "classes.csv", "confusion.csv", "confusion.png")

    def __init__(self, config: ClassificationConfig, images: LabelledImages) -> None:
        view = functools.partial(view_labelled, make_evaluation_transform(config))
        super().__init__(config, images, make_normalize(config), view)
        self.about: Mapping[str, Any] = {"by": "classifier"}
        self.notes = images.notes
        self.matched_by_name = True
        if len(self.classes) <= TOP:  # the class is always among the five likeliest
            self.names = ("top1", "loss")

    def compare(self, network: nn.Module, batch: dict[str, Any]) -> ClassPredictions:
        images = self.normalize(batch["image"].to(self.device, non_blocking=True))
        return judge(batch["index"], batch["label"], network(images).float().log_softmax(dim=-1).cpu())

    def score(self, parts: Sequence[ClassPredictions]) -> Scores:
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
            **({"top-5": f"{scores.top5:.2%}"} if "top5" in self.names else {}),
            **({"cross-entropy": f"{scores.loss:.4f}"} if math.isfinite(scores.loss) else {}),
            "calibration": f"{scores.calibration_error:.2%} expected error of the confidence",
        }
        present = [i for i in range(len(classes)) if not scores.per_class[i].isnan()]
        rows |= rank_classes({classes[i]: float(scores.per_class[i]) for i in present})
        if mix := most_confused(scores, classes):
            rows["most confused"] = mix
        return rows

    def summarize(self, metrics: Mapping[str, float | None]) -> dict[str, str]:
        shown = []
        for title, prefix in {"": "", "EMA ": "ema_"}.items():
            known = {f"top-{k}": metrics.get(f"{prefix}top{k}") for k in (1, TOP)}
            own = [f"{value:.1%} {name}" for name, value in known.items() if value is not None]
            shown += [title + ", ".join(own)] if own else []
        return {"accuracy": f"{'; '.join(shown)} of {len(self):,} images"}


class KnnEvaluator(FeatureEvaluator[Scores], ClassificationEvaluator):
    """k nearest neighbours among the features of training images (Wu et al. 2018), without a classifier.

    Args:
        known: the training images.
    """

    def __init__(self, config: ClassificationConfig, images: LabelledImages, known: LabelledImages) -> None:
        super().__init__(config, images)
        self.about = {"by": f"{config.evaluation.knn_k} nearest neighbours"}
        self.known = known

    def score(self, parts: Sequence[Any]) -> Scores:
        (_, train_labels, train), (index, labels, test) = join_sets(parts)
        known = train.to(self.device), train_labels.to(self.device)
        votes = knn_votes(*known, test.to(self.device), len(self.classes), self.config.evaluation.knn_k)
        return score(judge(index, labels, votes.log().cpu()), len(self.classes))


def build_evaluator(config: ClassificationConfig, data: RunData) -> ClassificationEvaluator:
    return ClassificationEvaluator(config, data.val)


def make_evaluation_transform(config: ClassificationConfig) -> EvaluationTransform:
    data = config.data
    assert data.crop_pct is not None
    size = data.test_size or image_size(data)
    size = size if isinstance(size, tuple) else (size, size)
    return EvaluationTransform(size, data.crop_pct, data.interpolation, pixels_of(config))


def most_confused(scores: Scores, classes: tuple[str, ...]) -> str:
    """The pair of classes that is confused most often."""
    wrong = scores.confusion.clone().fill_diagonal_(0)
    row, column = divmod(int(wrong.argmax()), len(classes))
    count = int(wrong[row, column])
    return f"{classes[row]} taken for {classes[column]}, {count} times" if count else ""


# --- itpn evaluate


def resolve_evaluation(
    config: ClassificationConfig, request: EvaluationRequest
) -> tuple[ClassificationConfig, dict[str, Any]]:
    """Settings with the checkpoint's network and images, but for the settings of the data that were given.

    Where the checkpoint's own run held out a fraction of the very same folder, the same is held out.

    Returns:
        The settings, and arguments of the network that differ from the checkpoint's.
    """
    checkpoint, given = request.checkpoint, request.given
    contents = checkpoint.contents
    preprocessing = checkpoint.preprocessing
    stored = {name for name in ("mean", "std", "crop_pct", "interpolation") if name in preprocessing} - {*given}
    values: dict[str, Any] = {name: preprocessing[name] if name == "interpolation" else None for name in stored}
    data = replace(config.data, img_size=None, bands=trained_bands(checkpoint), **values)
    in_chans = contents.backbone.get("in_chans", 3)
    model = replace(config.model, name=None, patch_size=None, in_chans=in_chans)
    seed = config.seed
    if trained_on(config, checkpoint) and "val_fraction" not in given:
        data = replace(data, val_fraction=checkpoint.settings["data"]["val_fraction"])
        seed = checkpoint.settings["seed"]
    return resolve(replace(config, model=model, data=data, seed=seed), checkpoint)[0], given_heads(model)


def trained_on(config: ClassificationConfig, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint was trained on the folders that the settings name."""
    return real_paths(*checkpoint.settings.get("data", {}).get("root", ())) == real_paths(*config.data.root)


def find_evaluation_data(config: ClassificationConfig, model: Backbone, request: EvaluationRequest) -> tuple[Any, str]:
    """The evaluator, and which images it evaluates on.

    Raises:
        UserError: no images, or classes that the model does not know.
    """
    data, checkpoint = config.data, request.checkpoint
    which = f"of {', '.join(data.val_root or data.root)}"
    kinds: dict[str, Any] = {"members": data.members, "bands": data.bands}
    own = read_split(data.val_root or data.root, "val", optional=data.val_root is None, **kinds)
    if request.knn:
        images = find_data(config)
        if images.val is None:
            raise UserError(f"{', '.join(data.root)}: {NO_IMAGES}")
        which = which if own is not None else f"{data.val_fraction:.0%} held out {which}"
        return KnnEvaluator(config, images.val, images.train), which
    if own is None:
        own = read_split(data.root, "train", **kinds)
        assert own is not None  # which is not optional
        # a folder of classes alone: a test set, unless the network was trained on it
        if trained_on(config, checkpoint) or "val_fraction" in request.given:
            _, held_out = find_labelled(data.root, None, data.val_fraction, config.seed, **kinds)
            if held_out is not None:
                own, which = held_out, f"{data.val_fraction:.0%} held out {which}"
    names = checkpoint.metadata.get("classes")
    if names is not None and set(names) == set(own.classes) and list(names) != list(own.classes):
        print_note("the classes of the images come in another order than the model's: they are matched by name")
    evaluator = ClassificationEvaluator(config, match_classes(own, names, model.num_classes))
    evaluator.matched_by_name = names is not None
    return evaluator, which
