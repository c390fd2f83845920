"""The training step of a segmenter."""

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from itpn.data.masks import IGNORED
from itpn.models.segmenter import Segmenter
from itpn.models.synced import batch_fractions
from itpn.tasks.data import RunData, make_training_loader
from itpn.tasks.finetuning.module import FineTuningModule
from itpn.tasks.large import usual_side
from itpn.tasks.pixels import describe_pixels, make_read_settings
from itpn.tasks.segmentation.config import SegmentationConfig
from itpn.tasks.segmentation.data import make_transform


class SegmentationModule(FineTuningModule):
    """Trains a segmenter on uint8 images [B, 3, H, W] and the classes of their pixels, uint8 [B, H, W].

    Attributes:
        colours: of the classes, where their file says them.
    """

    model: Segmenter
    colours: tuple[tuple[int, int, int], ...] | None = None

    def training_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        target = batch["target"].long()
        logits = self.model(self.normalize(batch["image"]))
        losses = {f"loss_{name}": pixel_loss(own, target) for name, own in logits.items()}
        loss = losses["loss_out"] + self.config.model.auxiliary_weight * losses.get("loss_aux", 0.0)
        metrics = {"loss": loss, **losses} if len(losses) > 1 else {"loss": loss}
        return {"loss": loss, "metrics": {name: value.detach() for name, value in metrics.items()}}

    def preprocessing(self) -> dict[str, Any]:
        data = self.config.data
        size = {"size": [data.img_size, data.img_size], "short_side": data.short}
        return {**describe_pixels(self.config), "interpolation": data.interpolation, **size}

    def describe(self) -> dict[str, Any]:
        colours = None if self.colours is None else [list(colour) for colour in self.colours]
        return {**super().describe(), "colours": colours}


def build_module(model: Segmenter, config: SegmentationConfig, recipe: str, data: RunData) -> SegmentationModule:
    table = data.train.table
    loader = functools.partial(make_training_loader, config, data.train, make_transform(config, table))
    module = SegmentationModule(model, config, recipe, data.train.classes, loader)
    module.colours, module.image_side = table.colours, usual_side(data.train, make_read_settings(config, data.train))
    return module


def pixel_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of logits [B, classes, H, W], a mean over the labelled pixels of all processes' batch.

    Args:
        target: int64 [B, H, W], `IGNORED` where there is no class.
    """
    count = int((target != IGNORED).sum())
    (fraction,) = batch_fractions([count], logits.device)
    return F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum") / max(count, 1) * fraction
