"""Pre-training as Lightning runs it: batches to loss, optimiser and schedule."""

from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor

from itpn.config import Config, to_dict
from itpn.data.normalize import Normalize
from itpn.masked.masked_model import MaskedImageModel
from itpn.masked.targets import normalize_features
from itpn.teachers.ema import MovingAverageTeacher, momentum_at
from itpn.teachers.timm_teacher import FeatureTeacher
from itpn.training.module import MakeLoader, TrainingTask
from itpn.training.sharding import shard_network


class PretrainingTask(TrainingTask):
    """Trains a masked model on batches of uint8 images [B, 3, H, W].

    Args:
        recipe, make_loader: as of :class:`TrainingTask`.
        teacher: gives the targets of losses on features, unless the batches bring them.
    """

    def __init__(
        self,
        model: MaskedImageModel,
        config: Config,
        recipe: str,
        make_loader: MakeLoader | None = None,
        teacher: FeatureTeacher | MovingAverageTeacher | None = None,
    ) -> None:
        normalize = Normalize(config.model.in_chans, config.data.mean, config.data.std)
        super().__init__(model, config, recipe, normalize, make_loader)
        self.model: MaskedImageModel
        # an average is part of the run's state; a frozen teacher stays out of checkpoints, in a tuple modules overlook
        self.average = teacher if isinstance(teacher, MovingAverageTeacher) else None
        self._frozen = (teacher,) if isinstance(teacher, FeatureTeacher) else ()

    @property
    def teacher_size(self) -> tuple[int, int] | None:
        """Height and width in pixels of the images for a teacher of its own size."""
        return self._frozen[0].img_size if self._frozen else None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        self.seed_step()  # the mask and stochastic depth
        images = self.normalize(batch["image"])
        targets = self.make_targets(batch, images)
        output = self.model(images, target=targets)
        figures = {"loss": output.loss.detach()}
        if len(output.losses) > 1:
            figures |= {f"loss_{name}": loss.detach() for name, loss in output.losses.items()}
        if self.average is not None:
            figures |= {f"target_std_{name}": spread(target) for name, target in targets.items()}
        return {"loss": output.loss, "figures": figures}

    def configure_model(self) -> None:
        if self.device_mesh is not None:  # where the strategy shards
            shard_network(self.model, self.device_mesh["data_parallel"], str(self.trainer.precision))

    def prepare_batch(self, batch: Any, device: torch.device) -> Any:
        return batch if self.loader is None else self.loader.finish(batch, device)

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
                momentum_at(self.trainer.global_step, self.total_steps, settings.momentum, settings.momentum_end),
            )

    def parameter_groups(self) -> list[dict[str, Any]]:
        return param_groups_weight_decay(
            self.model, self.config.optimizer.weight_decay, no_weight_decay_list=self.model.no_weight_decay()
        )

    def describe(self) -> dict[str, Any]:
        return {"task": self.config.task, "config": to_dict(self.config)}


def spread(target: Tensor) -> Tensor:
    """Deviation of targets [B, N, D] over images, the mean over N and D: near 0 when the teacher has collapsed.

    Not over units: targets that tell nothing but the position have collapsed as well. Of a single image, though, there
    are only its units.
    """
    return target.std(dim=1 if len(target) == 1 else 0).mean()
