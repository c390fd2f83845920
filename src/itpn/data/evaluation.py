"""Every image of a data set exactly once, in batches that do not depend on the number of processes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from itpn.data.augment import EvaluationTransform
from itpn.data.batches import Batch, View, stack
from itpn.data.decode import UnreadableImage
from itpn.data.readers import Reader
from itpn.data.samples import MixedImages, Sample, open_for_tiles, open_sample
from itpn.data.skipped import none_readable
from itpn.data.stored import PLAIN, ReadSettings
from itpn.data.workers import WorkerLoader, beat

MakeView = Callable[[Tensor, Any], View]  # of an image and its annotation


def view_labelled(transform: EvaluationTransform, image: Tensor, label: int) -> View:
    """A crop and its class index."""
    return {"image": transform(image), "label": torch.tensor(label)}


def read_some(
    images: Reader, count: int, reading: ReadSettings = PLAIN, decode: Callable[[Sample], Tensor] | None = None
) -> list[tuple[int, Tensor]]:
    """Readable images, evenly spaced over a data set, with their indices.

    Args:
        decode: the pixels of an image whose header has been read, or of a part of it; None for all of them.

    Raises:
        UserError: no image can be read.
        MachineError: because the file system fails.
    """
    found: list[tuple[int, Tensor]] = []
    first: tuple[str, str] | None = None
    stride = max(1, len(images) // count)
    for index in dict.fromkeys([*range(0, len(images), stride), *range(len(images))]):
        if len(found) == count:
            break
        try:
            name, data, *_ = images[index]
            if decode is None:
                found.append((index, open_sample(data, reading, name).decode()))
            else:
                found.append((index, decode(open_for_tiles(data, reading, name))))
        except UnreadableImage as error:
            first = first or (name, str(error))
    if not found:
        raise none_readable("the images to evaluate on", first)
    return found


@dataclass(frozen=True)
class EvaluationBatches(Dataset[dict[str, Any]]):
    """Batch number -> collated views, "index" int64 [n], "corrupt" and "warnings", as of `TrainingLoader`.

    n is ``batch_size``, or less in the last batch and where images are corrupt or large. Where n is 0, there are no
    views: neither "image" nor any other key of theirs.

    Attributes:
        is_large: whether an image, of which the header has been read, is not to be decoded: its index is in "large".
            None where all are decoded.
    """

    images: Reader
    view: MakeView
    collate: Callable[[list[View]], Batch]
    batch_size: int
    reading: ReadSettings
    is_large: Callable[[Sample], bool] | None = None

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __getitem__(self, number: int) -> dict[str, Any]:
        views, indices, large, corrupt = [], [], [], []
        open_it = open_sample if self.is_large is None else open_for_tiles
        warnings: dict[str, tuple[str, str]] = {}
        for index in range(number * self.batch_size, min((number + 1) * self.batch_size, len(self.images))):
            name, data, annotation = self.images[index]
            beat()
            try:
                image = open_it(data, self.reading, name)
                if self.is_large is not None and self.is_large(image):
                    large.append(index)
                    continue
                views.append(self.view(image.decode(), annotation))
            except UnreadableImage as error:
                corrupt.append((name, str(error)))
                continue
            except MixedImages as error:  # a worker process would print it with a traceback
                return {"error": str(error)}
            indices.append(index)
            for kind, warning in image.warnings.items():
                warnings.setdefault(kind, (name, warning))
        batch = self.collate(views) if views else {}
        seen = {"index": torch.tensor(indices, dtype=torch.int64), "large": large, "corrupt": corrupt}
        return {**batch, **seen, "warnings": warnings}


def make_evaluation_loader(
    images: Reader,
    view: MakeView,
    batch_size: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    reading: ReadSettings = PLAIN,
    collate: Callable[[list[View]], Batch] = stack,
    is_large: Callable[[Sample], bool] | None = None,
) -> DataLoader[dict[str, Any]]:
    """Ranks take whole batches in turn, so that the images of a batch do not depend on ``world_size``."""
    batches = EvaluationBatches(images, view, collate, batch_size, reading, is_large)
    return WorkerLoader(
        batches,
        range(rank, len(batches), world_size),
        min(num_workers, len(batches)),
        f"the images to evaluate on ({images.name(0)}, ...)" if len(images) else "the images to evaluate on",
        pin_memory=torch.cuda.is_available(),
    )
