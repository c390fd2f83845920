"""What every task that is trained gives to the loop: its model, a training step, parameter groups, a description."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from itpn.data.loader import TrainingLoader
from itpn.data.normalize import Normalize
from itpn.training.config import RunConfig

MakeLoader = Callable[[int, int], TrainingLoader]


class TrainingModule(nn.Module, ABC):
    """A model and what one training step does with a batch of uint8 images.

    Whatever has to be resumed, an EMA for instance, is a submodule: checkpoints hold the state of the whole module.

    Args:
        recipe: name of the recipe, kept in checkpoints.
        make_loader: builds the loader of a process from its rank and the number of processes; needed to train.

    Attributes:
        loader: of this process, once training is set up.
        compiled_by_default: whether steps are compiled on a GPU unless the settings say otherwise.
        static_graph: whether every step uses the same parameters in the same way, which DDP makes use of.
    """

    compiled_by_default = False
    static_graph = False

    def __init__(
        self, model: nn.Module, config: RunConfig, recipe: str, normalize: Normalize, make_loader: MakeLoader | None
    ) -> None:
        super().__init__()
        self.model = model
        self.config: Any = config
        self.recipe = recipe
        self.normalize = normalize
        self.make_loader = make_loader
        self.loader: TrainingLoader | None = None

    @abstractmethod
    def training_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The "loss", and "metrics" to be logged by name: detached tensors of one number, "loss" among them."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """For AdamW; ``lr_scale`` of a group multiplies the learning rate, 1 where there is none."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a checkpoint says about itself, beside its weights."""

    def networks(self) -> dict[str, nn.Module]:
        """The networks that are evaluated, by what the names of their metrics begin with."""
        return {"": self.model}

    def compiled(self) -> list[nn.Module]:
        """What torch.compile may take, each as a graph of its own."""
        return [self.model]

    @abstractmethod
    def save(self, path: Path, metrics: Mapping[str, float | None]) -> dict[str, Any]:
        """Write ``model.safetensors``.

        Args:
            metrics: of the last evaluation.

        Returns:
            What the summary says about it.
        """

    def prepare(self, device: torch.device) -> None:
        """Called once, before the first step."""

    def after_step(self, step: int, total_steps: int) -> None:
        """Called after each optimizer step, the first of which is step 0."""

    def warning(self, metrics: dict[str, float | None], step: int) -> str | None:
        """What is suspicious about logged metrics; said once in a run."""
        return None

    def check_same_data(self, earlier: dict[str, Any]) -> None:
        """Check what :meth:`describe` said in the checkpoint to resume from.

        Raises:
            UserError: it describes other data.
        """

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The training step: what DDP wraps."""
        return self.training_step(batch)

    @property
    def device(self) -> torch.device:
        parameter: Tensor = next(self.parameters())
        return parameter.device
