"""Evaluation of the network during a run."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import lightning as L
from torch import nn

from itpn.models.modes import eval_mode
from itpn.system.console import print_note


class Evaluation(ABC):
    """Evaluates the network at the end of every so many epochs, and of the run.

    An evaluation adds :meth:`evaluate`, and sets ``score`` where checkpoints are judged by it.

    Args:
        names: of the metrics that it finds.

    Attributes:
        metrics: those found last; None each before.
        score: of the last evaluation, larger is better; None where metrics do not say how good a network is.
        step: of the last evaluation.
        best_score: of all evaluations.
        since_best: evaluations after the one with the best score.
    """

    def __init__(self, names: Sequence[str], every_n_epochs: int) -> None:
        self.metrics: dict[str, float | None] = dict.fromkeys(names)
        self.every_n_epochs = every_n_epochs
        self.score: float | None = None
        self.step = -1
        self.best_score = float("-inf")
        self.since_best = 0
        self._named: set[str] = set()

    @abstractmethod
    def evaluate(self, fabric: L.Fabric) -> dict[str, float]:
        """Find the metrics anew, on every process together, the task in eval mode."""

    def is_due(self, step: int, steps_per_epoch: int) -> bool:
        return step % (self.every_n_epochs * steps_per_epoch) == 0

    def update(self, fabric: L.Fabric, module: nn.Module, step: int) -> None:
        """Find the metrics of this step, on every process together."""
        with eval_mode(module):
            self.metrics = {**self.metrics, **self.evaluate(fabric)}
        self.step = step
        if self.score is not None:
            better = self.score > self.best_score  # not if it is not a number
            self.best_score, self.since_best = (self.score, 0) if better else (self.best_score, self.since_best + 1)

    def describe(self) -> dict[str, str]:
        """Rows of the table at the end."""
        return {}

    def name_skipped(self, fabric: L.Fabric, skipped: Sequence[tuple[str, str]]) -> None:
        """Name images that could not be read, each once in a run."""
        for name, reason in skipped:
            if fabric.is_global_zero and name not in self._named:
                self._named.add(name)
                print_note(f"skipped {name}: {reason}")

    def state_dict(self) -> dict[str, Any]:
        patience = {"best_score": self.best_score, "since_best": self.since_best}
        return {"metrics": self.metrics, "score": self.score, "step": self.step, **patience}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.metrics, self.score, self.step = state["metrics"], state["score"], state["step"]
        # earlier versions did not count
        self.best_score, self.since_best = state.get("best_score", self.best_score), state.get("since_best", 0)
