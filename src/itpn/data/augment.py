"""Augmentation on uint8 tensors. Each function is given its random numbers, so that it has no state of its own."""

import math
import random
from dataclasses import dataclass

from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from itpn.errors import UserError


@dataclass(frozen=True)
class PretrainingTransform:
    """Random resized crop and horizontal flip, the augmentation of pixel pre-training (He et al. 2022).

    Args:
        img_size: height and width of what comes out.
        scale: smallest and largest area of the crop, as a fraction of the image's.
        ratio: smallest and largest width of the crop, as a multiple of its height.
        interpolation: "bicubic" or "bilinear", always with antialiasing.
        hflip: probability of a mirror image.

    Raises:
        UserError: a value that cannot be.
    """

    img_size: tuple[int, int] = (224, 224)
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"
    hflip: float = 0.5

    def __post_init__(self) -> None:
        if self.interpolation not in ("bicubic", "bilinear"):
            raise UserError(f"interpolation is {self.interpolation!r}: choose bicubic or bilinear")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"crop scale is {self.scale}: give a smallest and a largest part between 0 and 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"crop ratio is {self.ratio}: give a smallest and a largest ratio above 0")

    def __call__(self, image: Tensor, rng: random.Random) -> Tensor:
        """uint8 [3, any, any] -> uint8 [3, height, width]; the same ``rng`` gives the same crop."""
        top, left, height, width = draw_crop(image.shape[-2], image.shape[-1], self.scale, self.ratio, rng)
        crop = image[:, top : top + height, left : left + width]
        crop = resize(crop, list(self.img_size), InterpolationMode(self.interpolation), antialias=True)
        if rng.random() < self.hflip:
            crop = crop.flip(-1)
        return crop.contiguous()


def draw_crop(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """Draw a crop whose area is uniform in ``scale`` and whose aspect is log-uniform in ``ratio``.

    Returns:
        top, left, height, width in pixels; the largest allowed centre crop where ten draws do not fit.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_height, crop_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top, left = rng.randint(0, height - crop_height), rng.randint(0, width - crop_width)
            return top, left, crop_height, crop_width
    return _largest_centre_crop(height, width, min(max(width / height, ratio[0]), ratio[1]))


def center_crop(image: Tensor, img_size: tuple[int, int]) -> Tensor:
    """The largest centre crop of the shape wanted, resized: uint8 [3, any, any] -> uint8 [3, *img_size]."""
    top, left, height, width = _largest_centre_crop(image.shape[-2], image.shape[-1], aspect=img_size[1] / img_size[0])
    crop = image[:, top : top + height, left : left + width]
    return resize(crop, list(img_size), InterpolationMode.BICUBIC, antialias=True).contiguous()


def _largest_centre_crop(height: int, width: int, aspect: float) -> tuple[int, int, int, int]:
    crop_height = max(1, min(height, round(width / aspect)))
    crop_width = max(1, min(width, round(height * aspect)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width
