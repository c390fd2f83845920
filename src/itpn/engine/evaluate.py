"""`itpn evaluate`: a checkpoint and labelled images, in figures."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console

from itpn.checkpoints.files import Checkpoint, read_checkpoint
from itpn.checkpoints.finetuning import settle
from itpn.checkpoints.loading import describe_broken, load_found
from itpn.config import ClassificationConfig
from itpn.data.labelled import LabelledImages, find_labelled, read_split
from itpn.data.normalize import Normalize
from itpn.engine.classification import make_batches
from itpn.engine.console import print_aside
from itpn.engine.evaluation import (
    Scores,
    collect_answers,
    collect_features,
    gather,
    gather_skipped,
    judge,
    score,
    warn_of_other_order,
    write_scores,
)
from itpn.engine.fitting import make_table
from itpn.engine.launch import choose_devices, choose_precision, quieten_libraries, read_launch
from itpn.engine.probe import ask_neighbours
from itpn.errors import UserError
from itpn.models.hivit import HiViT, find_backbone
from itpn.tasks.classification import classify


def evaluate(config: ClassificationConfig, recipe: str, checkpoint: str, out: Path, knn: bool = False) -> Scores:
    """Evaluate a checkpoint on the images that the settings name, and write the figures.

    Args:
        out: folder of ``evaluation.json``, ``classes.csv``, ``confusion.csv`` and ``confusion.png``.
        knn: ask the nearest neighbours among the training images, by the backbone's features, and no classifier.

    Raises:
        UserError: no such checkpoint, one without a classifier, images of other classes than it knows.
    """
    found = read_checkpoint(checkpoint)
    if found.broken:
        raise UserError(f"checkpoint {checkpoint} has {describe_broken(found.broken)}")
    has_classifier = "backbone.head.weight" in found.tensors
    if not knn and not has_classifier:
        raise UserError(
            f"checkpoint {checkpoint} has no classifier: give --knn to ask its features, or fine-tune it first"
        )
    # the network and its images are the checkpoint's affair; the recipe says where they are
    config.model.name = config.model.patch_size = config.data.img_size = None
    heads: dict[str, Any] = {} if config.model.num_heads is None else {"num_heads": config.model.num_heads}
    model, notes = load_found(found, "backbone" if knn else "classification", **heads)
    backbone = find_backbone(model)
    config.model.in_chans = backbone.in_chans
    settle(config, found)
    known, asked = find_images(config, found, backbone, knn)

    quieten_libraries()
    with start(config) as fabric:
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
                    collect_features(backbone, normalize, batches(images), fabric.device, fabric.world_size, skipped)
                    for images in (known, asked)
                ]
            else:
                own = collect_answers(
                    lambda images: classify(backbone, normalize, images), batches(asked), fabric.device, skipped
                )
        if knn:
            (train, train_labels), (test, labels) = sets
            train, train_labels, test = (x.to(fabric.device) for x in (train, train_labels, test))
            votes = ask_neighbours(train, train_labels, test, len(asked.classes), config.evaluation.neighbours)
            answers = judge(torch.arange(len(test)), labels, votes.cpu())
        else:
            answers = gather(own, fabric.world_size)
        unread = gather_skipped(skipped, fabric.world_size)
        if not len(answers.index):
            raise UserError("none of the images to evaluate on can be read")
        scores = score(answers, len(asked.classes))
        if fabric.is_global_zero:
            for note in notes:
                print_aside(note)
            for name, reason in unread:
                print_aside(f"skipped {name}: {reason}")
            if not knn:
                warn_of_other_order(scores)
            about = {"checkpoint": checkpoint, "recipe": recipe, "images_skipped": len(unread)}
            about |= {"by": f"{config.evaluation.neighbours} nearest neighbours"} if knn else {"by": "classifier"}
            report(scores, asked.classes, out, about, config)
    return scores


@contextmanager
def start(config: ClassificationConfig) -> Iterator[L.Fabric]:
    """The processes and devices that the settings and whoever started this ask for."""
    launch = read_launch()
    devices = choose_devices(config.trainer, launch)
    try:
        fabric = L.Fabric(
            accelerator=config.trainer.accelerator,
            devices=devices.count,
            num_nodes=devices.nodes,
            strategy="ddp" if devices.several else "auto",
            precision=choose_precision(config.trainer.precision, devices.cuda),
            plugins=[launch.environment],
        )
        fabric.launch()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot compute on these devices: {str(error).splitlines()[0]}") from error
    try:
        yield fabric
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def find_images(
    config: ClassificationConfig, found: Checkpoint, model: HiViT, knn: bool
) -> tuple[LabelledImages | None, LabelledImages]:
    """The images whose neighbours are asked for, with ``knn``, and those to evaluate on, with the model's classes.

    Raises:
        UserError: none, or classes that the model does not know.
    """
    data = config.data
    own = read_split(data.val_root or data.root, "val", optional=True)
    if knn or own is None:
        train, held_out = find_labelled(data.root, data.val_root, data.val_share, config.seed)
        if held_out is None:
            if knn:
                raise UserError("there are no images to evaluate on: give --data.val-root or --data.val-share")
            held_out = train  # a folder of classes that was given to be evaluated
        if knn:
            return train, held_out
        own = held_out
    names = found.metadata.get("classes")
    if names is not None:
        if set(names) == set(own.classes) and list(names) != list(own.classes):
            print_aside("the classes of the images come in another order than the model's: they are matched by name")
        return None, own.rename(names)
    if len(own.classes) != model.num_classes:
        raise UserError(
            f"the images have {len(own.classes)} classes and the model {model.num_classes}, whose names its file does "
            "not hold: they cannot be matched"
        )
    return None, own


def report(
    scores: Scores, classes: tuple[str, ...], out: Path, about: dict[str, Any], config: ClassificationConfig
) -> None:
    """Write the figures, and show them."""
    try:
        write_scores(scores, classes, out, about)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
    rows = {
        "images": f"{scores.images:,} of {len(classes)} classes, {about['images_skipped']} skipped",
        "top-1": f"{scores.top1:.2%}",
        "top-5": f"{scores.top5:.2%}",
        "cross-entropy": f"{scores.loss:.4f}",
        "calibration": f"{scores.calibration_error:.2%} expected error of the confidence",
    }
    present = [i for i in range(len(classes)) if not scores.per_class[i].isnan()]
    ranked = sorted(present, key=lambda i: float(scores.per_class[i]))
    rows["hardest"] = ", ".join(f"{classes[i]} {float(scores.per_class[i]):.0%}" for i in ranked[:3])
    rows["easiest"] = ", ".join(f"{classes[i]} {float(scores.per_class[i]):.0%}" for i in ranked[:-4:-1])
    if mix := most_confused(scores, classes):
        rows["most confused"] = mix
    rows["files"] = f"{out}/evaluation.json, classes.csv, confusion.csv, confusion.png"
    Console().print(make_table(f"{about['checkpoint']} by {about['by']}", rows))


def most_confused(scores: Scores, classes: tuple[str, ...]) -> str:
    """The pair of classes that is mistaken most often."""
    wrong = scores.confusion.clone().fill_diagonal_(0)
    row, column = divmod(int(wrong.argmax()), len(classes))
    count = int(wrong[row, column])
    return f"{classes[row]} taken for {classes[column]}, {count} times" if count else ""
