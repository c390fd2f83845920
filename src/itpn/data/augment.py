"""Augmentation of images [C, H, W] in the type they are stored in, uint8 for photographs.

Each function takes its random generator, so that it has no state of its own.
"""

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
from torchvision.transforms.v2.functional import adjust_brightness, adjust_contrast, adjust_saturation

from itpn.data.decode import EncodedImage, decode_whole
from itpn.data.image_type import PHOTOGRAPHS, Pixels
from itpn.data.pixels import adjust_channels, drop_channels, mirror, resize_pixels, turn
from itpn.errors import UserError

Jitter = list[tuple[Callable[[Tensor, float], Tensor], float]]  # adjustments and their factors, in order


class ChannelParams(NamedTuple):
    """The random parameters of what is done to each channel by itself.

    Attributes:
        brightness, contrast: a factor for each channel; none for no change.
        dropped: channels that are filled with their mean.
    """

    brightness: tuple[float, ...] = ()
    contrast: tuple[float, ...] = ()
    dropped: tuple[int, ...] = ()

    def apply(self, image: Tensor, pixels: Pixels) -> Tensor:
        if self.brightness:
            image = adjust_channels(image, self.brightness, self.contrast, pixels)
        return drop_channels(image, self.dropped, pixels) if self.dropped else image


class AugmentParams(NamedTuple):
    """The random parameters of an image's augmentation.

    Attributes:
        box: top, left, height and width of the crop.
        flip: whether the crop is flipped horizontally, after it was turned.
        turns: quarters of a circle that the crop is turned by.
    """

    box: tuple[int, int, int, int]
    flip: bool
    jitter: Jitter
    turns: int = 0
    channels: ChannelParams = ChannelParams()

    def crop(self, image: Tensor) -> Tensor:
        """The crop of a whole image [C, height, width]."""
        top, left, height, width = self.box
        return image[:, top : top + height, left : left + width]


@dataclass(frozen=True)
class PretrainingTransform:
    """Random resized crop and horizontal flip, the augmentation of pixel pre-training (He et al. 2022).

    Colour jitter and a second view for a teacher make it that of feature pre-training (Bao et al. 2022). Images of any
    channels and depth can be turned by quarters of a circle, and their channels changed each by itself.

    Args:
        img_size: height and width of the views.
        scale: smallest and largest area of the crop, as a fraction of the image's.
        ratio: smallest and largest width of the crop, as a multiple of its height.
        interpolation: "bicubic" or "bilinear", always with antialiasing.
        hflip: probability of a horizontal flip.
        color_jitter: largest relative change of brightness, contrast and saturation, applied in random order.
        teacher_size: height and width of a second view of the same crop, with the same flip and jitter; None for none.
        rotate90: turn by 0, 1, 2 or 3 quarters of a circle, each as likely.
        channel_jitter: largest relative change of brightness and contrast, drawn for each channel.
        channel_drop: probability of each channel to be filled with its mean; one channel stays at least.
        pixels: what is known of the images' pixels.

    Raises:
        UserError: a value out of range, or colour jitter of what is no photograph.
    """

    img_size: tuple[int, int] = (224, 224)
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"
    hflip: float = 0.5
    color_jitter: float = 0.0
    teacher_size: tuple[int, int] | None = None
    rotate90: bool = False
    channel_jitter: float = 0.0
    channel_drop: float = 0.0
    pixels: Pixels = PHOTOGRAPHS

    def __post_init__(self) -> None:
        if self.interpolation not in ("bicubic", "bilinear"):
            raise UserError(f"interpolation is {self.interpolation!r}: choose bicubic or bilinear")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"crop scale is {self.scale}: give a smallest and a largest fraction between 0 and 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"crop ratio is {self.ratio}: give a smallest and a largest ratio above 0")
        for name in ("color_jitter", "channel_jitter", "channel_drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: give a fraction between 0 and 1")
        if self.color_jitter:
            check_photographs(self.pixels, "--data.color-jitter", "--data.channel-jitter")
        if self.teacher_size is not None and min(self.teacher_size) < 1:
            raise UserError(f"teacher_size is {self.teacher_size}: give a height and a width of at least 1")

    def __call__(self, image: EncodedImage | Tensor, rng: random.Random) -> dict[str, Tensor]:
        """Augment one image, encoded or [C, any, any]; the same ``rng`` gives the same result.

        Returns:
            "image" [C, *img_size] in the type that is stored, and "teacher_image" [C, *teacher_size] if that is another
            size.
        """
        if isinstance(image, Tensor):
            params = self.draw_params(image.shape[1], image.shape[2], rng)
            return self.make_views(params.crop(image), params)
        params = self.draw_params(image.height, image.width, rng)
        largest = [max(sides) for sides in zip(self.img_size, self.teacher_size or (0, 0), strict=True)]
        height, width = swap_sides((largest[0], largest[1]), params.turns)
        return self.make_views(image.decode_crop(*params.box, (height, width)), params)

    def draw_params(self, height: int, width: int, rng: random.Random) -> AugmentParams:
        """Draw the parameters of an image of this size."""
        # what is off draws no number; turns are drawn first, for the crop's ratio is that of the turned image
        turns = rng.randrange(4) if self.rotate90 else 0
        box = draw_crop(*swap_sides((height, width), turns), self.scale, self.ratio, rng)
        if turns % 2:
            box = (box[1], box[0], box[3], box[2])
        flip = rng.random() < self.hflip
        # drawn last, so that crops do not depend on it
        jitter = draw_jitter(self.color_jitter, rng) if self.color_jitter else []
        channels = draw_channels(self.pixels.type.channels, self.channel_jitter, self.channel_drop, rng)
        return AugmentParams(box, flip, jitter, turns, channels)

    def make_views(self, crop: Tensor, params: AugmentParams) -> dict[str, Tensor]:
        """Resize, turn, flip and jitter a crop [C, any, any] on the device where it is."""
        views = {"image": self._make_view(crop, self.img_size, params)}
        if self.teacher_size is not None and tuple(self.teacher_size) != tuple(self.img_size):
            views["teacher_image"] = self._make_view(crop, self.teacher_size, params)
        return views

    def _make_view(self, crop: Tensor, size: tuple[int, int], params: AugmentParams) -> Tensor:
        # turned once it is small
        view = resize_pixels(crop, swap_sides(size, params.turns), self.interpolation, self.pixels.nodata)
        view = turn(view, params.turns)
        if params.flip:
            view = mirror(view)
        for adjust, factor in params.jitter:
            view = adjust(view, factor)
        return params.channels.apply(view, self.pixels).contiguous()


