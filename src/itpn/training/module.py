"""What every task that is trained gives to the loop: its model, a training step, parameter groups, a description."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from itpn.config import RunConfig
from itpn.data.loader import TrainingLoader
from itpn.data.normalize import Normalize

MakeLoader = Callable[[int, int], TrainingLoader]


class TrainingModule(nn.Module, ABC):
    """A model and what one training step does with a batch of uint8 images.

    Whatever has to be resumed, an EMA for instance, is a submodule: checkpoints hold the state of the whole module.

    Args:
        recipe: name of the recipe, kept in checkpoints.
        make_loader: builds the loader of a process from its rank and the number of processes; needed to train.

    Attributes:
        loader: of this process, once training is set up.
        static_graph: whether every step uses the same parameters in the same way, which DDP makes use of.
    """

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

    def prepare(self, device: torch.device) -> None:
        """Called once, before the first step."""

    def finish_batch(self, batch: Any, device: torch.device) -> Any:
        """What the loader has left to be done to a batch, beside the step before."""
        return batch

    def after_step(self, step: int, total_steps: int) -> None:
        """Called after each optimizer step, the first of which is step 0."""

    def warning(self, metrics: dict[str, float | None], step: int) -> str | None:
        """What is suspicious about logged metrics; said once in a run."""
        return None

    def why_not_sharded(self) -> str | None:
        """What to say of ``--trainer.strategy fsdp``, where it is not for this task and its settings."""
        return f"is not for {self.config.task}"

    def shard(self, mesh: DeviceMesh, precision: str) -> None:
        """Divide the model over the processes of a mesh, in place (FSDP2)."""
        raise NotImplementedError

    def check_same_data(self, earlier: dict[str, Any]) -> None:
        """Raise :class:`UserError` where the checkpoint to resume from describes other data; see :meth:`describe`."""

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The training step: what DDP wraps."""
        return self.training_step(batch)

    @property
    def device(self) -> torch.device:
        parameter: Tensor = next(self.parameters())
        return parameter.device
