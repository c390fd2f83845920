"""Every image of a labelled set exactly once, in batches that do not depend on how many processes share them."""

import math
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from itpn.data.augment import EvaluationTransform
from itpn.data.decode import MAX_PIXELS, UnreadableImage, decode_sample
from itpn.data.labelled import LabelledImages
from itpn.data.loader import start_worker


class EvaluationBatches(Dataset[dict[str, Any]]):
    """Batch number -> "image" uint8 [n, 3, H, W], "label" and "index" int64 [n], "broken" [(name, reason)].

    n is ``batch_size``, less in the last batch and where images cannot be read.
    """

    def __init__(
        self, images: LabelledImages, transform: EvaluationTransform, batch_size: int, max_pixels: int
    ) -> None:
        self.images = images
        self.transform = transform
        self.batch_size = batch_size
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __getitem__(self, number: int) -> dict[str, Any]:
        pixels, labels, indices, broken = [], [], [], []
        for index in range(number * self.batch_size, min((number + 1) * self.batch_size, len(self.images))):
            name, data, label = self.images[index]
            try:
                pixels.append(self.transform(decode_sample(data, self.max_pixels)))
            except UnreadableImage as error:
                broken.append((name, str(error)))
                continue
            labels.append(label)
            indices.append(index)
        return {
            "image": torch.stack(pixels) if pixels else None,
            "label": torch.tensor(np.array(labels, dtype=np.int64)),
            "index": torch.tensor(np.array(indices, dtype=np.int64)),
            "broken": broken,
        }


def make_evaluation_loader(
    images: LabelledImages,
    transform: EvaluationTransform,
    batch_size: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    max_pixels: int = MAX_PIXELS,
) -> DataLoader[dict[str, Any]]:
    """Whole batches are shared out in turn, so that an image meets the same others whoever computes it."""
    batches = EvaluationBatches(images, transform, batch_size, max_pixels)
    return DataLoader(
        batches,
        sampler=range(rank, len(batches), world_size),
        batch_size=None,
        num_workers=min(num_workers, len(batches)),
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # or else the loader draws a number from the global one
        pin_memory=torch.cuda.is_available(),
    )
