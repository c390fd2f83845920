"""The training step of pre-training."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from itpn.checkpoints.files import read_checkpoint
from itpn.checkpoints.io import write_safetensors
from itpn.masked.masked_model import MaskedImageModel
from itpn.masked.targets import normalize_features
from itpn.models.spec import spec_of
from itpn.tasks.pixels import describe_pixels, make_normalize
from itpn.tasks.pretraining.config import PretrainingConfig
from itpn.tasks.pretraining.data import PretrainingData, make_loader, show_to_teacher
from itpn.tasks.pretraining.network import build_from
from itpn.tasks.pretraining.weights import load_weights
from itpn.teachers.ema import EMATeacher, momentum_at
from itpn.teachers.feature_teacher import FeatureTeacher
from itpn.training.config import image_size, to_dict
from itpn.training.module import MakeLoader, TrainingModule


class PretrainingModule(TrainingModule):
    """Trains a masked model on batches of stored images [B, C, H, W].

    Args:
        recipe, make_loader: as of :class:`TrainingModule`.
        teacher: gives the targets of losses on features, unless the batches bring them.
    """

    static_graph = True  # with recomputed activations, stochastic depth and torch.compile as well

    def __init__(
        self,
        model: MaskedImageModel,
        config: PretrainingConfig,
        recipe: str,
        make_loader: MakeLoader | None = None,
        teacher: FeatureTeacher | EMATeacher | None = None,
    ) -> None:
        super().__init__(model, config, recipe, make_normalize(config), make_loader)
        self.model: MaskedImageModel
        self.compiled_by_default = config.trainer.strategy == "ddp"
        # an EMA is part of the run's state; a frozen teacher stays out of checkpoints, in a tuple modules overlook
        self.ema_teacher = teacher if isinstance(teacher, EMATeacher) else None
        self.register_load_state_dict_pre_hook(rename_earlier)
        self._frozen = (teacher,) if isinstance(teacher, FeatureTeacher) else ()

    @property
    def teacher_size(self) -> tuple[int, int] | None:
        """Height and width in pixels of the images for a teacher of its own size."""
        return self._frozen[0].img_size if self._frozen else None

    def training_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = self.normalize(batch["image"])
        targets = self.make_targets(batch, images)
        output = self.model(images, target=targets, valid=self.normalize.find_valid(batch["image"]))
        metrics = {"loss": output.loss.detach()}
        if len(output.losses) > 1:
            metrics |= {f"loss_{name}": loss.detach() for name, loss in output.losses.items()}
        if self.ema_teacher is not None:
            metrics |= {f"target_std_{name}": spread(target) for name, target in targets.items()}
        return {"loss": output.loss, "metrics": metrics}

    def prepare(self, device: torch.device) -> None:
        for teacher in self._frozen:
            teacher.to(device)

    @torch.no_grad()
    def make_targets(self, batch: dict[str, Any], images: Tensor) -> dict[str, Tensor]:
        """What the losses on features compare with: float32 [B, N, D] by the name of the loss.

        Args:
            batch: "image" and, where the teacher wants another size, "teacher_image", uint8; or "feature", its work
                done before.
            images: the normalized images, which the EMA teacher sees.
        """
        if self.ema_teacher is not None:
            return self.ema_teacher(images)
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
        if self.ema_teacher is not None:
            settings = self.config.teacher
            momentum = momentum_at(step, total_steps, settings.momentum, settings.momentum_end)
            self.ema_teacher.update(self.model, momentum)

    def warning(self, metrics: dict[str, float | None], step: int) -> str | None:
        """The targets of the EMA teacher have become the same for all patches of all images."""
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

    def compiled(self) -> list[nn.Module]:
        return [self.model] if self.ema_teacher is None else [self.model, self.ema_teacher]

    def save(self, path: Path, metrics: Mapping[str, float | None]) -> dict[str, str]:
        model = self.model
        if self.config.trainer.strategy == "fsdp":  # the other processes have gone, with their parts; the file is whole
            model = build_from(self.config)
            load_weights(model, read_checkpoint(path.parent / "checkpoints" / "last.ckpt"))
        save_weights(path, model, self.recipe, self.config)
        teacher = self.config.teacher
        return {"teacher": teacher.name, "teacher_sha256": teacher.sha256} if teacher.sha256 else {}

    def describe(self) -> dict[str, Any]:
        return describe_run(self.model, self.config)


def build_module(
    model: MaskedImageModel, config: PretrainingConfig, recipe: str, data: PretrainingData
) -> PretrainingModule:
    ema = EMATeacher(model, config.teacher.normalize) if config.teacher.name == "ema" else None
    size = None if data.teacher is None else data.teacher.img_size
    if data.teacher is not None:
        show_to_teacher(config, data.teacher)
    return PretrainingModule(
        model,
        config,
        recipe,
        functools.partial(make_loader, config, data.windows or data.train, teacher_size=size),
        ema or data.teacher,
    )


def describe_run(model: MaskedImageModel, config: PretrainingConfig) -> dict[str, Any]:
    """What checkpoints say about themselves, beside their weights."""
    return {
        "task": config.task,
        "settings": to_dict(config),
        "network": spec_of(model).to_dict(),
        "preprocessing": {**describe_pixels(config), "size": image_size(config.data)},
    }


def save_weights(path: Path, model: MaskedImageModel, recipe: str, config: PretrainingConfig) -> None:
    """Write ``model.safetensors`` of a run."""
    write_safetensors(path, model.state_dict(), {"recipe": recipe, **describe_run(model, config)})


def spread(target: Tensor) -> Tensor:
    """Standard deviation of targets [B, N, D] over images, its mean over N and D: near 0 for a collapsed teacher.

    Not over patches: targets that depend on the position alone have collapsed as well. A batch of a single image has
    only its patches.
    """
    return target.std(dim=1 if len(target) == 1 else 0).mean()


def rename_earlier(module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    """Names of the EMA teacher's tensors in checkpoints of earlier versions, as `Module.load_state_dict` hooks take."""
    for name in [name for name in state_dict if name.startswith("average.average.")]:
        state_dict[name.replace("average.average.", "ema_teacher.ema.", 1)] = state_dict.pop(name)
