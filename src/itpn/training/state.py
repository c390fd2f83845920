"""What is trained in a run, and how far it has come in this process."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from PIL import Image
from rich.console import Console
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from itpn.data.loader import TrainingLoader
from itpn.training.compilation import Compilation
from itpn.training.evaluation import Evaluation
from itpn.training.module import TrainingModule
from itpn.training.optimization import RunLength
from itpn.training.run_folder import RunFolder


@dataclass
class Job:
    """What one kind of run adds to what all kinds have.

    Attributes:
        module: what is trained.
        draw: draws what the network predicts for sample images; None for nothing.
        rows: of the table at the start, by title; those of "data", what the images are, "unit", "windows" where
            they are cut, and "size", what is made of them, are shown as one.
        images: single files, of which only a fraction may be corrupt; None where that is not known beforehand.
        evaluation: evaluates the network now and then, and adds to its metrics.
    """

    module: TrainingModule
    draw: Callable[[], Image.Image] | None
    rows: dict[str, str]
    images: int | None
    evaluation: Evaluation | None = None


@dataclass
class Training:
    """A run in this process.

    Attributes:
        model: computes the training step of the module: itself, or DDP around it.
        step, passes: optimizer steps, and forward and backward passes, so far.
        epoch: of the last batch.
        in_backward: whether the backward pass of the last pass has begun.
        copies: the stream on which batches come to a GPU.
        mark: is told which part of a step follows, by ``--profile``.
    """

    job: Job
    folder: RunFolder
    console: Console
    fabric: L.Fabric
    loader: TrainingLoader
    length: RunLength
    model: nn.Module
    optimizer: Optimizer
    schedule: LambdaLR
    compilation: Compilation
    copies: torch.cuda.Stream | None
    step: int = 0
    passes: int = 0
    epoch: int = 0
    in_backward: bool = False
    mark: Callable[[str], AbstractContextManager[Any]] = nullcontext

    @property
    def module(self) -> TrainingModule:
        return self.job.module

    @property
    def config(self) -> Any:
        return self.job.module.config

    @property
    def evaluation(self) -> Evaluation | None:
        return self.job.evaluation

    @property
    def device(self) -> torch.device:
        return self.fabric.device

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.fabric.is_global_zero

    @property
    def processes(self) -> int:
        return self.fabric.world_size

    @property
    def precision(self) -> str:
        """Lightning's name of it."""
        return str(self.fabric.strategy.precision.precision)

    @property
    def sharded(self) -> bool:
        return self.config.trainer.strategy == "fsdp"

    @property
    def at_end(self) -> bool:
        return self.step >= self.length.total_steps or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether as many evaluations as ``--evaluation.patience`` says have found no better network."""
        patience, evaluation = self.config.patience, self.evaluation
        return patience is not None and evaluation is not None and evaluation.since_best >= patience
