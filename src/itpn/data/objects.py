"""Images with objects: boxes, classes and masks, stored and as training targets."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from torch import Tensor
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from itpn.data.augment import draw_channels
from itpn.data.decode import EncodedImage, UnreadableImage, decode_whole
from itpn.data.image_type import PHOTOGRAPHS, Pixels
from itpn.data.pixels import mirror, resize_pixels, turn
from itpn.data.readers import PackedStrings, Reader, Subset
from itpn.errors import UserError
from itpn.geometry import fit_sides

CROP_SIDES = (0.5, 0.625, 0.75)  # of the size: 400, 500 and 600 of 800
CROP_RANGE = (0.48, 0.75)  # 384 to 600
SCALES = 11  # short sides: 480, 512, ... 800
FAR = 10  # sides of the image: a polygon further outside is invalid
MAX_PERIMETER = 2**24  # pixels of a polygon's edges: drawing takes 40 bytes for each
MIN_SIDE = 1.0  # pixels: objects whose box is smaller after a crop are dropped


@dataclass(frozen=True)
class DetectionImages:
    """Images in a fixed order, each with its objects.

    Attributes:
        files: the encoded images.
        objects: a JSON list for each, in COCO's form: "bbox" [x, y, width, height], "label" (class index),
            "area", "iscrowd", and "segmentation" where it has one.
        sizes: int64 [n, 2], height and width.
        ids: ids of the images in the annotations, int64 [n].
        classes: names, in the order of their ids.
        class_ids: ids of the classes in the annotations.
    """

    files: Reader
    objects: PackedStrings
    sizes: np.ndarray
    ids: np.ndarray
    classes: tuple[str, ...]
    class_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[str, bytes | UnreadableImage, dict[str, Any]]:
        """Name, encoded image or the error of reading it, and annotation: "id", "size", "objects"."""
        name, data = self.files[index]
        height, width = self.sizes[index].tolist()
        return name, data, {"id": int(self.ids[index]), "size": (height, width), "objects": self.objects_of(index)}

    def name(self, index: int) -> str:
        return self.files.name(index)

    def objects_of(self, index: int) -> list[dict[str, Any]]:
        return json.loads(self.objects[index])

    @property
    def groups(self) -> np.ndarray:
        """int64 [n], 1 for images that are wider than high; a batch has one group, so that little is padded."""
        return (self.sizes[:, 1] > self.sizes[:, 0]).astype(np.int64)

    def take(self, indices: np.ndarray) -> "DetectionImages":
        """Some of the images."""
        objects = PackedStrings([self.objects[index] for index in indices])
        files = Subset(self.files, indices)
        return replace(self, files=files, objects=objects, sizes=self.sizes[indices], ids=self.ids[indices])

    def with_objects(self) -> "DetectionImages":
        """The images that have objects other than crowds."""
        full = [any(not o["iscrowd"] for o in self.objects_of(index)) for index in range(len(self))]
        return self.take(np.flatnonzero(full))

    def most_objects(self) -> tuple[int, str]:
        """The largest number of objects of an image, crowds aside, and its name."""
        counts = [sum(not one["iscrowd"] for one in self.objects_of(index)) for index in range(len(self))]
        return (max(counts), self.name(int(np.argmax(counts)))) if counts else (0, "")

    @cached_property
    def mask_counts(self) -> tuple[int, int]:
        """The number of objects with a mask, and without one."""
        every = ["segmentation" in one for index in range(len(self)) for one in self.objects_of(index)]
        return sum(every), len(every) - sum(every)

    @property
    def has_masks(self) -> bool:
        """Whether any object has a mask."""
        return self.mask_counts[0] > 0

    def with_masks(self) -> "DetectionImages":
        """The same images with only the objects that have a mask."""
        if not self.mask_counts[1]:
            return self
        kept = [[one for one in self.objects_of(index) if "segmentation" in one] for index in range(len(self))]
        return replace(self, objects=PackedStrings([json.dumps(objects) for objects in kept]))

    def rename(self, classes: Sequence[str]) -> "DetectionImages":
        """The same images with the class indices of another list of classes.

        Raises:
            UserError: a class with objects is not in the list.
        """
        if self.classes == tuple(classes):
            return self
        indices = {name: index for index, name in enumerate(classes)}
        ids = dict(zip(self.classes, self.class_ids, strict=True))
        packed = []
        for index in range(len(self)):
            objects = self.objects_of(index)
            for one in objects:
                name = self.classes[one["label"]]
                if name not in indices:
                    raise UserError(
                        f"objects of class {name} in {self.name(index)}, which is not a class of the model: it has "
                        f"{', '.join(list(classes)[:5])}{' ...' if len(classes) > 5 else ''}"
                    )
                one["label"] = indices[name]
            packed.append(json.dumps(objects))
        new_ids = tuple(ids.get(name, -1 - new) for new, name in enumerate(classes))
        return replace(self, objects=PackedStrings(packed), classes=tuple(classes), class_ids=new_ids)


def encode_mask(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """COCO's polygons or run lengths, compressed or not, as compressed run lengths.

    Raises:
        ValueError: it has none of these forms, or is of another image size.
    """
    if isinstance(segmentation, dict):
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"run lengths for {segmentation['size']}")
        if isinstance(segmentation["counts"], str | bytes):
            return segmentation
        if min(segmentation["counts"]) < 0 or sum(segmentation["counts"]) != height * width:
            raise ValueError("run lengths that are not the image's")
        return rle.frPyObjects(segmentation, height, width)
    polygons = [[float(value) for value in polygon] for polygon in segmentation]
    if not polygons or any(len(p) < 6 or len(p) % 2 or not np.isfinite(p).all() for p in polygons):
        raise ValueError("not polygons of three points or more")
    if max(abs(value) for polygon in polygons for value in polygon) > FAR * max(height, width):
        raise ValueError("polygons far outside their image")  # drawing them would exhaust memory
    if sum(_perimeter(polygon) for polygon in polygons) > MAX_PERIMETER:
        raise ValueError(f"polygons with edges of more than {MAX_PERIMETER:,} pixels")
    return rle.merge(rle.frPyObjects(polygons, height, width))


def _perimeter(polygon: list[float]) -> float:
    points = np.array(polygon).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())


def draw_masks(objects: Sequence[dict[str, Any]], height: int, width: int) -> Tensor:
    """Masks of objects, uint8 [n, height, width]."""
    if not objects:
        return torch.zeros(0, height, width, dtype=torch.uint8)
    encoded = [encode_mask(one["segmentation"], height, width) for one in objects]
    return torch.from_numpy(np.ascontiguousarray(rle.decode(encoded).transpose(2, 0, 1)))


def make_target(annotation: dict[str, Any], masks: bool) -> dict[str, Tensor]:
    """The objects of an image in the form of torchvision's detectors; crowds are left out.

    Args:
        annotation: "objects" and "size", see :class:`DetectionImages`.

    Returns:
        "boxes" float32 [n, 4] as x0, y0, x1, y1, "labels" int64 [n] from 1, "masks" uint8 [n, H, W] if wanted.
    """
    height, width = annotation["size"]
    objects = [one for one in annotation["objects"] if not one["iscrowd"]]
    boxes = torch.tensor([one["bbox"] for one in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    target = {"boxes": boxes, "labels": torch.tensor([1 + one["label"] for one in objects], dtype=torch.int64)}
    return target | ({"masks": draw_masks(objects, height, width)} if masks else {})


# --- augmentation of images together with their boxes and masks


@dataclass(frozen=True)
class DetectionTransform:
    """Multi-scale training with random crops and flips, as published for Mask R-CNN on transformers (DETR's recipe).

    Args:
        size: largest short side in pixels.
        longest: longest side.
        scales: smallest and largest short side, as fractions of ``size``.
        crop_prob: fraction of the images that are resized and cropped first.
        large_scale_jitter: instead, factors of a square of ``size`` to resize to before a crop of ``size`` (Ghiasi et
            al. 2021).
        hflip: probability of a horizontal flip.
        interpolation: "bicubic" or "bilinear", always with antialiasing.
        masks: whether targets have masks.
        rotate90, channel_jitter, channel_drop, pixels: as of :class:`itpn.data.augment.PretrainingTransform`.
    """

    size: int = 800
    longest: int = 1333
    scales: tuple[float, float] = (0.6, 1.0)
    crop_prob: float = 0.5
    large_scale_jitter: tuple[float, float] | None = None
    hflip: float = 0.5
    interpolation: str = "bilinear"
    masks: bool = True
    rotate90: bool = False
    channel_jitter: float = 0.0
    channel_drop: float = 0.0
    pixels: Pixels = PHOTOGRAPHS

    def __call__(self, image: EncodedImage | Tensor, rng: random.Random, annotation: dict[str, Any]) -> dict[str, Any]:
        """Augment one image, encoded or [C, any, any], with its annotation.

        Returns:
            "image" [C, any, any] in the type that is stored, and "target", see :func:`make_target`; objects outside the
            crop are left out.

        Raises:
            UnreadableImage: the image has another size than its annotation.
        """
        image = decode_whole(image)
        check_size(image.shape[-2:], annotation)
        target = make_target(annotation, self.masks)
        if self.large_scale_jitter is not None:
            height, width = image.shape[-2:]
            factor = rng.uniform(*self.large_scale_jitter) * self.size / max(height, width)
            image, target = self._resize(image, target, max(1, round(height * factor)), max(1, round(width * factor)))
            sides = min(self.size, image.shape[-2]), min(self.size, image.shape[-1])
            image, target = _crop(image, target, sides, rng)
        else:
            if rng.random() < self.crop_prob:
                side = rng.choice(CROP_SIDES) * self.size
                image, target = self._resize(image, target, *fit_sides(image.shape[-2:], side, math.inf))
                low, high = (round(fraction * self.size) for fraction in CROP_RANGE)
                rows, cols = (rng.randint(min(whole, low), min(whole, high)) for whole in image.shape[-2:])
                image, target = _crop(image, target, (rows, cols), rng)
            smallest, largest = self.scales
            fraction = smallest + (largest - smallest) * rng.randrange(SCALES) / (SCALES - 1)
            image, target = self._resize(
                image, target, *fit_sides(image.shape[-2:], fraction * self.size, self.longest)
            )
        if rng.random() < self.hflip:
            width = image.shape[-1]
            image = mirror(image)
            target["boxes"][:, [0, 2]] = width - target["boxes"][:, [2, 0]]
            if self.masks:
                target["masks"] = target["masks"].flip(-1)
        if self.rotate90:  # what is off draws no number
            image, target = _turn(image, target, rng.randrange(4))
        channels = draw_channels(self.pixels.type.channels, self.channel_jitter, self.channel_drop, rng)
        return {"image": channels.apply(image, self.pixels).contiguous(), "target": _drop_lost(target)}

    def magnify(self, height: int, width: int) -> float:
        """The largest factor by which an image may be resized."""
        if self.large_scale_jitter is not None:
            return max(self.large_scale_jitter) * self.size / max(height, width)
        short, largest = min(height, width), self.scales[1]
        whole = min(largest * self.size / short, self.longest / max(height, width))
        # a crop is resized twice: before and after
        return max(whole, CROP_SIDES[-1] * self.size / short * largest / CROP_RANGE[0]) if self.crop_prob else whole

    def count_lost(self, images: DetectionImages) -> int:
        """The number of objects that are always dropped: smaller than a pixel even at the largest scale."""
        lost = 0
        for index, (height, width) in enumerate(images.sizes.tolist()):
            smallest = MIN_SIDE / self.magnify(height, width)
            lost += sum(not o["iscrowd"] and min(o["bbox"][2:]) < smallest for o in images.objects_of(index))
        return lost

    def _resize(
        self, image: Tensor, target: dict[str, Tensor], height: int, width: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        scale = torch.tensor([width / image.shape[-1], height / image.shape[-2]]).repeat(2)
        image = resize_pixels(image, (height, width), self.interpolation, self.pixels.nodata)
        target = {**target, "boxes": target["boxes"] * scale}
        if self.masks:
            target["masks"] = resize(target["masks"], [height, width], InterpolationMode.NEAREST_EXACT)
        return image, target


def check_size(size: Sequence[int], annotation: dict[str, Any]) -> None:
    """Raise :class:`UnreadableImage` if the annotation is of another size (height, width) than its image."""
    (height, width), stated = size, annotation["size"]
    if (height, width) != stated:
        hint = "; if EXIF rotates the image, they must be of the rotated one" * ((width, height) == stated)
        raise UnreadableImage(f"{width}x{height} pixels, and {stated[1]}x{stated[0]} in the annotations{hint}")


def _crop(
    image: Tensor, target: dict[str, Tensor], sides: tuple[int, int], rng: random.Random
) -> tuple[Tensor, dict[str, Tensor]]:
    top, left = (rng.randint(0, whole - side) for whole, side in zip(image.shape[-2:], sides, strict=True))
    height, width = sides
    boxes = target["boxes"] - torch.tensor([float(left), top, left, top])
    target = {**target, "boxes": clip_boxes_to_image(boxes, sides)}
    if "masks" in target:
        target["masks"] = target["masks"][:, top : top + height, left : left + width]
    return image[:, top : top + height, left : left + width], target


def _turn(image: Tensor, target: dict[str, Tensor], quarters: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Rotate counterclockwise: what was right is above."""
    target = dict(target)
    width, height = image.shape[-1], image.shape[-2]
    for _ in range(quarters):
        x0, y0, x1, y1 = target["boxes"].unbind(dim=1)
        target["boxes"] = torch.stack((y0, width - x1, y1, width - x0), dim=1)
        width, height = height, width
    if "masks" in target:
        target["masks"] = turn(target["masks"], quarters)
    return turn(image, quarters), target


def _drop_lost(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop objects of which no pixel is visible."""
    sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
    keep = (sides >= MIN_SIDE).all(dim=1)
    if "masks" in target:
        keep &= (target["masks"].flatten(1) > 0).any(dim=1)
    return {name: value[keep].contiguous() for name, value in target.items()}
