"""Pre-training as Lightning runs it: batches to loss, optimiser and schedule."""

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.optim import param_groups_weight_decay
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from itpn.config import Config, OptimizerConfig, to_dict
from itpn.data.loader import PretrainingLoader
from itpn.data.normalize import Normalize
from itpn.errors import UserError
from itpn.pretraining.average import MovingAverageTeacher, momentum_at
from itpn.pretraining.model import MaskedImageModel
from itpn.pretraining.targets import normalize_features
from itpn.pretraining.teacher import FeatureTeacher
from itpn.seeding import derive_seed


class PretrainingTask(L.LightningModule):
    """Trains a masked model on batches of uint8 images [B, 3, H, W].

    Args:
        recipe: name of the recipe, kept in checkpoints.
        make_loader: builds the loader of a process from its rank and the number of processes; needed to train.
        teacher: gives the targets of losses on features, unless the batches bring them.
    """

    def __init__(
        self,
        model: MaskedImageModel,
        config: Config,
        recipe: str,
        make_loader: Callable[[int, int], PretrainingLoader] | None = None,
        teacher: FeatureTeacher | MovingAverageTeacher | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.recipe = recipe
        self.make_loader = make_loader
        self.loader: PretrainingLoader | None = None
        self._loader_state: dict[str, int] | None = None
        # an average is part of the run's state; a frozen teacher stays out of checkpoints, in a tuple modules overlook
        self.average = teacher if isinstance(teacher, MovingAverageTeacher) else None
        self._frozen = (teacher,) if isinstance(teacher, FeatureTeacher) else ()
        self._total_steps = 0
        self.normalize = Normalize(config.model.in_chans, config.data.mean, config.data.std)

    @property
    def teacher_size(self) -> tuple[int, int] | None:
        """Height and width in pixels of the images for a teacher of its own size."""
        return self._frozen[0].img_size if self._frozen else None

    def train_dataloader(self) -> PretrainingLoader:
        if self.loader is None:
            assert self.make_loader is not None
            self.loader = self.make_loader(self.trainer.global_rank, self.trainer.world_size)
            if self._loader_state is not None:
                self.loader.load_state_dict(self._loader_state)
        return self.loader

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        # the mask and stochastic depth depend on seed, step and rank alone, so a resumed run draws the same
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed(derive_seed(self.config.seed, "step", step, self.global_rank))
        images = self.normalize(batch["image"])
        targets = self.make_targets(batch, images)
        output = self.model(images, target=targets)
        figures = {"loss": output.loss.detach()}
        if len(output.losses) > 1:
            figures |= {f"loss_{name}": loss.detach() for name, loss in output.losses.items()}
        if self.average is not None:
            figures |= {f"target_std_{name}": spread(target) for name, target in targets.items()}
        return {"loss": output.loss, "figures": figures}

    def on_fit_start(self) -> None:
        for teacher in self._frozen:
            teacher.to(self.device)

    @torch.no_grad()
    def make_targets(self, batch: dict[str, Any], images: Tensor) -> dict[str, Tensor]:
        """What the losses on features compare with: float32 [B, N, D] by the name of the loss.

        Args:
            batch: "image" and, where the teacher wants another size, "teacher_image", uint8; or "feature", its work
                done before.
            images: the normalised images, which the moving average is shown.
        """
        if self.average is not None:
            return self.average(images)
        if "feature" in batch:
            features = batch["feature"].float()
        elif self._frozen:
            features = self._frozen[0](batch.get("teacher_image", batch["image"]))
        else:
            return {}
        if self.config.teacher.normalize:
            features = normalize_features(features)
        return dict.fromkeys(self.model.feature_losses, features)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            settings = self.config.teacher
            self.average.update(
                self.model,
                momentum_at(self.trainer.global_step, self._total_steps, settings.momentum, settings.momentum_end),
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        settings = self.config.optimizer
        groups = param_groups_weight_decay(
            self.model, settings.weight_decay, no_weight_decay_list=self.model.no_weight_decay()
        )
        # loss scaling and gradient clipping together need the gradients unscaled outside a fused step
        fused = not (self.trainer.precision == "16-mixed" and settings.clip_grad)
        optimizer = torch.optim.AdamW(groups, lr=self.peak_lr(), betas=settings.betas, fused=fused)
        total = int(self.trainer.estimated_stepping_batches)
        self._total_steps = total
        schedule = LambdaLR(optimizer, warmup_cosine(settings, self.peak_lr(), total, self.steps_per_epoch()))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

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
        checkpoint["itpn"] = {"recipe": self.recipe, "config": to_dict(self.config)}
        checkpoint["itpn_processes"] = self.trainer.world_size
        checkpoint["itpn_loader"] = self.train_dataloader().state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: another number of processes would change batch, learning rate and masks.
        """
        before, now = checkpoint["itpn_processes"], self.trainer.world_size
        if before != now:
            raise UserError(
                f"this run was trained by {before} processes, not {now}: start as many, or choose another --name and "
                "begin from its weights with --model.checkpoint"
            )
        # Lightning restores loaders only if nobody has asked for the number of steps before, as our schedule does
        self._loader_state = checkpoint["itpn_loader"]


def spread(target: Tensor) -> Tensor:
    """Deviation of targets [B, N, D] over images, the mean over N and D: near 0 when the teacher has collapsed.

    Not over units: targets that tell nothing but the position have collapsed as well. Of a single image, though, there
    are only its units.
    """
    return target.std(dim=1 if len(target) == 1 else 0).mean()


def warmup_cosine(
    settings: OptimizerConfig, peak_lr: float, total_steps: int, steps_per_epoch: int
) -> Callable[[int], float]:
    """Learning rate as a share of the peak, by step: linear warm-up, then half a cosine to ``min_lr``.

    The warm-up takes ``warmup_epochs``, but at most a tenth of all steps, so that short runs get somewhere.
    """
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), total_steps // 10)
    last = settings.min_lr / peak_lr if peak_lr else 0.0

    def share(step: int) -> float:
        if step < warmup:
            return settings.warmup_start + (1 - settings.warmup_start) * step / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress))

    return share