@dataclass(frozen=True)
class ClassificationTransform:
    """timm's augmentation of classifiers: random resized crop, flip, RandAugment. The device normalizes and erases.

    Images that are no photographs are augmented as in pre-training.

    Args:
        img_size: height and width of the view.
        auto_augment: timm's name of an automatic augmentation; None for colour jitter instead.
        crop_scale, crop_ratio, interpolation, hflip, color_jitter, rotate90, channel_jitter, channel_drop, pixels: as
            of :class:`PretrainingTransform`.

    Raises:
        UserError: timm has no augmentation of that name, or it is for photographs alone.
    """

    img_size: tuple[int, int]
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"
    hflip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None
    rotate90: bool = False
    channel_jitter: float = 0.0
    channel_drop: float = 0.0
    pixels: Pixels = PHOTOGRAPHS

    def __post_init__(self) -> None:
        crops = PretrainingTransform(
            self.img_size,
            self.crop_scale,
            self.crop_ratio,
            self.interpolation,
            self.hflip,
            self.color_jitter,
            rotate90=self.rotate90,
            channel_jitter=self.channel_jitter,
            channel_drop=self.channel_drop,
            pixels=self.pixels,
        )
        object.__setattr__(self, "_crops", crops)
        if self.auto_augment is not None:
            check_photographs(self.pixels, "--data.auto-augment", "--data.channel-jitter")
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
        """Augment one image, encoded or [C, any, any]; the same ``rng`` gives the same result.

        Returns:
            "image" [C, *img_size] in the type that is stored, and "label".
        """
        if not self.pixels.type.is_photo:
            return {**self._crops(image, rng), "label": torch.tensor(label)}  # type: ignore[attr-defined]
        # what is off draws no number
        pixels = turn(decode_whole(image), rng.randrange(4) if self.rotate90 else 0)
        channels = draw_channels(self.pixels.type.channels, self.channel_jitter, self.channel_drop, rng)
        view = channels.apply(self._augment(pixels, rng), self.pixels)
        return {"image": view, "label": torch.tensor(label)}

    def _augment(self, pixels: Tensor, rng: random.Random) -> Tensor:
        """timm's augmentation of a photograph."""
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
                        return torch.as_tensor(self._transform(to_pil(pixels)))  # type: ignore[attr-defined]
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
        pixels: what is known of the images' pixels; of photographs alone the result is timm's to the bit.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        crop_pct: float,
        interpolation: str = "bicubic",
        pixels: Pixels = PHOTOGRAPHS,
    ) -> None:
        self.img_size, self.crop_pct, self.interpolation, self.pixels = img_size, crop_pct, interpolation, pixels
        self._transform = create_transform(
            img_size, is_training=False, crop_pct=crop_pct, interpolation=interpolation, use_prefetcher=True
        )

    def __call__(self, image: Tensor) -> Tensor:
        """[C, any, any] -> [C, *img_size] of the same type."""
        if self.pixels.type.is_photo:
            return torch.as_tensor(self._transform(to_pil(image)))
        sides = _timm_sides(image.shape[-2], image.shape[-1], self.img_size, self.crop_pct)
        image = resize_pixels(image, sides, self.interpolation, self.pixels.nodata)
        top, left = (round((side - crop) / 2) for side, crop in zip(image.shape[-2:], self.img_size, strict=True))
        return image[:, top : top + self.img_size[0], left : left + self.img_size[1]].contiguous()


