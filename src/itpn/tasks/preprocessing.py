"""The images that a checkpoint's network takes."""

import functools
from collections.abc import Callable

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from itpn.checkpoints.files import Checkpoint
from itpn.data.augment import EvaluationTransform, center_crop
from itpn.data.normalize import Normalize
from itpn.errors import UserError
from itpn.models.backbone import find_backbone

Crop = Callable[[Tensor], Tensor]  # of a whole image, uint8 [3, height, width]


def read_preprocessing(found: Checkpoint, model: nn.Module) -> tuple[Crop, Normalize]:
    """How images are cropped and normalized: as the file says, or the largest centre crop and ImageNet's mean and std.

    Raises:
        UserError: the network takes other images than those of one or three channels.
    """
    own, (channels, height, width) = found.preprocessing, find_backbone(model).image_shape
    if channels not in (1, 3):
        raise UserError(f"checkpoint {found.source} is of images with {channels} channels, not of photographs")
    usual = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    mean, std = (values if channels == 3 else (sum(values) / 3,) for values in usual)
    normalize = Normalize(channels, tuple(own.get("mean", mean)), tuple(own.get("std", std)))
    if "crop_pct" in own:  # of a classifier: as it was evaluated
        return EvaluationTransform((height, width), own["crop_pct"], own.get("interpolation", "bicubic")), normalize
    return functools.partial(center_crop, img_size=(height, width)), normalize
