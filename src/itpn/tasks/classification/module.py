"""Classification as it is trained: augmented batches to loss, layer-wise learning rates, an EMA of the weights."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn

from itpn.checkpoints.files import named_tensors
from itpn.checkpoints.io import write_safetensors
from itpn.models.backbone import Backbone
from itpn.tasks.classification.config import ClassificationConfig
from itpn.tasks.classification.data import make_loader, make_transform
from itpn.tasks.data import RunData
from itpn.tasks.finetuning.module import FineTuningModule
from itpn.tasks.pixels import describe_pixels
from itpn.training.config import image_size
from itpn.training.module import MakeLoader


class ClassificationModule(FineTuningModule):
    """Trains a classifier on batches of uint8 images [B, 3, H, W] and labels [B].

    Args:
        config: with size, mean and standard deviation of the images resolved.
        recipe, classes, make_loader: as of :class:`FineTuningModule`.
    """

    def __init__(
        self,
        model: Backbone,
        config: ClassificationConfig,
        recipe: str,
        classes: tuple[str, ...],
        make_loader: MakeLoader | None = None,
    ) -> None:
        data = config.data
        super().__init__(model, config, recipe, classes, make_loader)
        self.model: Backbone
        decay = config.model.ema_decay
        # warmed up, so that a short run's EMA is not of its beginning
        self.ema = None if decay is None else ModelEmaV3(model, decay=decay, use_warmup=True).requires_grad_(False)
        self.mix: Mixup | None = None
        self.erase: RandomErasing | None = None
        if data.mixup or data.cutmix:
            self.mix = Mixup(data.mixup, data.cutmix, label_smoothing=data.label_smoothing, num_classes=len(classes))

    def prepare(self, device: torch.device) -> None:
        erase = self.config.data.erase
        self.erase = RandomErasing(erase, mode="pixel", device=device) if erase else None

    def training_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        images, labels = self.normalize(batch["image"]), batch["label"]
        if self.erase is not None:
            images = self.erase(images)
        if self.mix is not None:
            images, targets = self.mix(images, labels)
            loss = SoftTargetCrossEntropy()(self.model(images), targets)
        else:
            loss = F.cross_entropy(self.model(images), labels, label_smoothing=self.config.data.label_smoothing)
        return {"loss": loss, "metrics": {"loss": loss.detach()}}

    def after_step(self, step: int, total_steps: int) -> None:
        if self.ema is not None:
            self.ema.update(self.model, step=step)

    def networks(self) -> dict[str, nn.Module]:
        return {"": self.model} if self.ema is None else {"": self.model, "ema_": self.ema.module}

    def compiled(self) -> list[nn.Module]:
        return list(self.networks().values())

    def save(self, path: Path, metrics: Mapping[str, float | None]) -> dict[str, str]:
        """Write the weights, or their EMA where that is better, as a file that `itpn.load` reads whole."""
        own, ema = metrics.get("val_top1"), metrics.get("ema_val_top1")
        if self.ema is None or own is None or ema is None or ema <= own:
            return super().save(path, metrics)
        write_safetensors(path, named_tensors(self.ema.module), {"recipe": self.recipe, **self.describe()})
        return {"saved": "EMA"}

    def preprocessing(self) -> dict[str, Any]:
        data = self.config.data
        own = {**describe_pixels(self.config), "size": image_size(data), "crop_pct": data.crop_pct}
        return own | {"interpolation": data.interpolation}


def build_module(model: Backbone, config: ClassificationConfig, recipe: str, data: RunData) -> ClassificationModule:
    loader = functools.partial(make_loader, config, data.train, make_transform(config))
    return ClassificationModule(model, config, recipe, data.train.classes, loader)
