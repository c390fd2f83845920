"""The network as its own teacher: a moving average of it that sees the whole image."""

import math

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from itpn.masked.masked_model import PYRAMID_LOSSES, MaskedImageModel
from itpn.masked.targets import normalize_features
from itpn.models.hivit import HiViT
from itpn.models.pyramid import FeaturePyramid


class MovingAverageTeacher(nn.Module):
    """Exponential moving average of backbone and pyramid (Tian et al. 2023, section 3.3; Grill et al. 2020, section 3).

    Given the image with nothing hidden, it names a target for every loss on features: stage 3 for the joined pyramid
    and the auxiliary head, and for each pyramid level that level, all tokens of a unit in a row.

    Args:
        model: the student, copied as it is now.
        normalize: normalise each token by its own mean and deviation; without it the targets may shrink to nothing.
    """

    def __init__(self, model: MaskedImageModel, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize
        self.wanted = model.feature_losses
        self.average = ModelEmaV3(_trunk(model))
        for parameter in self.average.parameters():
            parameter.requires_grad_(False)
        self._backbone.set_grad_checkpointing(False)

    @property
    def _backbone(self) -> HiViT:
        return self.average.module["backbone"]

    def train(self, mode: bool = True) -> "MovingAverageTeacher":
        """Stays in eval mode: no stochastic depth."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images [B, C, H, W], as the student gets them -> target of each loss, float32 [B, N, D]."""
        stages = self._backbone.forward_stages(images)
        pyramid = self.average.module["pyramid"]
        assert isinstance(pyramid, FeaturePyramid)
        levels = dict.fromkeys(("feature", "auxiliary"), stages[-1])
        if set(self.wanted) & set(PYRAMID_LOSSES):
            levels |= dict(zip(PYRAMID_LOSSES, pyramid(stages), strict=True))
        normalize = normalize_features if self.normalize else Tensor.float
        return {name: normalize(levels[name]).flatten(2) for name in self.wanted}

    @torch.no_grad()
    def update(self, model: MaskedImageModel, momentum: float) -> None:
        """Keep ``momentum`` of the average and take the rest from the student."""
        self.average.decay = momentum
        self.average.update(_trunk(model))


def _trunk(model: MaskedImageModel) -> nn.ModuleDict:
    return nn.ModuleDict({"backbone": model.backbone, "pyramid": model.pyramid})


def momentum_at(step: int, total_steps: int, start: float, end: float) -> float:
    """Half a cosine from ``start`` to ``end`` (Grill et al. 2020, section 3.2), reached from below.

    In the first steps the average follows quickly, 1 - (1 + step)^(-2/3) as in timm's: with 0.996 from the beginning,
    the teacher of a run of some hundred steps would be little but its random start.
    """
    cosine = end - (end - start) * (math.cos(math.pi * min(1.0, step / max(1, total_steps))) + 1) / 2
    return min(cosine, 1 - (1 + step) ** (-2 / 3))
