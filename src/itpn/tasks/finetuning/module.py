"""What all fine-tuning tasks have: classes that stay, learning rates by layer."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from itpn.checkpoints.files import named_tensors
from itpn.checkpoints.io import write_safetensors
from itpn.data.normalize import Normalize
from itpn.errors import UserError
from itpn.models.backbone import Backbone, find_backbone
from itpn.models.spec import spec_of
from itpn.tasks.finetuning.config import FineTuningConfig
from itpn.tasks.pixels import make_normalize
from itpn.training.config import RunConfig, to_dict
from itpn.training.module import MakeLoader, TrainingModule


class FineTuningModule(TrainingModule):
    """Trains a network to name things.

    Args:
        config: resolved.
        classes: names of the model's classes.
        recipe, make_loader: as of :class:`TrainingModule`.
        normalize: None for the mean and std of the settings.

    Attributes:
        image_side: median short side of its images in pixels, as much of a larger image a tile is to show; None where
            it is not known.
    """

    image_side: int | None = None

    def __init__(
        self,
        model: nn.Module,
        config: RunConfig,
        recipe: str,
        classes: tuple[str, ...],
        make_loader: MakeLoader | None = None,
        normalize: Normalize | None = None,
    ) -> None:
        super().__init__(model, config, recipe, normalize or make_normalize(config), make_loader)
        self.classes = classes

    @abstractmethod
    def preprocessing(self) -> dict[str, Any]:
        """How images are prepared: mean, std, sizes and the like."""

    def describe(self) -> dict[str, Any]:
        return {
            "task": self.config.task,
            "settings": to_dict(self.config),
            "network": spec_of(self.model).to_dict(),
            "preprocessing": {
                **self.preprocessing(),
                **({} if self.image_side is None else {"image_side": self.image_side}),
            },
            "classes": list(self.classes),
        }

    def save(self, path: Path, metrics: Mapping[str, float | None]) -> dict[str, str]:
        write_safetensors(path, named_tensors(self.model), {"recipe": self.recipe, **self.describe()})
        return {"saved": "weights"}

    def parameter_groups(self) -> list[dict[str, Any]]:
        settings: FineTuningConfig = self.config.optimizer
        model: Any = self.model
        spared = model.no_weight_decay()
        if settings.layer_decay is None:
            return param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=spared)
        decay = decay_per_layer(find_backbone(model), settings.layer_decay, settings.layer_decay_over)
        return param_groups_layer_decay(model, settings.weight_decay, no_weight_decay_list=spared, layer_decay=decay)

    def check_same_data(self, earlier: dict[str, Any]) -> None:
        """Raise :class:`UserError` where the data hold other classes now."""
        before = earlier["classes"]
        if before != list(self.classes):
            different = sorted(set(before) ^ set(self.classes)) or ["their order"]
            raise UserError(
                f"the run has {len(before)} classes and the images have {len(self.classes)}, and they differ in "
                f"{', '.join(different[:3])}: choose another --name"
            )


def decay_per_layer(backbone: Backbone, decay: float, over: int | None) -> float:
    """Factor of the learning rate from one layer to the one before it.

    The official fine-tuning means its decay for 13 layers, and takes the 13/L-th power of it in a network of L, the
    number of blocks and one for the head; merges belong to the block before.
    """
    return decay if over is None else decay ** (over / (sum(backbone.depths) + 1))
