"""Detection as it is trained: images of any size and their objects to the losses of Mask R-CNN."""

import functools
from typing import Any

import torch
from torch import nn

from itpn.data.batches import collect
from itpn.models.detector import Detector
from itpn.tasks.data import make_training_loader
from itpn.tasks.detection.config import DetectionConfig
from itpn.tasks.detection.data import DetectionData, make_transform
from itpn.tasks.finetuning.module import FineTuningModule
from itpn.tasks.large import usual_side
from itpn.tasks.pixels import describe_pixels, make_read_settings
from itpn.training.module import MakeLoader


class DetectionModule(FineTuningModule):
    """Trains a detector on lists of stored images [C, any, any] and of targets (see :class:`Detector`).

    Args:
        model: from here on it leaves images in training mode as they are.
        recipe, classes, make_loader: as of :class:`FineTuningModule`.
    """

    def __init__(
        self,
        model: Detector,
        config: DetectionConfig,
        recipe: str,
        classes: tuple[str, ...],
        make_loader: MakeLoader | None = None,
    ) -> None:
        super().__init__(model, config, recipe, classes, make_loader)
        self.model: Detector
        model.transform.in_training = False  # the data are of their sizes already

    def training_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        # the network subtracts mean and std itself, as torchvision's do
        images = [self.normalize.scale(image) for image in batch["image"]]
        losses = self.model(images, batch["target"])
        loss = torch.stack(list(losses.values())).sum()
        return {"loss": loss, "metrics": {"loss": loss.detach(), **{n: part.detach() for n, part in losses.items()}}}

    def compiled(self) -> list[nn.Module]:
        return [self.model.backbone]  # the heads see as many boxes as there are

    def preprocessing(self) -> dict[str, Any]:
        data = self.config.data
        return {**describe_pixels(self.config), "min_size": data.img_size, "max_size": data.longest}


def build_module(model: Detector, config: DetectionConfig, recipe: str, data: DetectionData) -> DetectionModule:
    transform = make_transform(config, data.masks)
    loader = functools.partial(make_training_loader, config, data.train, transform, collate=collect)
    module = DetectionModule(model, config, recipe, data.train.classes, loader)
    module.image_side = usual_side(data.train, make_read_settings(config, data.train))
    return module
