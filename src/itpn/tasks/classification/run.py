"""A classifier's run: what it starts from, its images, its evaluation while it goes on."""

import functools
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from itpn.checkpoints.files import named_tensors, write_safetensors
from itpn.checkpoints.finetuning import make_classifier
from itpn.config import ClassificationConfig, image_size
from itpn.data.augment import ClassificationTransform, EvaluationTransform
from itpn.data.evaluation import make_evaluation_loader, read_some, view_labelled
from itpn.data.labelled import LabelledImages, draw_share, find_labelled, join_names
from itpn.data.loader import TrainingLoader
from itpn.errors import UserError
from itpn.metrics.classification import collect_answers, collect_features, gather, judge, nothing_readable, score
from itpn.metrics.features import WEIGHT_DECAYS, choose_weight_decay, fit_linear
from itpn.models.hivit import HiViT
from itpn.models.modes import eval_mode
from itpn.system.console import Output, print_aside
from itpn.tasks.classification.module import ClassificationTask, classify
from itpn.tasks.drawing import draw_titles
from itpn.tasks.starting import read_start, scale_epochs, start_network
from itpn.training.data import describe_size, make_training_loader
from itpn.training.evaluation import Evaluation
from itpn.training.launch import choose_devices, describe_machine, read_launch, start_fabric
from itpn.training.loop import Run, fit
from itpn.training.run_folder import RunFolder
from itpn.training.state import Job
from itpn.training.summary import make_table, write_summary

Sets = tuple[LabelledImages, LabelledImages | None]


def find_sets(config: ClassificationConfig) -> Sets:
    """The images to train on, as many as ``label_share`` says, and those to evaluate on."""
    data = config.data
    train, val = find_labelled(data.root, data.val_root, data.val_share, config.seed, data.members)
    if data.label_share < 1:
        train = train.take(draw_share(train, data.label_share, config.seed))
    return train, val


def note_unevaluated(train: LabelledImages, val: LabelledImages | None) -> list[str]:
    """What was left out of the images, and what the accuracies will not say, a line each."""
    notes = [*dict.fromkeys((*train.notes, *(() if val is None else val.notes)))]
    if val is None:
        return [*notes, "there are no images to evaluate on: give --data.val-root or --data.val-share"]
    lost = sorted({train.classes[label] for label in np.setdiff1d(train.labels, val.labels)})
    return [*notes, f"there are no images of {join_names(lost)} to evaluate on"] if lost else notes


def train_classifier(config: ClassificationConfig, recipe: str, sets: Sets | None = None, run: Run = fit) -> Path:
    """Start or resume a classifier's run; see :func:`itpn.training.loop.fit`.

    Args:
        sets: the images, where they have been looked for already.
        run: what to do, instead of training.
    """
    if config.model.freeze:
        return train_frozen(config, recipe, sets)
    found = read_start(config)
    train, val = sets or find_sets(config)
    scale_epochs(config, len(train), choose_devices(config.trainer, read_launch()).processes)
    model, notes = start_network(config, found, lambda: make_classifier(config, train.classes, found))
    model.set_grad_checkpointing(config.model.grad_checkpointing)
    transform = make_transform(config)
    notes += note_unevaluated(train, val)

    def make() -> Job:
        task = ClassificationTask(
            model, config, recipe, train.classes, lambda rank, world: make_loader(config, train, transform, rank, world)
        )
        validation = None if val is None else Validation(task, config, val)
        shown = functools.cache(lambda: read_first(val or train, config))
        more = "" if val is None else f", {len(val):,} more to evaluate on"
        return Job(
            task,
            lambda: draw_answers(task, *shown()),
            {"data": f"{len(train.classes)} classes{more}", "size": describe_size(image_size(config.data))},
            len(train),
            lambda path: save_classifier(path, task, validation),
            validation,
            [model] if task.ema is None else [model, task.ema.module],
        )

    return run(config, recipe, lambda: notes, make)


