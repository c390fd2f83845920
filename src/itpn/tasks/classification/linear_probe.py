"""A linear classifier on frozen features, which are computed once: `--model.freeze`."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch

from itpn.checkpoints.files import read_checkpoint
from itpn.data.labelled import LabelledImages
from itpn.errors import UserError
from itpn.metrics.classification import judge
from itpn.metrics.features import WEIGHT_DECAYS, choose_weight_decay, fit_linear
from itpn.models.spec import spec_of
from itpn.seeding import derive_seed
from itpn.system.console import Output, make_table, print_note
from itpn.tasks.classification import network
from itpn.tasks.classification.config import ClassificationConfig
from itpn.tasks.classification.data import find_data
from itpn.tasks.classification.evaluation import ClassificationEvaluator
from itpn.tasks.classification.module import ClassificationModule
from itpn.tasks.evaluation import Skipped, none_evaluated, read_batches
from itpn.tasks.features import Features, compute_features, join_features
from itpn.tasks.run import start_notes, train_composed
from itpn.tasks.spec import task_of
from itpn.training.config import freeze
from itpn.training.launch import describe_machine, launched, make_single_fabric, read_launch
from itpn.training.run_folder import RunFolder
from itpn.training.summary import write_summary


def train(config: ClassificationConfig, recipe: str, profile: bool = False, given: Collection[str] = ()) -> Path:
    """A classifier's run: fine-tuning, or a linear classifier on frozen features."""
    if config.model.freeze:
        if profile:
            raise UserError("--profile is for steps of training, and --model.freeze takes none")
        return train_linear(config, recipe)
    return train_composed(task_of(config), config, recipe, profile=profile, given=given)


def train_linear(config: ClassificationConfig, recipe: str) -> Path:
    """A linear classifier on features of the centre crops of evaluation, in one process.

    Returns:
        The run's folder, with a ``model.safetensors`` of the whole network.

    Raises:
        UserError: something in the settings, the weights or the folder is wrong.
    """
    began = time.perf_counter()
    folder = RunFolder(config, recipe)
    if not read_launch().main:
        return folder.path
    start = None if config.model.checkpoint is None else read_checkpoint(config.model.checkpoint)
    config = freeze(network.resolve(config, start)[0])
    data = find_data(config)
    torch.manual_seed(derive_seed(config.seed, "weights"))
    model, notes = network.build_model(config, data, start)
    fabric = make_single_fabric(config.trainer)
    folder.open(config)
    try:
        for note in [*start_notes(start), *notes, *data.notes]:
            print_note(note)
        module = ClassificationModule(model, config, recipe, data.train.classes)
        fitted = fit_probe(module, [data.train, *([] if data.val is None else [data.val])], fabric)
        with folder.writing(folder.weights):
            module.save(folder.weights, fitted.metrics)
        summary = {"recipe": recipe, "name": config.name, "task": config.task, "finished": True}
        summary |= {"metrics": fitted.metrics, "epochs": 1, "steps": 0, "saved": "weights"}
        summary |= {"images_seen": fitted.images, "images_skipped": fitted.skipped}
        seconds = time.perf_counter() - began
        summary |= {"images_per_second": fitted.images / seconds, "duration_seconds": seconds}
        write_summary(folder, summary | describe_machine(fabric.device, 1, str(fabric.strategy.precision.precision)))
        rows = {"images": f"{fitted.images:,} to learn from, {len(data.val or ()):,} to evaluate on"}
        rows["weight decay"] = f"{fitted.weight_decay:g}, the best of {len(WEIGHT_DECAYS)} on a fifth of the images"
        rows |= {name: f"{value:.2%}" if "top" in name else f"{value:.4f}" for name, value in fitted.metrics.items()}
        Output().print(make_table(f"{recipe} / {config.name}", {**rows, "weights": folder.weights}))
        return folder.path
    finally:
        folder.close()


@dataclass(frozen=True)
class FittedProbe:
    """What came of a linear probe.

    Attributes:
        metrics: of the training set, and of the validation set where there is one.
        images: to learn from.
        skipped: images that could not be read.
    """

    metrics: dict[str, float]
    weight_decay: float
    images: int
    skipped: int


def fit_probe(module: ClassificationModule, sets: Sequence[LabelledImages], fabric: L.Fabric) -> FittedProbe:
    """Replace the classifier of a network by the best linear one on its features.

    Args:
        sets: to learn from, and to evaluate on where there is another.
    """
    skipped: Skipped = []
    model, classes = module.model, len(module.classes)
    evaluators = [ClassificationEvaluator(module.config, images) for images in sets]
    with launched(fabric), fabric.autocast(), torch.no_grad():
        module.to(fabric.device).eval()
        known, *others = [_collect(module, evaluator, skipped) for evaluator in evaluators]
    labels, features = (x.to(fabric.device) for x in known[1:])
    normed = hasattr(model, "fc_norm")  # no other backbone need have a norm before its classifier
    if normed:
        model.fc_norm = torch.nn.Identity()
    weight_decay = choose_weight_decay(features, labels, classes)
    model.head = fit_linear(features, labels, classes, weight_decay)
    metrics = {"train_top1": float((model.head(features).argmax(dim=1) == labels).double().mean())}
    for index, targets, own in others:
        with torch.no_grad():
            predicted = model.head(own.to(fabric.device)).log_softmax(dim=1).cpu()
        scores = evaluators[1].score([judge(index, targets, predicted)])
        metrics |= {f"val_{name}": value for name, value in evaluators[1].metrics(scores).items()}
    for name, reason in skipped:
        print_note(f"skipped {name}: {reason}")
    model.cpu()
    if normed:
        model.spec = spec_of(model).with_options(fc_norm=False)  # type: ignore[assignment]
    return FittedProbe(metrics, weight_decay, len(features), len(skipped))


def _collect(module: ClassificationModule, images: ClassificationEvaluator, skipped: Skipped) -> Features:
    """Features of all images of a set."""
    unread: Skipped = []
    batches = read_batches(images.batches(0, 1), unread)
    parts = [compute_features(module.model, module.normalize, batch) for batch in batches]
    if not parts:
        raise none_evaluated(unread)
    skipped += unread
    return join_features(parts)
