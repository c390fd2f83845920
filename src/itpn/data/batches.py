"""How batches are made from files, shards and cached features: data sets that map a batch number to a batch."""

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from itpn.data.cache import FeatureCache
from itpn.data.decode import UnreadableImage
from itpn.data.readers import Reader
from itpn.data.samples import MixedImages, WindowRequest, open_sample
from itpn.data.shards import Sample, shard_samples
from itpn.data.stored import ReadSettings
from itpn.data.workers import beat
from itpn.errors import UserError
from itpn.seeding import derive_seed

View = dict[str, Any]  # what a transform makes of an image
Batch = dict[str, Any]
Transform = Callable[..., View]  # of an image, its random generator, and its annotation if it has one
MAX_SPARES = 1000  # corrupt files in a row that are replaced: more, and the data root is probably wrong


def stack(views: list[View]) -> Batch:
    """Stack tensors of one size along a new first axis."""
    return {name: torch.stack([view[name] for view in views]) for name in views[0]}


def collect(views: list[View]) -> Batch:
    """Collect tensors of different sizes in lists."""
    return {name: [view[name] for view in views] for name in views[0]}


@dataclass(frozen=True)
class UnreadableBatch:
    """In place of a batch for which no readable image was found.

    Attributes:
        corrupt: (name, reason) of each file that was tried.
        error: message of the error, where it is not about single files.
    """

    corrupt: list[tuple[str, str]] = field(default_factory=list)
    error: str = ""


AnyBatch = Batch | UnreadableBatch


@dataclass(frozen=True)
class BatchPlan:
    """How an epoch is divided into batches, and how a batch is made.

    Attributes:
        batch_size: of this rank, no larger than the images of an epoch divided by the ranks.
        batches: number of batches in an epoch, the same on every rank.
    """

    batch_size: int
    batches: int
    rank: int
    world_size: int
    seed: int
    reading: ReadSettings
    transform: Transform
    collate: Callable[[list[View]], Batch]

    def rng(self, *sample: int | str) -> random.Random:
        """The random generator of a sample, from its epoch and its index or name."""
        return random.Random(derive_seed(self.seed, *sample))

    def positions(self, batch: int) -> range:
        """The positions of this rank's samples in an epoch's order; ranks take turns."""
        begin = batch * self.batch_size * self.world_size + self.rank
        return range(begin, begin + self.batch_size * self.world_size, self.world_size)

    def make_batch(self, samples: Iterable[tuple[Sample, random.Random]], spares: Iterator[Sample]) -> AnyBatch:
        """Decode and augment samples, each with its own generator; a corrupt one is replaced by the next spare."""
        views: list[View] = []
        keys: list[str] = []
        corrupt: list[tuple[str, str]] = []
        warnings: dict[str, tuple[str, str]] = {}
        for sample, rng in samples:
            annotation: list[Any]
            for key, data, *annotation in itertools.chain([sample], spares):
                beat()
                try:
                    moved = data.move(rng) if isinstance(data, WindowRequest) else data
                    image = open_sample(moved, self.reading, key)
                    view = self.transform(image, rng, *annotation)
                except UnreadableImage as error:
                    corrupt.append((key, str(error)))
                    continue
                except MixedImages as error:  # a worker process would print it with a traceback
                    return UnreadableBatch(error=str(error))
                views.append(view)
                keys.append(key)
                for kind, warning in image.warnings.items():
                    warnings.setdefault(kind, (key, warning))
                break
            else:
                return UnreadableBatch(corrupt)
        return {**self.collate(views), "key": keys, "corrupt": corrupt, "warnings": warnings}


