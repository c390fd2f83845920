"""Metrics of a network on a set of images: one evaluator per task, for validation and for `itpn evaluate`."""

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import lightning as L
import torch
from torch import nn

from itpn.checkpoints.files import Checkpoint
from itpn.data.batches import Batch, View, stack
from itpn.data.decode import UnreadableImage
from itpn.data.evaluation import MakeView, make_evaluation_loader
from itpn.data.files import ImageSource
from itpn.data.normalize import Normalize
from itpn.data.readers import Reader
from itpn.data.samples import Sample, open_for_tiles
from itpn.data.skipped import none_readable
from itpn.data.stored import ReadSettings
from itpn.distributed import gather
from itpn.errors import MachineError, UserError
from itpn.system.console import print_warnings
from itpn.tasks.evaluation_bar import EvaluationBar
from itpn.tasks.large import Tiling
from itpn.tasks.pixels import make_read_settings
from itpn.tasks.source_images import SourceImage
from itpn.tasks.tiling import Grid, Tile
from itpn.training.evaluation import Evaluation
from itpn.training.module import TrainingModule

Scores = TypeVar("Scores")
Skipped = list[tuple[str, str]]  # names of images that cannot be read, and why


@dataclass(frozen=True)
class EvaluationRequest:
    """What `itpn evaluate` is to evaluate.

    Attributes:
        given: names of the settings of data that were given; the others are the checkpoint's.
        knn: features by k-NN, not the predictions of a head.
    """

    checkpoint: Checkpoint
    given: Collection[str] = ()
    knn: bool = False


class Evaluator(ABC, Generic[Scores]):
    """Compares what networks predict for a set of images with what is known of them.

    Args:
        config: settings of the run.
        images: a reader of images and annotations, with the names of their classes.
        normalize: for the images, on the device of the network.
        view: of an image and its annotation, what a batch has.
        collate: views to a batch.

    Attributes:
        names: of the metrics.
        best: the metric, the higher the better, that the best checkpoint is chosen by; None for none.
        classes: names of the classes.
        files: that :meth:`write` makes.
        about: how the images are evaluated, for `evaluation.json`.
        notes: what is remarkable about the images, a sentence each.
        left_out: images that are not evaluated on, although they can be read.
        train: images that training is on, of which the first is named where one here has another type.
        tiling: how large images are cut, which :meth:`compare_tiles` is for; None where all are decoded as a whole.
    """

    names: tuple[str, ...]
    best: str | None = None
    classes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    about: Mapping[str, Any] = {}
    notes: Sequence[str] = ()
    left_out: int = 0
    train: ImageSource | Reader | None = None
    tiling: Tiling | None = None

    def __init__(
        self,
        config: Any,
        images: Any,
        normalize: Normalize,
        view: MakeView,
        collate: Callable[[list[View]], Batch] = stack,
    ) -> None:
        self.config, self.images, self.classes = config, images, images.classes
        self.normalize, self.view, self.collate = normalize, view, collate

    def __len__(self) -> int:
        """Images to evaluate on."""
        return len(self.images)

    @functools.cached_property
    def reading(self) -> ReadSettings:
        """How the images are read."""
        return make_read_settings(self.config, self.train)

    @property
    def batch_size(self) -> int:
        """Images per process and forward pass: of the section ``evaluation``, or else as in training."""
        own = getattr(self.config, "evaluation", self.config.data)
        return int(own.batch_size)

    def load(self, images: Any, rank: int, world_size: int) -> Iterable[dict[str, Any]]:
        """The batches of a process, of some images."""
        loading = self.batch_size, self.config.data.num_workers, rank, world_size, self.reading
        is_large = None if self.tiling is None else functools.partial(is_cut, self.tiling, self.reading)
        return make_evaluation_loader(images, self.view, *loading, collate=self.collate, is_large=is_large)

    def batches(self, rank: int, world_size: int) -> Iterable[dict[str, Any]]:
        """The batches of a process, as of a loader of :mod:`itpn.data.evaluation`."""
        return self.load(self.images, rank, world_size)

    def to(self, device: torch.device) -> None:
        """Bring to a device what batches need there."""
        self.normalize.to(device)

    @property
    def device(self) -> torch.device:
        return self.normalize.mean.device

    @abstractmethod
    def compare(self, network: nn.Module, batch: dict[str, Any]) -> Any:
        """What a batch adds to the scores: few numbers, on the CPU.

        Args:
            network: in eval mode; gradients are off.
            batch: with at least one image.
        """

    def compare_tiles(
        self, network: nn.Module, index: int, image: SourceImage, known: Any, grid: Grid, tiles: Iterable[Tile]
    ) -> Any:
        """As :meth:`compare`, of one large image, whose tiles are read one after the other.

        Args:
            index: of the image.
            known: its annotation.
            tiles: those of the grid.

        Raises:
            UnreadableImage: the image or its annotation cannot be read.
        """
        raise NotImplementedError(f"{type(self).__name__} has tiling, but not what large images need")

    @abstractmethod
    def score(self, parts: Sequence[Any]) -> Scores:
        """The scores of all batches of all processes; they come in any order, and their order must not matter."""

    @abstractmethod
    def metrics(self, scores: Scores) -> dict[str, float]:
        """By :attr:`names`, from 0 to 1 where they are fractions."""

    def warn(self, scores: Scores) -> None:
        """Warn of scores that something must be wrong with."""

    def write(self, scores: Scores, folder: Path, about: Mapping[str, Any]) -> None:  # there are no files by default
        """Write :attr:`files`, what the scores are of among them."""

    def rows(self, scores: Scores, about: Mapping[str, Any]) -> dict[str, str]:
        """Rows of the table of `itpn evaluate`."""
        return self.summarize(self.metrics(scores))

    @abstractmethod
    def summarize(self, metrics: Mapping[str, float | None]) -> dict[str, str]:
        """Rows of the table at the end of a run; metrics of an EMA of the weights begin with "ema_"."""


