"""Pre-training as it is trained: batches to loss."""

from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from itpn.config import Config, to_dict
from itpn.data.gpu_decoding import DeferredTransform, finish
from itpn.data.normalize import Normalize
from itpn.masked.masked_model import MaskedImageModel
from itpn.masked.targets import normalize_features
from itpn.teachers.ema import MovingAverageTeacher, momentum_at
from itpn.teachers.timm_teacher import FeatureTeacher
from itpn.training.module import MakeLoader, TrainingModule
from itpn.training.sharding import shard_network


class PretrainingTask(TrainingModule):
    """Trains a masked model on batches of uint8 images [B, 3, H, W].

    Args:
        recipe, make_loader: as of :class:`TrainingModule`.
        teacher: gives the targets of losses on features, unless the batches bring them.
    """

    static_graph = True  # with recomputed activations, stochastic depth and torch.compile as well

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

    def training_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = self.normalize(batch["image"])
        targets = self.make_targets(batch, images)
        output = self.model(images, target=targets)
        metrics = {"loss": output.loss.detach()}
        if len(output.losses) > 1:
            metrics |= {f"loss_{name}": loss.detach() for name, loss in output.losses.items()}
        if self.average is not None:
            metrics |= {f"target_std_{name}": spread(target) for name, target in targets.items()}
        return {"loss": output.loss, "metrics": metrics}

    def why_not_sharded(self) -> str | None:
        if self.average is not None:
            return "keeps no moving average: choose another --teacher.name"
        return None if self.config.probe.root is None else "cannot probe: leave out --probe.root"

    def shard(self, mesh: DeviceMesh, precision: str) -> None:
        shard_network(self.model, mesh, precision)

    def finish_batch(self, batch: Any, device: torch.device) -> Any:
        transform = self.loader.transform if self.loader is not None else None
        return finish(batch, transform.transform, device) if isinstance(transform, DeferredTransform) else batch

    def prepare(self, device: torch.device) -> None:
        for teacher in self._frozen:
            teacher.to(device)

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

    def after_step(self, step: int, total_steps: int) -> None:
        if self.average is not None:
            settings = self.config.teacher
            momentum = momentum_at(step, total_steps, settings.momentum, settings.momentum_end)
            self.average.update(self.model, momentum)

    def warning(self, metrics: dict[str, float | None], step: int) -> str | None:
        """The targets of a moving average have become the same for all units of all images."""
        least = self.config.teacher.min_std
        for name, value in metrics.items():
            if name.startswith("target_std_") and value is not None and value < least:
                return (
                    f"the teacher is collapsing: {name} is {value:.3f} at step {step}, below --teacher.min-std {least};"
                    " try a higher --teacher.momentum, a lower --optimizer.lr or more weight on pixels, under another "
                    "--name"
                )
        return None

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
