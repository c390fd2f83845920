"""Batches to train on as one endless stream: batch number n is the same whenever and wherever it is made.

That is what makes a resumed run equal an uninterrupted one: resuming starts the stream at another number. It
also keeps the workers alive and prefetching over the ends of epochs.
"""

import itertools
import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from itpn.data.cache import FeatureCache
from itpn.data.decode import MAX_PIXELS, UnreadableImage, open_sample
from itpn.data.files import ImageSource, describe_unread
from itpn.data.readers import FileReader, Reader, remedy_of_loss
from itpn.data.shards import Sample, count_shard_images, shard_samples
from itpn.data.workers import WorkerLoader, beat
from itpn.errors import MachineError, UserError
from itpn.seeding import derive_seed
from itpn.system.text import one_line

View = dict[str, Any]
Transform = Callable[..., View]  # of an image, its random numbers, and what is known of it
Batch = dict[str, Any]


def stack(views: list[View]) -> Batch:
    """Tensors of the same size, along a new first axis."""
    return {name: torch.stack([view[name] for view in views]) for name in views[0]}


def collect(views: list[View]) -> Batch:
    """Lists, of what has a size of its own."""
    return {name: [view[name] for view in views] for name in views[0]}


MAX_SPARES = 1000  # so many broken files in a row, and the data cannot be what was meant


