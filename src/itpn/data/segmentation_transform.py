"""Augmentation of images with masks."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import crop, pad, resize

from itpn.data.augment import check_photographs, draw_channels
from itpn.data.decode import MAX_PIXELS, EncodedImage, UnreadableImage, decode_whole
from itpn.data.image_type import PHOTOGRAPHS, Pixels
from itpn.data.mask_files import open_mask
from itpn.data.masks import IGNORED, LabelTable
from itpn.data.pixels import mirror, pad_pixels, resize_pixels, turn
from itpn.data.samples import OpenWindow
from itpn.geometry import fit_sides

CROP_TRIES = 10


class PhotometricDistort(v2.RandomPhotometricDistort):
    """Random brightness, contrast, saturation and hue, without torchvision's permutation of channels."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {**super().make_params(flat_inputs), "channel_permutation": None}


DISTORT = PhotometricDistort(hue=(-0.1, 0.1))


@dataclass(frozen=True)
class SegmentationTransform:
    """Random scale, crop, flip and photometric distortion, as in mmsegmentation's recipes for ADE20K.

    Args:
        table: the meaning of labels.
        size: side of the crops in pixels.
        short: short side of an image of scale 1.
        scales: smallest and largest scale.
        max_fraction: largest fraction of a crop that one class may cover; after ten tries a crop is taken as it is.
        hflip: probability of a horizontal flip.
        photometric: change brightness, contrast, saturation and hue, of photographs.
        interpolation: "bicubic" or "bilinear", always with antialiasing.
        max_pixels: of a mask.
        rotate90, channel_jitter, channel_drop, pixels: as of :class:`itpn.data.augment.PretrainingTransform`.
            Images smaller than a crop are padded with their mean.

    Raises:
        UserError: photometric distortion of what is no photograph.
    """

    table: LabelTable
    size: int = 512
    short: int = 512
    scales: tuple[float, float] = (0.5, 2.0)
    max_fraction: float = 0.75
    hflip: float = 0.5
    photometric: bool = True
    interpolation: str = "bilinear"
    max_pixels: int = MAX_PIXELS
    rotate90: bool = False
    channel_jitter: float = 0.0
    channel_drop: float = 0.0
    pixels: Pixels = PHOTOGRAPHS

    def __post_init__(self) -> None:
        if self.photometric:
            check_photographs(self.pixels, "--data.photometric", "--data.channel-jitter")

    def __call__(self, image: EncodedImage | OpenWindow | Tensor, rng: random.Random, mask: str) -> dict[str, Any]:
        """Augment one image, encoded or [C, H, W], with its mask, given by its path.

        Returns:
            "image" [C, size, size] in the type that is stored, and "target" uint8 [size, size].

        Raises:
            UnreadableImage: the mask cannot be read, or is of another size.
        """
        window = image if isinstance(image, OpenWindow) else None
        image = decode_whole(image)
        pixels, labels = self._resize(image, view_labels(image, self.table, mask, self.max_pixels, window), rng)
        pixels, labels = self._crop(pixels, labels, rng)
        if rng.random() < self.hflip:
            pixels, labels = mirror(pixels), mirror(labels)
        if self.photometric:
            # torchvision draws from the global generator, whose state is restored
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(rng.getrandbits(63))
                pixels = DISTORT(pixels)
        turns = rng.randrange(4) if self.rotate90 else 0  # what is off draws no number
        pixels, labels = turn(pixels, turns), turn(labels, turns)
        channels = draw_channels(self.pixels.type.channels, self.channel_jitter, self.channel_drop, rng)
        pixels = channels.apply(pixels, self.pixels)
        right, below = self.size - labels.shape[-1], self.size - labels.shape[-2]
        pixels = pad_pixels(pixels, right, below, self.pixels.stored_mean, self.pixels.nodata)
        labels = pad(labels, [0, 0, right, below], fill=IGNORED)
        return {"image": pixels.contiguous(), "target": labels[0]}

    def _resize(self, image: Tensor, labels: Tensor, rng: random.Random) -> tuple[Tensor, Tensor]:
        short = rng.uniform(*self.scales) * self.short
        sides = fit_sides(image.shape[-2:], short, 4 * short)
        # the pixel nearest to the centre; torchvision would take its neighbour for a Mask
        nearest = resize(labels[None], sides, v2.InterpolationMode.NEAREST_EXACT)
        return resize_pixels(image, sides, self.interpolation, self.pixels.nodata), nearest

    def _crop(self, image: Tensor, labels: Tensor, rng: random.Random) -> tuple[Tensor, Tensor]:
        height, width = image.shape[-2:]
        rows, columns = min(self.size, height), min(self.size, width)
        for _ in range(CROP_TRIES if self.max_fraction < 1 else 1):
            top, left = rng.randint(0, height - rows), rng.randint(0, width - columns)
            part = crop(labels, top, left, rows, columns)
            counts = part.flatten().bincount(minlength=IGNORED + 1)[:IGNORED]
            if len(counts.nonzero()) > 1 and counts.max() < self.max_fraction * counts.sum():
                break
        return crop(image, top, left, rows, columns), part


def view_labels(
    image: Tensor, table: LabelTable, mask: str, max_pixels: int = MAX_PIXELS, window: OpenWindow | None = None
) -> Tensor:
    """The mask of an image, uint8 [H, W].

    Args:
        mask: path; of the whole image.
        window: that the image is; None for a whole image.

    Raises:
        UnreadableImage: it cannot be read, or is of another size.
    """
    if window is None:
        labels = table.read(mask, max_pixels)
        check_same_size(mask, labels.shape[-2:], image.shape[-2:])
        return labels
    file = open_mask(mask, max_pixels)
    check_same_size(mask, (file.height, file.width), (window.image.height, window.image.width))
    return table.read_window(file, (window.top, window.left, window.height, window.width))


def check_same_size(mask: str, size: Sequence[int], image: Sequence[int]) -> None:
    """Raise :class:`UnreadableImage` for a mask of another height and width than its image."""
    if tuple(size) != tuple(image):
        raise UnreadableImage(f"{image[1]}x{image[0]} pixels, and {size[1]}x{size[0]} in {mask}")