def train_frozen(config: ClassificationConfig, recipe: str, sets: Sets | None = None) -> Path:
    """A linear classifier on features that are computed once, by the centre crops of evaluation, in one process.

    Returns:
        The run's folder, with a ``model.safetensors`` of the whole network.

    Raises:
        UserError: something in the settings, the weights or the folder is wrong.
    """
    began = time.perf_counter()
    folder = RunFolder(config, recipe)
    if not read_launch().main:
        return folder.path
    found = read_start(config)
    train, val = sets or find_sets(config)
    model, notes = start_network(config, found, lambda: make_classifier(config, train.classes, found))
    notes += note_unevaluated(train, val)
    folder.open(config, recipe)
    try:
        for note in notes:
            print_aside(note)
        task = ClassificationTask(model, config, recipe, train.classes)
        skipped: list[tuple[str, str]] = []
        with start_fabric(config.trainer, single=True) as fabric, fabric.autocast():
            device = fabric.device
            task.to(device).eval()
            known, *others = [
                collect_features(model, task.normalize, make_batches(images, config), device, skipped)
                for images in (train, *([] if val is None else [val]))
            ]
        features, labels = (x.to(device) for x in known)
        model.fc_norm = torch.nn.Identity()
        weight_decay = choose_weight_decay(features, labels, len(train.classes))
        model.head = fit_linear(features, labels, len(train.classes), weight_decay)
        figures = {"train_top1": float((model.head(features).argmax(dim=1) == labels).double().mean())}
        for asked, answers in others:
            with torch.no_grad():
                answered = model.head(asked.to(device)).log_softmax(dim=1).cpu()
            scores = score(judge(torch.arange(len(asked)), answers, answered), len(train.classes))
            figures |= {"val_top1": scores.top1, "val_top5": scores.top5, "val_loss": scores.loss}
        for name, reason in skipped:
            print_aside(f"skipped {name}: {reason}")
        model.cpu()
        with folder.writing(folder.weights):
            write_classifier(folder.weights, model, {"recipe": recipe, **task.describe()})
        seconds = time.perf_counter() - began
        rows = {"images": f"{len(features):,} to learn from, {0 if val is None else len(val):,} to be asked about"}
        rows["weight decay"] = f"{weight_decay:g}, the best of {len(WEIGHT_DECAYS)} on a fifth of the images"
        rows |= {name: f"{value:.2%}" if "top" in name else f"{value:.4f}" for name, value in figures.items()}
        summary = {"recipe": recipe, "name": config.name, "task": config.task, "finished": True, "metrics": figures}
        summary |= {"epochs": 1, "steps": 0, "images_seen": len(features), "images_skipped": len(skipped)}
        summary |= {"images_per_second": len(features) / seconds, "duration_seconds": seconds, "saved": "weights"}
        write_summary(folder, summary | describe_machine(device, 1, str(fabric.strategy.precision.precision)))
        Output().print(make_table(f"{recipe} / {config.name}", {**rows, "weights": str(folder.weights)}))
        return folder.path
    finally:
        folder.close()


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


def make_transform(config: ClassificationConfig) -> ClassificationTransform:
    """The augmentation; UserError if there is none of that name."""
    data = config.data
    return ClassificationTransform(
        image_size(data),
        crop_scale=data.crop_scale,
        crop_ratio=data.crop_ratio,
        interpolation=data.interpolation,
        hflip=data.hflip,
        color_jitter=data.color_jitter,
        auto_augment=data.auto_augment,
    )


