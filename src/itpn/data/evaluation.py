"""Every image of a set exactly once, in batches that do not depend on how many processes share them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from itpn.data.augment import EvaluationTransform
from itpn.data.decode import MAX_PIXELS, UnreadableImage, decode_sample, open_sample
from itpn.data.loader import Batch, View, stack
from itpn.data.readers import Reader
from itpn.data.workers import WorkerLoader, beat
from itpn.errors import UserError

MakeView = Callable[[Tensor, Any], View]  # of an image and what is known of it


def view_labelled(transform: EvaluationTransform, image: Tensor, label: int) -> View:
    """A crop and its class."""
    return {"image": transform(image), "label": torch.tensor(label)}


def read_some(images: Reader, count: int, max_pixels: int = MAX_PIXELS) -> list[tuple[int, Tensor]]:
    """Readable images from all over a set, with their numbers in it.

    Raises:
        UserError: not one can be read.
    """
    found: list[tuple[int, Tensor]] = []
    reason = ""
    stride = max(1, len(images) // count)
    for index in dict.fromkeys([*range(0, len(images), stride), *range(len(images))]):
        if len(found) == count:
            break
        try:
            found.append((index, decode_sample(images[index][1], max_pixels)))
        except UnreadableImage as error:
            reason = reason or f"; the first is {images.name(index)}: {error}"
    if not found:
        raise UserError(f"none of the images to evaluate on can be read{reason}")
    return found


class EvaluationBatches(Dataset[dict[str, Any]]):
    """Batch number -> what the views hold, collated, "index" int64 [n], "broken" [(name, reason)] and "remarks".

    "remarks" is (name, remark) by kind, of the first image that needs one of each kind (see `EncodedImage`).

    n is ``batch_size``, less in the last batch and where images cannot be read; without any, "image" is None.
    """

    def __init__(
        self, images: Reader, view: MakeView, collate: Callable[[list[View]], Batch], batch_size: int, max_pixels: int
    ) -> None:
        self.images = images
        self.view = view
        self.collate = collate
        self.batch_size = batch_size
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __getitem__(self, number: int) -> dict[str, Any]:
        views, indices, broken = [], [], []
        remarks: dict[str, tuple[str, str]] = {}
        for place in range(number * self.batch_size, min((number + 1) * self.batch_size, len(self.images))):
            name, data, known = self.images[place]
            beat()
            try:
                image = open_sample(data, self.max_pixels)
                views.append(self.view(image.decode(), known))
            except UnreadableImage as error:
                broken.append((name, str(error)))
                continue
            indices.append(place)
            for kind, remark in image.remarks.items():
                remarks.setdefault(kind, (name, remark))
        batch = self.collate(views) if views else {"image": None}
        index = torch.tensor(np.array(indices, dtype=np.int64))
        return {**batch, "index": index, "broken": broken, "remarks": remarks}


def make_evaluation_loader(
    images: Reader,
    view: MakeView,
    batch_size: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    max_pixels: int = MAX_PIXELS,
    collate: Callable[[list[View]], Batch] = stack,
) -> DataLoader[dict[str, Any]]:
    """Whole batches are shared out in turn, so that an image meets the same others whoever computes it."""
    batches = EvaluationBatches(images, view, collate, batch_size, max_pixels)
    return WorkerLoader(
        batches,
        range(rank, len(batches), world_size),
        min(num_workers, len(batches)),
        f"the images to evaluate on ({images.name(0)}, ...)" if len(images) else "the images to evaluate on",
        pin_memory=torch.cuda.is_available(),
    )
