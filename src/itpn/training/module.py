"""What every task that is trained shares: its loader, its learning rate, what goes into checkpoints."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_leaves

from itpn.data.loader import TrainingLoader
from itpn.data.normalize import Normalize
from itpn.errors import UserError
from itpn.seeding import derive_seed
from itpn.training.config import OptimizerConfig, RunConfig

MakeLoader = Callable[[int, int], TrainingLoader]


class TrainingTask(L.LightningModule, ABC):
    """Trains a model by AdamW on batches of uint8 images, with linear warm-up and a schedule.

    A task adds ``training_step``, which returns "loss" and "figures" (detached numbers to be logged), the groups that
    its parameters are decayed in, and what a checkpoint says of it.

    Args:
        recipe: name of the recipe, kept in checkpoints.

    Attributes:
        compiled_by_default: whether steps are compiled on a GPU unless the settings say otherwise.
        static_graph: whether every step uses the same parameters in the same way.
        make_loader: builds the loader of a process from its rank and the number of processes; needed to train.
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
        self._loader_state: dict[str, int] | None = None
        self.total_steps = 0
        self._copies: torch.cuda.Stream | None = None

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a checkpoint says about itself, beside its weights."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """For AdamW; ``lr_scale`` of a group is its share of the learning rate, 1 where there is none."""

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

    def train_dataloader(self) -> TrainingLoader:
        if self.loader is None:
            assert self.make_loader is not None
            self.loader = self.make_loader(self.trainer.global_rank, self.trainer.world_size)
            if self._loader_state is not None:
                self.loader.load_state_dict(self._loader_state)
        return self.loader

    def prepare_batch(self, batch: Any, device: torch.device) -> Any:
        """What is left to be done to a batch of the loader, beside the step before."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if device.type != "cuda":
            return super().transfer_batch_to_device(self.prepare_batch(batch, device), device, dataloader_idx)
        # on a stream of its own: from pinned memory the batch is copied while the step before still computes
        self._copies = self._copies or torch.cuda.Stream(device)
        with torch.cuda.stream(self._copies):
            batch = super().transfer_batch_to_device(self.prepare_batch(batch, device), device, dataloader_idx)
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(self._copies)
        for tensor in tree_leaves(batch):
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                tensor.record_stream(computing)
        return batch

    def seed_step(self) -> int:
        """Draw what is random in a step from seed, step and rank alone, so that a resumed run draws the same."""
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        seed = derive_seed(self.config.seed, "step", step, self.global_rank)
        torch.manual_seed(seed)
        return seed

    def configure_optimizers(self) -> OptimizerLRScheduler:
        settings: OptimizerConfig = self.config.optimizer
        groups = self.parameter_groups()
        scales = [group.pop("lr_scale", 1.0) for group in groups]
        # loss scaling and gradient clipping together need the gradients unscaled outside a fused step
        fused = not (self.trainer.precision == "16-mixed" and settings.clip_grad)
        optimizer = torch.optim.AdamW(groups, lr=self.peak_lr(), betas=settings.betas, fused=fused)
        self.total_steps = int(self.trainer.estimated_stepping_batches)
        share = learning_rate(settings, self.peak_lr(), self.total_steps, self.steps_per_epoch())
        schedule = LambdaLR(optimizer, [_scaled(share, scale) for scale in scales])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # Lightning's own refuses fused optimisers in bf16 too, where no gradient is scaled
        if gradient_clip_val:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def global_batch(self) -> int:
        """Images that one optimiser step sees, over all processes and accumulated passes."""
        per_pass = min(self.config.data.batch_size * self.trainer.world_size, self.train_dataloader().images)
        return per_pass * self.trainer.accumulate_grad_batches

    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train_dataloader()) / self.trainer.accumulate_grad_batches)

    def peak_lr(self) -> float:
        settings = self.config.optimizer
        return settings.base_lr * self.global_batch() / 256 if settings.lr is None else settings.lr

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["itpn"] = {"recipe": self.recipe, **self.describe()}
        checkpoint["itpn_processes"] = self.trainer.world_size
        checkpoint["itpn_loader"] = self.train_dataloader().state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: another number of processes would change batch, learning rate and randomness.
        """
        before, now = checkpoint["itpn_processes"], self.trainer.world_size
        if before != now:
            raise UserError(
                f"this run was trained by {before} processes, not {now}: start as many, or choose another --name and "
                "begin from its weights with --model.checkpoint"
            )
        # after an epoch's last batch Lightning's own count is one epoch behind, if the run was resumed before
        place = {name: int(checkpoint["itpn_loader"][name]) for name in ("epoch", "batch")}
        done = place["epoch"] - (place["batch"] == 0)
        for counts in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
            counts |= {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
        # Lightning restores loaders only if nobody has asked for the number of steps before, as our schedule does
        self._loader_state = place
        if self.loader is not None:  # sharded runs are restored after their optimiser is made, which asks for it
            self.loader.load_state_dict(place)


def _scaled(share: Callable[[int], float], scale: float) -> Callable[[int], float]:
    return lambda step: scale * share(step)


def learning_rate(
    settings: OptimizerConfig, peak_lr: float, total_steps: int, steps_per_epoch: int
) -> Callable[[int], float]:
    """Learning rate as a share of the peak, by step: linear warm-up, then half a cosine or a line to ``min_lr``,
    or steps.

    The warm-up takes ``warmup_epochs`` or ``warmup_steps``, but at most ``max_warmup`` of all steps, so that short runs
    get somewhere.
    """
    wanted = settings.warmup_steps
    wanted = round(settings.warmup_epochs * steps_per_epoch) if wanted is None else wanted
    warmup = min(wanted, int(total_steps * settings.max_warmup))
    last = settings.min_lr / peak_lr if peak_lr else 0.0

    def share(step: int) -> float:
        if step < warmup:
            return settings.warmup_start + (1 - settings.warmup_start) * step / warmup
        if settings.schedule == "step":
            return 0.1 ** sum(step >= round(milestone * total_steps) for milestone in settings.milestones)
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if settings.schedule == "linear":
            return last + (1 - last) * (1 - progress)
        return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress))

    return share
