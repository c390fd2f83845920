"""Training batches as one endless stream: batch number n is the same whenever and wherever it is made.

A resumed run therefore equals an uninterrupted one: it starts the stream at another number. The worker processes stay
alive and prefetch across the ends of epochs.
"""

import functools
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator

import torch

from itpn.data.batches import (
    AnyBatch,
    Batch,
    BatchPlan,
    CachedBatches,
    FileBatches,
    ShardBatches,
    Transform,
    UnreadableBatch,
    View,
    stack,
)
from itpn.data.cache import FeatureCache
from itpn.data.file_types import describe_unread
from itpn.data.files import ImageSource
from itpn.data.readers import FileReader, Reader
from itpn.data.shards import count_shard_images
from itpn.data.skipped import nothing_readable
from itpn.data.stored import PLAIN, ReadSettings
from itpn.data.workers import WorkerLoader
from itpn.errors import UserError


class TrainingLoader:
    """Endless batches of augmented images, in epochs of ``len(loader)`` batches.

    Iterating yields the rest of the current epoch; iterating again yields the next epoch. A batch is a dict:

    - what the transform makes of the images: "image" [batch_size, C, H, W], "teacher_image", "label", ...
    - "key": the names of the images.
    - "corrupt": (name, reason) of each file that could not be read while the batch was made. The next readable image
      replaces it, so that batches keep their size.
    - "warnings": kind -> (name, warning), for the first image that has a warning of this kind (see `EncodedImage`).

    Batches depend on the seed, ``rank`` and ``world_size``, with shards without labels also on ``num_workers``, and on
    nothing else.

    Files: an epoch has every image at most once over all ranks. Images that do not fill a batch on every rank are left
    out. If the data set has groups (wide and high images), a batch has images of one group. If there are fewer images
    than one batch on every rank, they make one smaller batch. Shards: each worker process reads its own shards, and
    repeats them if an epoch needs more.

    Args:
        source: from `find_images`, or images with labels or objects from `find_labelled` or `find_objects`.
        transform: maps (image of `open_sample`, random.Random, annotation if any) to a dict, see
            `PretrainingTransform`.
        batch_size: images in a batch of this rank.
        num_workers: worker processes; 0 reads in this process and leaves torch's global random state alone.
        rank, world_size: of this process among those that train together.
        reading: how images are read; those too large count as corrupt, those of another type end the run.
        shuffle_buffer: encoded images that each worker process keeps to shuffle those of shards.
        samples_per_epoch: images in an epoch over all ranks, for shards only; counted when None.
        collate: makes a batch of what the transform returns.
        finish_batch: see :meth:`finish`.

    Raises:
        UserError: the shards hold no image; later, while iterating, no readable image was found, or one of
            another type.

    Attributes:
        images: images in one pass over the data, over all ranks.
        wait_seconds: how long the caller has waited for batches so far.
    """

    def __init__(  # more than eight parameters: those of the data, of torch's DataLoader and of the processes
        self,
        source: ImageSource | Reader,
        transform: Transform,
        *,
        batch_size: int,
        num_workers: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        reading: ReadSettings = PLAIN,
        shuffle_buffer: int = 1000,
        samples_per_epoch: int | None = None,
        pin_memory: bool = False,
        collate: Callable[[list[View]], Batch] = stack,
        finish_batch: Callable[[Batch, torch.device], Batch] | None = None,
    ) -> None:
        self.images, make_batches = _open(source, shuffle_buffer, samples_per_epoch)
        plan = BatchPlan(
            batch_size=min(batch_size, math.ceil(self.images / world_size)),
            batches=max(1, self.images // (batch_size * world_size)),
            rank=rank,
            world_size=world_size,
            seed=seed,
            reading=reading,
            transform=transform,
            collate=collate,
        )
        self._batches = make_batches(plan)
        self._length = plan.batches
        self._finish_batch = finish_batch
        self._num_workers = num_workers
        self._where = ", ".join(source.roots) if isinstance(source, ImageSource) and source.roots else "the data"
        self._pin_memory = pin_memory
        self._position = 0  # batches handed out since the first epoch
        self._stream: Generator[AnyBatch, None, None] | None = None
        self.wait_seconds = 0.0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        end = (self._position // self._length + 1) * self._length
        while self._position < end:
            yield self._next_batch()

    def finish(self, batch: Batch, device: torch.device) -> Batch:
        """Do on ``device`` what the worker processes have left to it, as GPU decoding does; by default nothing."""
        return batch if self._finish_batch is None else self._finish_batch(batch, device)

    def state_dict(self) -> dict[str, int]:
        epoch, batch = divmod(self._position, self._length)
        return {"epoch": epoch, "batch": batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        # An epoch may be shorter than before, if the data or the batch size have changed.
        self._position = state_dict["epoch"] * self._length + min(state_dict["batch"], self._length)
        self.close()

    def close(self) -> None:
        """End the worker processes; iterating again starts new ones where the stream stopped."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def _next_batch(self) -> Batch:
        start = time.perf_counter()
        if self._stream is None:
            self._stream = self._start_stream()
        batch = next(self._stream)
        self.wait_seconds += time.perf_counter() - start
        if isinstance(batch, UnreadableBatch):
            self.close()
            raise UserError(batch.error) if batch.error else nothing_readable(batch.corrupt)
        self._position += 1
        return batch

    def _start_stream(self) -> Generator[AnyBatch, None, None]:
        numbers = None
        if isinstance(self._batches, ShardBatches):
            self._batches.start = self._position
        else:
            numbers = itertools.count(self._position)
        return iter(WorkerLoader(self._batches, numbers, self._num_workers, self._where, self._pin_memory))


def _open(
    source: ImageSource | Reader, shuffle_buffer: int, samples_per_epoch: int | None
) -> tuple[int, Callable[[BatchPlan], FileBatches | ShardBatches | CachedBatches]]:
    """The number of images in a source, and what makes its batches."""
    if not isinstance(source, ImageSource):
        return len(source), functools.partial(FileBatches, source)
    if source.cache:
        cache = FeatureCache(source.cache)
        return cache.index.images, functools.partial(CachedBatches, cache)
    if source.images:
        return len(source.images), functools.partial(FileBatches, FileReader(source.images))
    unread = Counter[str]()
    images = samples_per_epoch or count_shard_images(source.shards, source.members, unread)
    if images == 0:
        what = describe_unread(unread) or "is each an intact tar of images?"
        raise UserError(f"no images in the shards ({source.shards[0]} ...): {what}")
    return images, lambda plan: ShardBatches(source.shards, plan, shuffle_buffer, source.members)
