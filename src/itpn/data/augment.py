"""Augmentation on uint8 tensors. Each function takes its random generator, so that it has no state of its own."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import adjust_brightness, adjust_contrast, adjust_saturation, resize

from itpn.data.decode import EncodedImage, decode_whole
from itpn.errors import UserError

Jitter = list[tuple[Callable[[Tensor, float], Tensor], float]]  # adjustments and their factors, in order


class AugmentParams(NamedTuple):
    """The random parameters of an image's augmentation.

    Attributes:
        box: top, left, height and width of the crop.
        flip: whether the crop is flipped horizontally.
    """

    box: tuple[int, int, int, int]
    flip: bool
    jitter: Jitter

    def crop(self, image: Tensor) -> Tensor:
        """The crop of a whole image [3, height, width]."""
        top, left, height, width = self.box
        return image[:, top : top + height, left : left + width]


@dataclass(frozen=True)
class PretrainingTransform:
    """Random resized crop and horizontal flip, the augmentation of pixel pre-training (He et al. 2022).

    Colour jitter and a second view for a teacher make it that of feature pre-training (Bao et al. 2022).

    Args:
        img_size: height and width of the views.
        scale: smallest and largest area of the crop, as a fraction of the image's.
        ratio: smallest and largest width of the crop, as a multiple of its height.
        interpolation: "bicubic" or "bilinear", always with antialiasing.
        hflip: probability of a horizontal flip.
        color_jitter: largest relative change of brightness, contrast and saturation, applied in random order.
        teacher_size: height and width of a second view of the same crop, with the same flip and jitter; None for none.

    Raises:
        UserError: a value out of range.
    """

    img_size: tuple[int, int] = (224, 224)
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"
    hflip: float = 0.5
    color_jitter: float = 0.0
    teacher_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.interpolation not in ("bicubic", "bilinear"):
            raise UserError(f"interpolation is {self.interpolation!r}: choose bicubic or bilinear")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"crop scale is {self.scale}: give a smallest and a largest fraction between 0 and 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"crop ratio is {self.ratio}: give a smallest and a largest ratio above 0")
        if not 0 <= self.color_jitter <= 1:
            raise UserError(f"color_jitter is {self.color_jitter}: give a fraction between 0 and 1")
        if self.teacher_size is not None and min(self.teacher_size) < 1:
            raise UserError(f"teacher_size is {self.teacher_size}: give a height and a width of at least 1")

    def __call__(self, image: EncodedImage | Tensor, rng: random.Random) -> dict[str, Tensor]:
        """Augment one image, encoded or uint8 [3, any, any]; the same ``rng`` gives the same result.

        Returns:
            "image" uint8 [3, *img_size], and "teacher_image" uint8 [3, *teacher_size] if that is another size.
        """
        if isinstance(image, Tensor):
            params = self.draw_params(image.shape[1], image.shape[2], rng)
            return self.make_views(params.crop(image), params)
        params = self.draw_params(image.height, image.width, rng)
        largest = [max(sides) for sides in zip(self.img_size, self.teacher_size or (0, 0), strict=True)]
        return self.make_views(image.decode_crop(*params.box, (largest[0], largest[1])), params)

    def draw_params(self, height: int, width: int, rng: random.Random) -> AugmentParams:
        """Draw the parameters of an image of this size."""
        box = draw_crop(height, width, self.scale, self.ratio, rng)
        flip = rng.random() < self.hflip
        # drawn last, and not at all without jitter, so that crops do not depend on it
        return AugmentParams(box, flip, draw_jitter(self.color_jitter, rng) if self.color_jitter else [])

    def make_views(self, crop: Tensor, params: AugmentParams) -> dict[str, Tensor]:
        """Resize, flip and jitter a crop, uint8 [3, any, any], on the device where it is."""
        views = {"image": self._make_view(crop, self.img_size, params)}
        if self.teacher_size is not None and tuple(self.teacher_size) != tuple(self.img_size):
            views["teacher_image"] = self._make_view(crop, self.teacher_size, params)
        return views

    def _make_view(self, crop: Tensor, size: tuple[int, int], params: AugmentParams) -> Tensor:
        view = resize(crop, list(size), InterpolationMode(self.interpolation), antialias=True)
        if params.flip:
            view = view.flip(-1)
        for adjust, factor in params.jitter:
            view = adjust(view, factor)
        return view.contiguous()


@dataclass(frozen=True)
class ClassificationTransform:
    """timm's augmentation of classifiers: random resized crop, flip, RandAugment. The device normalizes and erases.

    Args:
        img_size: height and width of the view.
        auto_augment: timm's name of an automatic augmentation; None for colour jitter instead.
        crop_scale, crop_ratio, interpolation, hflip, color_jitter: as of :class:`PretrainingTransform`.

    Raises:
        UserError: timm has no augmentation of that name.
    """

    img_size: tuple[int, int]
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"
    hflip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None

    def __post_init__(self) -> None:
        try:
            transform = create_transform(
                self.img_size,
                is_training=True,
                scale=self.crop_scale,
                ratio=self.crop_ratio,
                interpolation=self.interpolation,
                hflip=self.hflip,
                color_jitter=self.color_jitter,
                auto_augment=self.auto_augment,
                use_prefetcher=True,  # returns uint8, neither normalized nor erased
            )
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise UserError(f"--data.auto-augment {self.auto_augment}: timm knows no such augmentation") from error
        object.__setattr__(self, "_transform", transform)

    def __call__(self, image: EncodedImage | Tensor, rng: random.Random, label: int) -> dict[str, Tensor]:
        """Augment one image, encoded or uint8 [3, any, any]; the same ``rng`` gives the same result.

        Returns:
            "image" uint8 [3, *img_size], and "label".
        """
        pixels = decode_whole(image)
        # timm draws from the global generators of three libraries; their state is restored
        before = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                while True:
                    seed = rng.getrandbits(32)
                    random.seed(seed)
                    np.random.seed(seed)
                    torch.manual_seed(seed)
                    try:
                        view = torch.as_tensor(self._transform(to_pil(pixels)))  # type: ignore[attr-defined]
                        return {"image": view, "label": torch.tensor(label)}
                    except ValueError as error:
                        # of some hundred images, one is posterized to 0 bits, which newer Pillow refuses: draw again
                        if "bits" not in str(error):
                            raise
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


class EvaluationTransform:
    """timm's centre crop: the image is resized so that the crop is ``crop_pct`` of its side.

    Args:
        img_size: height and width of the crop.
    """

    def __init__(self, img_size: tuple[int, int], crop_pct: float, interpolation: str = "bicubic") -> None:
        self._transform = create_transform(
            img_size, is_training=False, crop_pct=crop_pct, interpolation=interpolation, use_prefetcher=True
        )

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 [3, any, any] -> uint8 [3, *img_size]."""
        return torch.as_tensor(self._transform(to_pil(image)))