@torch.no_grad()
def evaluate(
    evaluator: Evaluator[Scores],
    networks: Sequence[nn.Module],
    device: torch.device,
    rank: int,
    world_size: int,
    bar: EvaluationBar | None = None,
) -> tuple[list[Scores], Skipped]:
    """The scores of networks in eval mode, over all processes together; each image is read once, and the tiles of a
    large one by the main process for each network.

    Args:
        bar: shows how many images are done.

    Returns:
        The scores of each network, and the images that could not be read, of all processes.

    Raises:
        UserError: none of the images can be read, or one is of another type.
    """
    evaluator.to(device)
    parts: list[list[Any]] = [[] for _ in networks]
    skipped: Skipped = []
    for batch in read_batches(evaluator.batches(rank, world_size), skipped):
        large = batch.get("large", ())
        if len(batch["index"]):
            for network, own in zip(networks, parts, strict=True):
                own.append(evaluator.compare(network, batch))
        for index in large:
            for own, part in zip(parts, _compare_large(evaluator, networks, index, bar, skipped), strict=False):
                own.append(part)
            if bar is not None:
                bar.advance(1)
        if bar is not None:
            bar.advance(len(batch["index"]) + len(batch["corrupt"]))
    unread = sorted({item for own in gather(skipped) for item in own})
    scores = []
    for own in parts:
        joined = [part for process in gather(own) for part in process]
        if not joined:
            raise none_evaluated(unread)
        scores.append(evaluator.score(joined))
    return scores, unread


