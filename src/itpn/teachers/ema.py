"""The EMA teacher: an exponential moving average of the network itself, which sees the whole image."""

import math

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from itpn.masked.masked_model import PYRAMID_LOSSES, MaskedImageModel
from itpn.masked.targets import normalize_features
from itpn.models.backbone import Backbone
from itpn.models.pyramid import FeaturePyramid


class EMATeacher(nn.Module):
    """Exponential moving average of backbone and pyramid (Tian et al. 2023, section 3.3; Grill et al. 2020, section 3).

    From the image without a mask it computes a target for every loss on features: stage 3 for the decoder of all levels
    and for the auxiliary head; for the head of a pyramid level that level, the tokens of a patch concatenated.

    Args:
        model: the student; its present weights are copied.
        normalize: normalize each token by its own mean and std. Without it the targets may collapse.
    """

    def __init__(self, model: MaskedImageModel, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize
        self.losses = model.feature_losses
        self.ema = ModelEmaV3(_trunk(model))
        for parameter in self.ema.parameters():
            parameter.requires_grad_(False)
        self._backbone.set_grad_checkpointing(False)

    @property
    def _backbone(self) -> Backbone:
        return self.ema.module["backbone"]

    def train(self, mode: bool = True) -> "EMATeacher":
        """Stay in eval mode, without stochastic depth."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalized images [B, C, H, W], as for the student -> target of each loss, float32 [B, N, D]."""
        stages = self._backbone.forward_stages(images)  # [B, N, 4, 4, C/4], [B, N, 2, 2, C/2], [B, N, 1, 1, C]
        pyramid = self.ema.module["pyramid"]
        assert isinstance(pyramid, FeaturePyramid)
        levels = dict.fromkeys(("feature", "auxiliary"), stages[-1])
        if set(self.losses) & set(PYRAMID_LOSSES):
            levels |= dict(zip(PYRAMID_LOSSES, pyramid(stages), strict=True))
        normalize = normalize_features if self.normalize else Tensor.float
        return {name: normalize(levels[name]).flatten(2) for name in self.losses}

    @torch.no_grad()
    def update(self, model: MaskedImageModel, momentum: float) -> None:
        """Weights become ``momentum`` times their own values plus ``1 - momentum`` times the student's."""
        self.ema.decay = momentum
        self.ema.update(_trunk(model))


def _trunk(model: MaskedImageModel) -> nn.ModuleDict:
    return nn.ModuleDict({"backbone": model.backbone, "pyramid": model.pyramid})


def momentum_at(step: int, total_steps: int, start: float, end: float) -> float:
    """Momentum of the EMA teacher: half a cosine from ``start`` to ``end`` (Grill et al. 2020, section 3.2).

    In the first steps it is at most 1 - (1 + step)^(-2/3), as in timm. With 0.996 from the beginning, the teacher of a
    run of some hundred steps would be little more than its random initialization.
    """
    cosine = end - (end - start) * (math.cos(math.pi * min(1.0, step / max(1, total_steps))) + 1) / 2
    return min(cosine, 1 - (1 + step) ** (-2 / 3))
