"""Features of frozen backbones, to be judged by nearest neighbours and linear classifiers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from itpn.data.normalize import Normalize
from itpn.models.backbone import find_backbone
from itpn.tasks.evaluation import nothing_readable

Features = tuple[Tensor, Tensor, Tensor]  # image index int64 [n], label int64 [n], features float32 [n, C]


def compute_features(network: nn.Module, normalize: Normalize, batch: dict[str, Any]) -> Features:
    """Means of the last stage over each image of a batch, on the CPU: int64 [n], int64 [n], float32 [n, C]."""
    images = normalize(batch["image"].to(normalize.mean.device, non_blocking=True))
    features = find_backbone(network).forward_stages(images)[-1].mean(dim=(1, 2, 3)).float().cpu()
    return batch["index"], batch["label"], features


def join_features(parts: Sequence[Features]) -> Features:
    """Together, in the order of the set."""
    if not parts:
        raise nothing_readable([])
    index, label, features = (torch.cat(column) for column in zip(*parts, strict=True))
    order = index.argsort()
    return index[order], label[order], features[order]