def _compare_large(
    evaluator: Evaluator, networks: Sequence[nn.Module], index: int, bar: EvaluationBar | None, skipped: Skipped
) -> list[Any]:
    """What a large image adds to the scores of each network; nothing of one that cannot be read."""
    name, data, known = evaluator.images[index]
    assert evaluator.tiling is not None
    try:
        image = SourceImage(name, open_for_tiles(data, evaluator.reading, name), None, evaluator.reading)
        grid = evaluator.tiling.cut(image)
        if grid is None:
            raise UnreadableImage("it has been changed while it was read")
        parts = [
            evaluator.compare_tiles(network, index, image, known, grid, grid if bar is None else bar.show(grid))
            for network in networks
        ]
    except UnreadableImage as error:
        skipped.append((name, str(error)))
        return []
    image.warn()
    return parts


def is_cut(tiling: Tiling, reading: ReadSettings, image: Sample) -> bool:
    """Whether an image is evaluated in tiles."""
    return tiling.cut(SourceImage("", image, None, reading)) is not None


def read_batches(batches: Iterable[dict[str, Any]], skipped: Skipped) -> Iterator[dict[str, Any]]:
    """Batches with at least one image. Corrupt images are added to ``skipped``, warnings are printed."""
    for batch in batches:
        if "error" in batch:
            raise UserError(batch["error"])
        skipped += batch["corrupt"]
        print_warnings(batch["warnings"])
        if len(batch["index"]) or batch.get("large"):
            yield batch


def none_evaluated(skipped: Sequence[tuple[str, str]]) -> UserError | MachineError:
    """None of the images to evaluate on can be read: why the first cannot."""
    return none_readable("the images to evaluate on", skipped[0] if skipped else None)


class Validation(Evaluation):
    """Evaluates a network, and the EMA of its weights where there is one.

    Args:
        prefix: of the metrics' names.
    """

    def __init__(self, module: TrainingModule, evaluator: Evaluator, every_n_epochs: int, prefix: str = "val_") -> None:
        self.module = module
        self.evaluator = evaluator
        self.prefix = prefix
        networks = module.networks()
        super().__init__([f"{n}{prefix}{name}" for n in networks for name in evaluator.names], every_n_epochs)

    def evaluate(self, fabric: L.Fabric) -> dict[str, float]:
        networks = self.module.networks()
        with fabric.autocast():
            scores, skipped = evaluate(
                self.evaluator, list(networks.values()), fabric.device, fabric.global_rank, fabric.world_size
            )
        self.name_skipped(fabric, skipped)
        metrics = {
            f"{name}{self.prefix}{metric}": value
            for name, own in zip(networks, scores, strict=True)
            for metric, value in self.evaluator.metrics(own).items()
        }
        if self.evaluator.best is not None:
            self.score = max(
                value for name, value in metrics.items() if name.endswith(self.prefix + self.evaluator.best)
            )
        return metrics

    def load_state_dict(self, state: dict[str, Any]) -> None:
        names = list(self.metrics)
        super().load_state_dict(state)
        self.metrics = {name: self.metrics.get(name) for name in names}  # earlier versions had others

    def describe(self) -> dict[str, str]:
        return self.evaluator.summarize({name.replace(self.prefix, ""): value for name, value in self.metrics.items()})


def match_classes(images: Any, names: Sequence[str] | None, count: int, what: str = "images") -> Any:
    """Images with the class indices of a model.

    Args:
        images: a reader with ``classes``, and ``rename`` for others.
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


def trained_windows(trained: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Settings of the windows that a network was trained on, where none were given: large images are cut likewise.

    Args:
        trained: the checkpoint's settings of data.
        given: names of the settings of data that were given.
    """
    names = {"window_size", "window_overlap"}
    return {} if names & {*given} else {name: trained[name] for name in names & trained.keys()}


def trained_bands(checkpoint: Checkpoint) -> tuple[str, ...]:
    """--data.bands of the images that a checkpoint was trained on: those to evaluate on are joined likewise."""
    return tuple(checkpoint.settings.get("data", {}).get("bands", ()))


def real_paths(*paths: str | None) -> list[str | None]:
    """Places, however they were written, to see whether a network was trained on what it is evaluated on."""
    return [None if path is None else os.path.realpath(path) for path in paths]
