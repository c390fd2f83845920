"""`itpn evaluate`: a checkpoint and labelled images, in figures."""

import functools
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from itpn.checkpoints.files import Checkpoint, read_checkpoint
from itpn.checkpoints.finetuning import settle
from itpn.checkpoints.loading import check_sound, load_found
from itpn.config import ClassificationConfig
from itpn.data.labelled import LabelledImages, find_labelled, read_split
from itpn.data.normalize import Normalize
from itpn.errors import UserError
from itpn.metrics.classification import (
    Scores,
    collect_answers,
    collect_features,
    gather,
    gather_skipped,
    judge,
    match_classes,
    nothing_readable,
    rank_classes,
    score,
    tell_asides,
    warn_of_other_order,
    write_scores,
)
from itpn.metrics.features import ask_neighbours
from itpn.models.hivit import HiViT, find_backbone
from itpn.system.console import Output, print_aside
from itpn.tasks.classification.module import classify
from itpn.tasks.classification.run import find_sets, make_batches
from itpn.tasks.starting import real_paths
from itpn.training.launch import quieten_libraries, start_fabric
from itpn.training.run_folder import make_folder, writing_to
from itpn.training.summary import make_table


def evaluate(
    config: ClassificationConfig,
    recipe: str,
    checkpoint: str,
    out: Path,
    knn: bool = False,
    given: Collection[str] = (),
) -> Scores:
    """Evaluate a checkpoint on the images that the settings name, and write the figures.

    Args:
        out: folder of ``evaluation.json``, ``classes.csv``, ``confusion.csv`` and ``confusion.png``.
        given: settings of the data that were asked for, and are not the checkpoint's affair: mean, std, crop_pct,
            interpolation, val_share.
        knn: ask the nearest neighbours among the training images, by the backbone's features, and no classifier.

    Raises:
        UserError: no such checkpoint, one without a classifier, images of other classes than it knows.
    """
    found = read_checkpoint(checkpoint)
    check_sound(found)
    has_classifier = "backbone.head.weight" in found.tensors
    if not knn and not has_classifier:
        raise UserError(
            f"checkpoint {checkpoint} has no classifier: give --knn to ask its features, or fine-tune it first"
        )
    # the network and its images are the checkpoint's affair; the recipe says where they are
    config.model.name = config.model.patch_size = config.data.img_size = None
    for name in ("mean", "std", "crop_pct", "interpolation"):
        if name in found.preprocessing and name not in given:
            setattr(config.data, name, found.preprocessing[name] if name == "interpolation" else None)
    heads: dict[str, Any] = {} if config.model.num_heads is None else {"num_heads": config.model.num_heads}
    model, notes = load_found(found, "backbone" if knn else "classification", **heads)
    backbone = find_backbone(model)
    config.model.in_chans = backbone.in_chans
    settle(config, found)
    known, asked, which = find_images(config, found, backbone, knn, given)
    make_folder(out)
    quieten_libraries()
    with start_fabric(config.trainer) as fabric:
        model.to(fabric.device)
        mean, std = config.data.mean, config.data.std
        assert mean is not None
        assert std is not None
        normalize = Normalize(backbone.in_chans, mean, std).to(fabric.device)
        skipped: list[tuple[str, str]] = []

        def batches(images: LabelledImages) -> Any:
            return make_batches(images, config, fabric.global_rank, fabric.world_size)

        with fabric.autocast():
            if knn:
                assert known is not None
                sets = [
                    collect_features(backbone, normalize, batches(images), fabric.device, skipped, fabric.world_size)
                    for images in (known, asked)
                ]
            else:
                ask = functools.partial(classify, backbone, normalize)
                (own,) = collect_answers([ask], batches(asked), fabric.device, skipped)
        if knn:
            (train, train_labels), (test, labels) = sets
            train, train_labels, test = (x.to(fabric.device) for x in (train, train_labels, test))
            votes = ask_neighbours(train, train_labels, test, len(asked.classes), config.evaluation.neighbours)
            answers = judge(torch.arange(len(test)), labels, votes.log().cpu())
        else:
            answers = gather(own, fabric.world_size)
        unread = gather_skipped(skipped, fabric.world_size)
        if not len(answers.index):
            raise nothing_readable(unread)
        scores = score(answers, len(asked.classes))
        if fabric.is_global_zero:
            tell_asides([*asked.notes, *notes], unread)
            if "classes" not in found.metadata and not knn:
                warn_of_other_order(scores)
            about = {"checkpoint": checkpoint, "recipe": recipe, "of": which, "images_skipped": len(unread)}
            about |= {"by": f"{config.evaluation.neighbours} nearest neighbours"} if knn else {"by": "classifier"}
            report(scores, asked.classes, out, about)
    return scores