class TrainingLoader:
    """Batches of augmented images, without end, in epochs of ``len(loader)`` batches.

    Iterating yields what is left of the current epoch, and the next time the next epoch. A batch is a dict: what the
    transform makes of the images ("image" uint8 [batch_size, 3, H, W], "teacher_image", "label"), "key" the images'
    names, "broken" a list of (name, reason) for each file that could not be read while it was made, "remarks" (name,
    remark) by kind, of the first image that needs one of each kind (see `EncodedImage`). A broken file's place is taken
    by the next readable one, so that batches keep their size. The batches depend on the seed, on ``rank`` and
    ``world_size``, and with shards that are not labelled on ``num_workers``, and on nothing else.

    Of files, each epoch has every image at most once over all ranks; what does not fill a batch on every rank is
    left out. Images that come in groups (of wide and of high ones) are batched with their like. Fewer images than one
    batch on every rank make one smaller batch. Of shards, each worker reads its own, and what it lacks at the end of an
    epoch it reads again.

    Args:
        source: from `find_images`, or images with labels or objects from `find_labelled` or `find_objects`.
        transform: maps (`EncodedImage`, random.Random, what is known of the image) to a dict, see
            `PretrainingTransform`.
        batch_size: images in a batch of this rank.
        num_workers: processes that read; 0 reads in this one, and leaves torch's global random numbers alone.
        rank, world_size: this process among those that train together.
        max_pixels: larger images count as broken.
        shuffle_buffer: undecoded images that each worker keeps to shuffle a shard's.
        samples_per_epoch: images in an epoch over all ranks, for shards only; counted when None.
        collate: makes a batch of what the transform returns.

    Raises:
        UserError: the shards hold no image; later, while iterating, no readable image was found.

    Attributes:
        images: images in an epoch's worth of data, over all ranks.
        transform: as given.
        wait_seconds: how long the caller has waited for batches so far.
    """

    def __init__(
        self,
        source: ImageSource | Reader,
        transform: Transform,
        *,
        batch_size: int,
        num_workers: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        max_pixels: int = MAX_PIXELS,
        shuffle_buffer: int = 1000,
        samples_per_epoch: int | None = None,
        pin_memory: bool = False,
        collate: Callable[[list[View]], Batch] = stack,
    ) -> None:
        cache: FeatureCache | None = None
        files: Reader | None = None
        if not isinstance(source, ImageSource):
            files = source
        elif source.cache:
            cache = FeatureCache(source.cache)
        elif source.images:
            files = FileReader(source.images)
        if cache is not None:
            self.images = cache.index.images
        elif files is not None:
            self.images = len(files)
        else:
            assert isinstance(source, ImageSource)
            unread = Counter[str]()
            self.images = samples_per_epoch or count_shard_images(source.shards, source.members, unread)
            if self.images == 0:
                what = describe_unread(unread) or "is each an intact tar of images?"
                raise UserError(f"no images in the shards ({source.shards[0]} ...): {what}")
        plan = _Plan(
            batch_size=min(batch_size, math.ceil(self.images / world_size)),
            batches=max(1, self.images // (batch_size * world_size)),
            rank=rank,
            world_size=world_size,
            seed=seed,
            max_pixels=max_pixels,
            transform=transform,
            collate=collate,
        )
        self.transform = transform
        self._length = plan.batches
        self._batches: _FileBatches | _ShardBatches | _CachedBatches
        if cache is not None:
            self._batches = _CachedBatches(cache, plan)
        elif files is not None:
            self._batches = _FileBatches(files, plan)
        else:
            assert isinstance(source, ImageSource)
            self._batches = _ShardBatches(source.shards, plan, shuffle_buffer, source.members)
        self._num_workers = num_workers
        self._where = ", ".join(source.roots) if isinstance(source, ImageSource) and source.roots else "the data"
        self._pin_memory = pin_memory
        self._position = 0  # batches handed out since the first epoch
        self._stream: Generator[Batch, None, None] | None = None
        self.wait_seconds = 0.0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        end = (self._position // self._length + 1) * self._length
        while self._position < end:
            yield self._next_batch()

    def state_dict(self) -> dict[str, int]:
        epoch, batch = divmod(self._position, self._length)
        return {"epoch": epoch, "batch": batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        # Where the data or the batch size has changed since, an epoch may have become shorter.
        self._position = state_dict["epoch"] * self._length + min(state_dict["batch"], self._length)
        self.close()

    def close(self) -> None:
        """End the workers; iterating again starts new ones where the stream stopped."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def _next_batch(self) -> Batch:
        start = time.perf_counter()
        if self._stream is None:
            self._stream = self._start_stream()
        batch = next(self._stream)
        self.wait_seconds += time.perf_counter() - start
        if batch["image"] is None:
            self.close()
            if "error" in batch:
                raise UserError(batch["error"])
            raise nothing_readable(batch["broken"])
        self._position += 1
        return batch

    def _start_stream(self) -> Generator[Batch, None, None]:
        numbers = None
        if isinstance(self._batches, _ShardBatches):
            self._batches.start = self._position
        else:
            numbers = itertools.count(self._position)
        return iter(WorkerLoader(self._batches, numbers, self._num_workers, self._where, self._pin_memory))


@dataclass(frozen=True)
class _Plan:
    """How an epoch is cut into batches, and how a batch is made."""

    batch_size: int  # of this rank, no more than its share of the images
    batches: int  # an epoch, the same on every rank
    rank: int
    world_size: int
    seed: int
    max_pixels: int
    transform: Transform
    collate: Callable[[list[View]], Batch]

    def rng(self, *sample: int | str) -> random.Random:
        """The random numbers of a sample, given by its epoch and its place or name."""
        return random.Random(derive_seed(self.seed, *sample))

    def places(self, batch: int) -> range:
        """The places of this rank's samples in an epoch's order: ranks take turns."""
        begin = batch * self.batch_size * self.world_size + self.rank
        return range(begin, begin + self.batch_size * self.world_size, self.world_size)

    def make_batch(self, samples: Iterable[tuple[Sample, random.Random]], spares: Iterator[Sample]) -> Batch:
        """Decode and augment some samples, each with its own random numbers; spares stand in for broken ones."""
        views: list[View] = []
        keys: list[str] = []
        broken: list[tuple[str, str]] = []
        remarks: dict[str, tuple[str, str]] = {}
        for sample, rng in samples:
            known: list[Any]
            for key, data, *known in itertools.chain([sample], spares):
                beat()
                try:
                    image = open_sample(data, self.max_pixels)
                    view = self.transform(image, rng, *known)
                except UnreadableImage as error:
                    broken.append((key, str(error)))
                    continue
                views.append(view)
                keys.append(key)
                for kind, remark in image.remarks.items():
                    remarks.setdefault(kind, (key, remark))
                break
            else:
                return {"image": None, "key": [], "broken": broken}
        return {**self.collate(views), "key": keys, "broken": broken, "remarks": remarks}


class _EpochOrder:
    """The order of samples in an epoch, drawn anew for each.

    Args:
        groups: int64 [samples]; samples of a group come together, ``batch`` at a time, those left over at the end.
    """

    def __init__(self, samples: int, seed: int, groups: np.ndarray | None = None, batch: int = 1) -> None:
        self._samples = samples
        self._seed = seed
        self._groups = groups
        self._batch = batch
        self._order = np.empty(0, dtype=np.int64)
        self._epoch = -1

    def __call__(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            rng = np.random.default_rng(derive_seed(self._seed, epoch, "order"))
            self._order = rng.permutation(self._samples)
            if self._groups is not None:
                self._order = self._sort(self._order, rng)
            self._epoch = epoch
        return self._order

    def _sort(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        assert self._groups is not None
        whole, left = [], []
        for group in np.unique(self._groups):
            members = order[self._groups[order] == group]
            end = len(members) // self._batch * self._batch
            whole += np.split(members[:end], end // self._batch) if end else []
            left.append(members[end:])
        return np.concatenate([*(whole[i] for i in rng.permutation(len(whole))), *left])


class _FileBatches(Dataset[Batch]):
    """Batch number -> batch, from single files."""

    def __init__(self, files: Reader, plan: _Plan) -> None:
        self.files = files
        self.plan = plan
        groups = getattr(files, "groups", None)
        self._order = _EpochOrder(len(files), plan.seed, groups, plan.batch_size * plan.world_size)

    def __getitem__(self, number: int) -> Batch:
        plan = self.plan
        epoch, batch = divmod(number, plan.batches)
        order = self._order(epoch)
        mine = plan.places(batch)
        indices = (int(order[place % len(order)]) for place in mine)
        samples = ((self.files[index], plan.rng(epoch, index)) for index in indices)
        others = range(mine.stop, mine.stop + min(len(order), MAX_SPARES))
        spares = (self.files[int(order[place % len(order)])] for place in others)
        return plan.make_batch(samples, spares)


class _CachedBatches(Dataset[Batch]):
    """Batch number -> batch of crops and features, as they were cached."""

    def __init__(self, cache: FeatureCache, plan: _Plan) -> None:
        self.cache = cache
        self.plan = plan
        self._order = _EpochOrder(cache.index.images, plan.seed)

    def __getitem__(self, number: int) -> Batch:
        plan = self.plan
        epoch, batch = divmod(number, plan.batches)
        order = self._order(epoch)
        first = epoch % self.cache.index.views * len(order)  # an epoch sees each image once, in the next of its views
        numbers = [first + int(order[place % len(order)]) for place in plan.places(batch)]
        try:
            images, features, keys = zip(*(self.cache[number] for number in numbers), strict=True)
        except UserError as error:  # from a worker it would come as a traceback
            return {"image": None, "error": str(error)}
        views = {"image": torch.stack(images), "feature": torch.stack(features)}
        return {**views, "key": list(keys), "broken": [], "remarks": {}}


class _ShardBatches(IterableDataset[Batch]):
    """The batches of one worker, from tar shards, beginning at any number.

    The DataLoader takes batches from its workers in turn. So batch n is made by the worker of which n leaves the
    same remainder as in an uninterrupted run, whichever process plays it.
    """

    def __init__(
        self, shards: tuple[str, ...], plan: _Plan, shuffle_buffer: int, members: tuple[str, ...] = ()
    ) -> None:
        self.shards = shards
        self.members = members
        self.plan = plan
        self.shuffle_buffer = shuffle_buffer
        self.start = 0

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        process, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        plan = self.plan
        number = self.start + process
        worker = number % workers
        while True:
            epoch = number // plan.batches
            first = epoch * plan.batches + (worker - epoch * plan.batches) % workers
            samples = _Lookahead(self._epoch_samples(epoch, plan.rank * workers + worker, plan.world_size * workers))
            # Resuming within an epoch: read up to the place without decoding.
            samples.skip((number - first) // workers * plan.batch_size)
            while number < (epoch + 1) * plan.batches:
                yield self._make_batch(epoch, samples)
                number += workers

    def _make_batch(self, epoch: int, samples: "_Lookahead") -> Batch:
        plan = self.plan
        taken = samples.take(plan.batch_size)
        if len(taken) < plan.batch_size:  # the shards hold nothing at all
            return {"image": None, "key": [], "broken": []}
        # The round tells apart the crops of an image that comes more than once in an epoch.
        drawn = ((sample, plan.rng(epoch, round_, sample[0])) for round_, sample in taken)
        return plan.make_batch(drawn, (sample for _, sample in samples.ahead(MAX_SPARES)))

    def _epoch_samples(self, epoch: int, stream: int, streams: int) -> Iterator[tuple[int, Sample]]:
        """Round after round through a stream's part of the shards; ends only if that is empty."""
        for round_ in itertools.count():
            empty = True
            seed = derive_seed(self.plan.seed, "round", round_)
            for sample in shard_samples(self.shards, seed, epoch, stream, streams, self.shuffle_buffer, self.members):
                yield round_, sample
                empty = False
            if empty and streams == 1:
                return
            if empty:  # fewer images than streams to share them
                stream, streams = 0, 1


class _Lookahead:
    """An iterator that can be looked into without using it up."""

    def __init__(self, samples: Iterator[tuple[int, Sample]]) -> None:
        self._samples = samples
        self._waiting: deque[tuple[int, Sample]] = deque()

    def take(self, count: int) -> list[tuple[int, Sample]]:
        """The next ``count`` samples, or as many as there are."""
        taken = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
        return taken + list(itertools.islice(self._samples, count - len(taken)))

    def skip(self, count: int) -> None:
        while count > 0 and self.take(1):
            beat()
            count -= 1

    def ahead(self, count: int) -> Iterator[tuple[int, Sample]]:
        """What `take` will return later, at most ``count``."""
        for place in range(count):
            if place == len(self._waiting):
                self._waiting.extend(itertools.islice(self._samples, 1))
                if place == len(self._waiting):
                    return
            yield self._waiting[place]


class SkippedImages:
    """Counts broken images, names each once, and stops a run when there are too many.

    Args:
        images: how many images there are, as a measure for "too many"; None for shards, where those broken are
            held against those seen so far.
        max_fraction: the largest part that may be broken.
    """

    MIN_SEEN = 200  # of so few images seen, a handful of broken ones says nothing yet

    def __init__(self, images: int | None, max_fraction: float = 0.05) -> None:
        self._images = images
        self._max_fraction = max_fraction
        self._reasons: dict[str, str] = {}

    @property
    def count(self) -> int:
        return len(self._reasons)

    def update(self, broken: Iterable[tuple[str, str]]) -> list[str]:
        """Note the (name, reason) of a batch; returns "name: reason" of those not met before."""
        new = {name: reason for name, reason in broken if name not in self._reasons}
        self._reasons.update(new)
        return [f"{name}: {reason}" for name, reason in new.items()]

    def check(self, seen_images: int, epoch_ended: bool = False) -> None:
        """Stop if too much is broken.

        Raises:
            UserError: more than ``max_fraction`` is broken, of all images, or of those seen if they are 200 or
                the epoch has ended.
            MachineError: likewise, and they are lost, not broken.
        """
        of = self._images
        if of is None:
            if seen_images < self.MIN_SEEN and not epoch_ended:
                return
            of = seen_images
        if self.count > self._max_fraction * of:
            name, reason = next(iter(self._reasons.items()))
            what = f"{self.count} of {of} images cannot be read, more than {self._max_fraction:.0%}"
            raise _too_many(what, name, reason)

    def state_dict(self) -> dict[str, dict[str, str]]:
        return {"broken": dict(self._reasons)}

    def load_state_dict(self, state_dict: dict[str, dict[str, str]]) -> None:
        self._reasons = dict(state_dict["broken"])


def nothing_readable(broken: list[tuple[str, str]]) -> UserError | MachineError:
    """What to raise where not one image can be read, of the (name, reason) of each."""
    if not broken:
        return UserError("no images in the shards: look whether the data root is right")
    return _too_many(f"none of {len({name for name, _ in broken})} images in a row can be read", *broken[0])


def _too_many(what: str, name: str, reason: str) -> UserError | MachineError:
    """What to raise for images that cannot be read, the first of which has a name and a reason."""
    what = f"{what}; the first is {one_line(name)}: {reason}"
    if lost := remedy_of_loss(name, reason):
        return MachineError(f"{what}; {lost}")
    return UserError(f"{what}. Mend or remove broken files, or look whether the data root is right")
