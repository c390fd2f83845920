"""Metrics of a network on a set of images: one evaluator per task, for validation and for `itpn evaluate`."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from itpn.distributed import gather
from itpn.errors import UserError
from itpn.system.console import tell_remarks

Scores = TypeVar("Scores")
Skipped = list[tuple[str, str]]  # names of images that cannot be read, and why


class Evaluator(ABC, Generic[Scores]):
    """Compares what networks predict for a set of images with what is known of them.

    Attributes:
        names: of the metrics.
        best: the metric, the higher the better, that the best checkpoint is chosen by; None for none.
        classes: names of the classes.
        files: that :meth:`write` makes.
        about: how the images are evaluated, for `evaluation.json`.
        notes: what is remarkable about the images, a sentence each.
        left_out: images that are not evaluated on, although they can be read.
    """

    names: tuple[str, ...]
    best: str | None = None
    classes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    about: Mapping[str, Any] = {}
    notes: Sequence[str] = ()
    left_out: int = 0

    @abstractmethod
    def __len__(self) -> int:
        """Images to evaluate on."""

    @abstractmethod
    def batches(self, rank: int, world_size: int) -> Iterable[dict[str, Any]]:
        """The batches of a process, of a loader of :mod:`itpn.data.evaluation`."""

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Bring to a device what batches need there."""

    @abstractmethod
    def compare(self, network: nn.Module, batch: dict[str, Any]) -> Any:
        """What a batch adds to the scores: few numbers, on the CPU.

        Args:
            network: in eval mode; gradients are off.
            batch: with at least one image.
        """

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
    evaluator: Evaluator[Scores], networks: Sequence[nn.Module], device: torch.device, rank: int, world_size: int
) -> tuple[list[Scores], Skipped]:
    """The scores of networks in eval mode, over all processes together; each image is read once.

    Returns:
        The scores of each network, and the images that could not be read, of all processes.

    Raises:
        UserError: none of the images can be read.
    """
    evaluator.to(device)
    parts: list[list[Any]] = [[] for _ in networks]
    skipped: Skipped = []
    for batch in read_batches(evaluator.batches(rank, world_size), skipped):
        for network, own in zip(networks, parts, strict=True):
            own.append(evaluator.compare(network, batch))
    unread = sorted({item for own in gather(skipped) for item in own})
    scores = []
    for own in parts:
        joined = [part for process in gather(own) for part in process]
        if not joined:
            raise nothing_readable(unread)
        scores.append(evaluator.score(joined))
    return scores, unread


def read_batches(batches: Iterable[dict[str, Any]], skipped: Skipped) -> Iterator[dict[str, Any]]:
    """Batches with at least one image. Corrupt images are added to ``skipped``, warnings are printed."""
    for batch in batches:
        skipped += batch["corrupt"]
        tell_remarks(batch["warnings"])
        if len(batch["index"]):
            yield batch


def nothing_readable(skipped: Sequence[tuple[str, str]]) -> UserError:
    """None of the images to evaluate on can be read: why the first cannot."""
    first = f": {skipped[0][0]} {skipped[0][1]}" if skipped else ""
    return UserError(f"none of the images to evaluate on can be read{first}")


class HasClasses(Protocol):
    """Images whose classes have names and indices."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    def rename(self, classes: Sequence[str]) -> Any: ...


Named = TypeVar("Named", bound=HasClasses)


def match_classes(images: Named, names: Sequence[str] | None, count: int, what: str = "images") -> Named:
    """Images with the class indices of a model.

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


def real_paths(*paths: str | None) -> list[str | None]:
    """Places, however they were written, to see whether a network was trained on what it is evaluated on."""
    return [None if path is None else os.path.realpath(path) for path in paths]