@dataclass
class EpochOrder:
    """The random order of the samples in an epoch.

    Attributes:
        groups: int64 [samples]; a batch of ``batch`` samples has one group, except for the rest of each group, which
            comes at the end of the epoch.
    """

    samples: int
    seed: int
    groups: np.ndarray | None = None
    batch: int = 1
    _order: np.ndarray = field(init=False)
    _epoch: int = field(default=-1, init=False)

    def __call__(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            rng = np.random.default_rng(derive_seed(self.seed, epoch, "order"))
            self._order = rng.permutation(self.samples)
            if self.groups is not None:
                self._order = self._sort(self._order, rng)
            self._epoch = epoch
        return self._order

    def _sort(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        assert self.groups is not None
        whole, left = [], []
        for group in np.unique(self.groups):
            members = order[self.groups[order] == group]
            end = len(members) // self.batch * self.batch
            whole += np.split(members[:end], end // self.batch) if end else []
            left.append(members[end:])
        return np.concatenate([*(whole[i] for i in rng.permutation(len(whole))), *left])


class FileBatches(Dataset[AnyBatch]):
    """Batch number -> batch of single files."""

    def __init__(self, files: Reader, plan: BatchPlan) -> None:
        self.files = files
        self.plan = plan
        groups = getattr(files, "groups", None)
        self._order = EpochOrder(len(files), plan.seed, groups, plan.batch_size * plan.world_size)

    def __getitem__(self, number: int) -> AnyBatch:
        plan = self.plan
        epoch, batch = divmod(number, plan.batches)
        order = self._order(epoch)
        own = plan.positions(batch)
        indices = (int(order[position % len(order)]) for position in own)
        samples = ((self.files[index], plan.rng(epoch, index)) for index in indices)
        others = range(own.stop, own.stop + min(len(order), MAX_SPARES))
        spares = (self.files[int(order[position % len(order)])] for position in others)
        return plan.make_batch(samples, spares)


class CachedBatches(Dataset[AnyBatch]):
    """Batch number -> batch of cached crops and their features."""

    def __init__(self, cache: FeatureCache, plan: BatchPlan) -> None:
        self.cache = cache
        self.plan = plan
        self._order = EpochOrder(cache.index.images, plan.seed)

    def __getitem__(self, number: int) -> AnyBatch:
        plan = self.plan
        epoch, batch = divmod(number, plan.batches)
        order = self._order(epoch)
        first = epoch % self.cache.index.views * len(order)  # an epoch has each image once; views alternate by epoch
        numbers = [first + int(order[position % len(order)]) for position in plan.positions(batch)]
        try:
            images, features, keys = zip(*(self.cache[number] for number in numbers), strict=True)
        except UserError as error:  # a worker process would print it with a traceback
            return UnreadableBatch(error=str(error))
        views = {"image": torch.stack(images), "feature": torch.stack(features)}
        return {**views, "key": list(keys), "corrupt": [], "warnings": {}}


@dataclass
class ShardBatches(IterableDataset[AnyBatch]):
    """The batches of one worker process, from tar shards, starting at any batch number.

    The DataLoader takes batches from its worker processes in turn. ``number % workers`` names the logical worker whose
    samples batch ``number`` has. It is the same in an uninterrupted and in a resumed run, though the process differs.
    """

    shards: tuple[str, ...]
    plan: BatchPlan
    shuffle_buffer: int
    members: tuple[str, ...] = ()
    start: int = 0

    def __iter__(self) -> Iterator[AnyBatch]:
        info = get_worker_info()
        process, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        plan = self.plan
        number = self.start + process
        worker = number % workers
        while True:
            epoch = number // plan.batches
            first = epoch * plan.batches + (worker - epoch * plan.batches) % workers
            samples = _Lookahead(self._epoch_samples(epoch, plan.rank * workers + worker, plan.world_size * workers))
            # Resuming within an epoch: pass over the samples before without decoding them.
            samples.skip((number - first) // workers * plan.batch_size)
            while number < (epoch + 1) * plan.batches:
                yield self._make_batch(epoch, samples)
                number += workers

    def _make_batch(self, epoch: int, samples: "_Lookahead") -> AnyBatch:
        plan = self.plan
        taken = samples.take(plan.batch_size)
        if len(taken) < plan.batch_size:  # the shards are empty
            return UnreadableBatch()
        # An image may occur more than once in an epoch; the round gives each occurrence its own crop.
        seeded = ((sample, plan.rng(epoch, round_, sample[0])) for round_, sample in taken)
        return plan.make_batch(seeded, (sample for _, sample in samples.ahead(MAX_SPARES)))

    def _epoch_samples(self, epoch: int, stream: int, streams: int) -> Iterator[tuple[int, Sample]]:
        """Repeat the stream's part of the shards, round after round; ends only if that part is empty."""
        for round_ in itertools.count():
            empty = True
            seed = derive_seed(self.plan.seed, "round", round_)
            for sample in shard_samples(self.shards, seed, epoch, stream, streams, self.shuffle_buffer, self.members):
                yield round_, sample
                empty = False
            if empty and streams == 1:
                return
            if empty:  # there are fewer images than streams
                stream, streams = 0, 1


class _Lookahead:
    """An iterator whose next items can be read without consuming them."""

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
        """Yield at most ``count`` of the samples that `take` will return later."""
        for position in range(count):
            if position == len(self._waiting):
                self._waiting.extend(itertools.islice(self._samples, 1))
                if position == len(self._waiting):
                    return
            yield self._waiting[position]