def make_loader(
    config: ClassificationConfig,
    images: LabelledImages,
    transform: ClassificationTransform,
    rank: int,
    world_size: int,
) -> TrainingLoader:
    data = config.data
    batch_size = data.batch_size
    if data.mixup or data.cutmix:  # in pairs: of a set smaller than a batch, an even number
        batch_size = min(batch_size, len(images) // world_size // 2 * 2)
        if not batch_size:
            raise UserError(
                f"{len(images)} images are too few to be mixed in pairs by {world_size} processes: give --data.mixup 0 "
                "--data.cutmix 0"
            )
    return make_training_loader(config, images, transform, rank, world_size, batch_size=batch_size)


def make_evaluation_transform(config: ClassificationConfig) -> EvaluationTransform:
    data = config.data
    assert data.crop_pct is not None
    size = data.test_size or image_size(data)
    return EvaluationTransform(size if isinstance(size, tuple) else (size, size), data.crop_pct, data.interpolation)


def read_first(images: LabelledImages, config: ClassificationConfig, count: int = 16) -> tuple[Tensor, list[str]]:
    """Readable images from all over a set, uint8 [n, 3, H, W], and the names of their classes."""
    transform = make_evaluation_transform(config)
    chosen = read_some(images, count, config.data.max_pixels)
    pixels = torch.stack([transform(image) for _, image in chosen])
    return pixels, [images.classes[images.labels[index]] for index, _ in chosen]


def draw_answers(task: ClassificationTask, images: Tensor, names: list[str]) -> Image.Image:
    """What the network says of some images, and what they are where that is something else."""
    with eval_mode(task):
        probabilities = classify(task.model, task.normalize, images.to(task.device)).exp().cpu()
    titles = []
    for row, name in zip(probabilities, names, strict=True):
        answer = task.classes[int(row.argmax())]
        titles.append(f"{row.max():.0%} {answer}" + ("" if answer == name else f", is {name}"))
    return draw_titles(images, titles)


class Validation(Evaluation):
    """Evaluates the network, and the moving average of its weights where there is one."""

    def __init__(self, task: ClassificationTask, config: ClassificationConfig, images: LabelledImages) -> None:
        names = ["val_top1", "val_top5", "val_loss"]
        if task.ema is not None:
            names += [f"ema_{name}" for name in names]
        super().__init__(names, config.evaluation.every_n_epochs)
        self.task = task
        self.config = config
        self.images = images

    def evaluate(self, fabric: L.Fabric) -> dict[str, float]:
        models: dict[str, Any] = {"": self.task.model}
        if self.task.ema is not None:
            models["ema_"] = self.task.ema.module
        skipped: list[tuple[str, str]] = []
        with fabric.autocast():
            answers = collect_answers(
                [functools.partial(classify, model, self.task.normalize) for model in models.values()],
                make_batches(self.images, self.config, fabric.global_rank, fabric.world_size),
                self.task.device,
                skipped,
            )
        unread = self.name_skipped(fabric, skipped)
        figures = {}
        for prefix, own in zip(models, answers, strict=True):
            gathered = gather(own, fabric.world_size)
            if not len(gathered.index):
                raise nothing_readable(unread)
            scores = score(gathered, len(self.images.classes))
            figures[f"{prefix}val_top1"] = scores.top1
            figures[f"{prefix}val_top5"] = scores.top5
            figures[f"{prefix}val_loss"] = scores.loss
        self.score = max(value for name, value in figures.items() if name.endswith("val_top1"))
        return figures

    def describe(self) -> dict[str, str]:
        figures = self.metrics
        shown = f"{figures['val_top1']:.1%} top-1, {figures['val_top5']:.1%} top-5"
        if self.task.ema is not None:
            shown += f"; moving average {figures['ema_val_top1']:.1%} top-1, {figures['ema_val_top5']:.1%} top-5"
        return {"accuracy": f"{shown} of {len(self.images):,} images"}


def save_classifier(path: Path, task: ClassificationTask, validation: Validation | None) -> dict[str, str]:
    """Write the weights, or their moving average where that was better, as a file that `itpn.load` reads whole.

    Returns:
        Which of the two, for the summary.
    """
    model, which = task.model, "weights"
    if task.ema is not None and validation is not None:
        average, own = validation.metrics["ema_val_top1"], validation.metrics["val_top1"]
        if average is not None and own is not None and average > own:
            model, which = task.ema.module, "moving average"
    write_classifier(path, model, {"recipe": task.recipe, **task.describe()})
    return {"saved": which}


def write_classifier(path: Path, model: HiViT, metadata: dict[str, Any]) -> None:
    write_safetensors(path, named_tensors(model), metadata)