def draw_jitter(color_jitter: float, rng: random.Random) -> Jitter:
    """Draw factors for brightness, contrast and saturation within ``color_jitter`` (at most 1) of 1, and an order."""
    adjustments = (adjust_brightness, adjust_contrast, adjust_saturation)
    jitter = [(adjust, rng.uniform(1 - color_jitter, 1 + color_jitter)) for adjust in adjustments]
    rng.shuffle(jitter)
    return jitter


def draw_crop(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """Draw a crop whose area is uniform in ``scale`` and whose aspect is log-uniform in ``ratio``.

    Returns:
        top, left, height, width in pixels; the largest centre crop within ``ratio`` if ten draws do not fit.
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
    """The largest centre crop of that aspect ratio, resized: uint8 [3, any, any] -> uint8 [3, *img_size]."""
    top, left, height, width = _largest_centre_crop(image.shape[-2], image.shape[-1], aspect=img_size[1] / img_size[0])
    crop = image[:, top : top + height, left : left + width]
    return resize(crop, list(img_size), InterpolationMode.BICUBIC, antialias=True).contiguous()


def _largest_centre_crop(height: int, width: int, aspect: float) -> tuple[int, int, int, int]:
    crop_height = max(1, min(height, round(width / aspect)))
    crop_width = max(1, min(width, round(height * aspect)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def to_pil(image: Tensor) -> Image.Image:
    """uint8 [3, height, width] -> PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