def find_images(
    config: ClassificationConfig, found: Checkpoint, model: HiViT, knn: bool, given: Collection[str]
) -> tuple[LabelledImages | None, LabelledImages, str]:
    """The images whose neighbours are asked for, with ``knn``, those to evaluate on, and which these are.

    Where a checkpoint's own run held out a share of the very same folder, the same is held out.

    Raises:
        UserError: none, or classes that the model does not know.
    """
    data = config.data
    trained = found.metadata.get("settings", {})
    trained_here = real_paths(*trained.get("data", {}).get("root", ())) == real_paths(*data.root)
    if trained_here and "val_share" not in given:
        data.val_share, config.seed = trained["data"]["val_share"], trained["seed"]
    which = f"of {', '.join(data.val_root or data.root)}"
    if knn:
        known, asked = find_sets(config)
        if asked is None:
            roots = ", ".join(data.root)
            raise UserError(f"there are no images to evaluate on in {roots}: give --data.val-root or --data.val-share")
        return known, asked, which
    where = data.val_root or data.root
    own = read_split(where, "val", optional=data.val_root is None, members=data.members)
    if own is None:
        own = read_split(data.root, "train", members=data.members)
        # a folder of classes alone: a test set, unless the network was trained on it
        if trained_here or "val_share" in given:
            _, held_out = find_labelled(data.root, None, data.val_share, config.seed, data.members)
            if held_out is not None:
                own, which = held_out, f"{data.val_share:.0%} held out {which}"
    names = found.metadata.get("classes")
    if names is not None and set(names) == set(own.classes) and list(names) != list(own.classes):
        print_aside("the classes of the images come in another order than the model's: they are matched by name")
    return None, match_classes(own, names, model.num_classes), which


def report(scores: Scores, classes: tuple[str, ...], out: Path, about: dict[str, Any]) -> None:
    """Write the figures, and show them."""
    with writing_to(out):
        write_scores(scores, classes, out, about)
    rows = {
        "images": f"{scores.images:,} of {len(classes)} classes, {about['images_skipped']} skipped; {about['of']}",
        "top-1": f"{scores.top1:.2%}",
        **({"top-5": f"{scores.top5:.2%}"} if len(classes) > 5 else {}),
        **({"cross-entropy": f"{scores.loss:.4f}"} if math.isfinite(scores.loss) else {}),
        "calibration": f"{scores.calibration_error:.2%} expected error of the confidence",
    }
    present = [i for i in range(len(classes)) if not scores.per_class[i].isnan()]
    rows |= rank_classes({classes[i]: float(scores.per_class[i]) for i in present})
    if mix := most_confused(scores, classes):
        rows["most confused"] = mix
    rows["files"] = f"{out}/evaluation.json, classes.csv, confusion.csv, confusion.png"
    Output().print(make_table(f"{about['checkpoint']} by {about['by']}", rows))


def most_confused(scores: Scores, classes: tuple[str, ...]) -> str:
    """The pair of classes that is mistaken most often."""
    wrong = scores.confusion.clone().fill_diagonal_(0)
    row, column = divmod(int(wrong.argmax()), len(classes))
    count = int(wrong[row, column])
    return f"{classes[row]} taken for {classes[column]}, {count} times" if count else ""