def _timm_sides(height: int, width: int, img_size: tuple[int, int], crop_pct: float) -> tuple[int, int]:
    """The size that timm resizes an image to, of which it takes the centre."""
    wanted = [math.floor(side / crop_pct) for side in img_size]
    if wanted[0] == wanted[1]:  # by torchvision, which rounds down
        short = min(height, width)
        return int(wanted[0] * height / short), int(wanted[0] * width / short)
    ratio = min(height / wanted[0], width / wanted[1])
    return round(height / ratio), round(width / ratio)


def draw_jitter(color_jitter: float, rng: random.Random) -> Jitter:
    """Draw factors for brightness, contrast and saturation within ``color_jitter`` (at most 1) of 1, and an order."""
    adjustments = (adjust_brightness, adjust_contrast, adjust_saturation)
    jitter = [(adjust, rng.uniform(1 - color_jitter, 1 + color_jitter)) for adjust in adjustments]
    rng.shuffle(jitter)
    return jitter


def draw_channels(channels: int, jitter: float, drop: float, rng: random.Random) -> ChannelParams:
    """Draw factors for each channel within ``jitter`` (at most 1) of 1, and which channels are dropped: never all."""
    brightness, contrast = (
        tuple(rng.uniform(1 - jitter, 1 + jitter) for _ in range(channels if jitter else 0)) for _ in range(2)
    )
    dropped = [channel for channel in range(channels) if rng.random() < drop] if drop else []
    if len(dropped) == channels:
        dropped.pop(rng.randrange(channels))
    return ChannelParams(brightness, contrast, tuple(dropped))


def swap_sides(sides: tuple[int, int], turns: int) -> tuple[int, int]:
    """Height and width after some quarters of a circle."""
    return (sides[1], sides[0]) if turns % 2 else (sides[0], sides[1])


def check_photographs(pixels: Pixels, option: str, instead: str) -> None:
    """Raise :class:`UserError` for an option that is for photographs alone."""
    if not pixels.type.is_photo:
        raise UserError(
            f"{option} is for RGB photographs, not for images of {pixels.type}: leave it out, or give {instead}"
        )


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


def center_crop(image: Tensor, img_size: tuple[int, int], nodata: float | None = None) -> Tensor:
    """The largest centre crop of that aspect ratio, resized: [C, any, any] -> [C, *img_size] of the same type."""
    top, left, height, width = _largest_centre_crop(image.shape[-2], image.shape[-1], aspect=img_size[1] / img_size[0])
    crop = image[:, top : top + height, left : left + width]
    return resize_pixels(crop, img_size, "bicubic", nodata).contiguous()


def _largest_centre_crop(height: int, width: int, aspect: float) -> tuple[int, int, int, int]:
    crop_height = max(1, min(height, round(width / aspect)))
    crop_width = max(1, min(width, round(height * aspect)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def to_pil(image: Tensor) -> Image.Image:
    """uint8 [3, height, width] -> PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
