"""Statistics of the pixels of a data set: what normalizes images that are no photographs."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from itpn.data.decode import UnreadableImage
from itpn.data.image_type import ImageType, ValueRange, check_nodata, to_pairs
from itpn.data.readers import Reader
from itpn.data.samples import Sample, WindowSample, open_sample, type_of
from itpn.data.skipped import nothing_readable
from itpn.data.stored import Reading, StoredImage, find_valid
from itpn.errors import UserError
from itpn.system.text import read_text
from itpn.system.writing import write_whole

UNWRITTEN = ("notes", "warnings")
SAMPLED = 512  # images of a large data set
VALUES = 2**22  # of each channel that percentiles of deep numbers are computed from
PERCENTS = (0.0, 0.1, 1.0, 2.0, 5.0, 25.0, 50.0, 75.0, 95.0, 98.0, 99.0, 99.9, 100.0)
PERCENT = "%"
DEFAULT_RANGE = ("0.1%", "99.9%")  # of images of more than 8 bits: hot and dead pixels do not take the contrast
SENTINELS = (-9999.0, -99999.0, -32768.0, -(2.0**31))  # values of pixels without data in files that do not say so


@dataclass(frozen=True)
class Statistics:
    """Of the pixels of a data set; each tuple has a number for each channel, in the unit that is stored.

    Attributes:
        images: in the data set.
        sampled: images that were read.
        nodata: value of pixels without data, which enter no other number; None for none, or NaN.
        nodata_fraction: of the pixels.
        percentiles: by percent, as "0.1".
        value_range: the values that become 0 and 1.
        scaled_mean, scaled_std: after that.
        smallest, largest: height and width.
        notes: what is remarkable of the values, a sentence each.
        warnings: what is remarkable of the files, which training says too.
    """

    images: int
    sampled: int
    channels: int
    dtype: str
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    percentiles: dict[str, tuple[float, ...]]
    nodata: float | None
    nodata_fraction: float
    value_range: tuple[ValueRange, ...]
    scaled_mean: tuple[float, ...]
    scaled_std: tuple[float, ...]
    smallest: tuple[int, int]
    largest: tuple[int, int]
    notes: tuple[str, ...] = field(default=(), compare=False)
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @property
    def type(self) -> ImageType:
        return ImageType(self.channels, self.dtype)


class Distribution:
    """The values of one channel: all of them in a histogram up to 16 bits, a random part of deeper numbers."""

    def __init__(self, dtype: np.dtype, per_image: int) -> None:
        self.count, self.minimum, self.maximum = 0, math.inf, -math.inf
        self._mean = self._squares = 0.0
        self._offset = int(np.iinfo(dtype).min) if dtype.kind in "iu" else 0
        self._counts = (
            np.zeros(2 ** (8 * dtype.itemsize), np.int64) if dtype.kind in "iu" and dtype.itemsize < 4 else None
        )
        self._parts: list[np.ndarray] = []
        self._per_image = per_image
        self._rng = np.random.default_rng(0)

    def add(self, values: np.ndarray) -> None:
        """Values [n] of an image."""
        if not values.size:
            return
        self.minimum = min(self.minimum, float(values.min()))
        self.maximum = max(self.maximum, float(values.max()))
        mean, squares = float(values.mean(dtype=np.float64)), float(values.var(dtype=np.float64)) * values.size
        total = self.count + values.size
        shift = mean - self._mean
        self._squares += squares + shift**2 * self.count * values.size / total
        self._mean += shift * values.size / total
        self.count = total
        if self._counts is not None:
            self._counts += np.bincount(values.astype(np.int64) - self._offset, minlength=len(self._counts))
        elif values.size <= self._per_image:
            self._parts.append(values)
        else:
            self._parts.append(self._rng.choice(values, self._per_image, replace=False))

    @property
    def mean(self) -> float:
        return self._mean

    @property
    def std(self) -> float:
        return math.sqrt(self._squares / self.count) if self.count else 0.0

    def percentile(self, percents: Sequence[float]) -> list[float]:
        """The values below which so many percent lie."""
        if not self.count:
            return [0.0] * len(percents)
        if self._counts is None:
            inner: list[float] = np.percentile(self._values, percents).tolist()
        else:
            ends = np.cumsum(self._counts)
            ranks = np.asarray(percents) / 100 * (self.count - 1)
            inner = (np.searchsorted(ends, ranks, side="right") + self._offset).astype(float).tolist()
        exact = {0.0: self.minimum, 100.0: self.maximum}
        return [exact.get(percent, value) for percent, value in zip(percents, inner, strict=True)]

    def scaled(self, low: float, high: float) -> tuple[float, float]:
        """Mean and std of the values that are clipped to a range and scaled to [0, 1]."""
        if not self.count:
            return 0.0, 1.0
        if self._counts is None:
            values, weights = self._values.astype(np.float64), None
        else:
            values, weights = np.arange(len(self._counts), dtype=np.float64) + self._offset, self._counts
        values = ((values - low) / (high - low)).clip(0, 1)
        mean = float(np.average(values, weights=weights))
        return mean, math.sqrt(float(np.average((values - mean) ** 2, weights=weights)))

    @property
    def _values(self) -> np.ndarray:
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts)]
        return self._parts[0]


def compute_statistics(
    reader: Reader,
    settings: Reading,
    value_range: Sequence[str] = (),
    sample: int | None = SAMPLED,
    progress: Callable[[int], object] = lambda read: None,
) -> Statistics:
    """Read the images of a data set, or some that are evenly spaced, once.

    Args:
        settings: without a type: that of the first image counts.
        value_range: see :func:`find_range`.
        sample: images to read; None for all.
        progress: takes how many images have been read.

    Raises:
        UserError: no image can be read, images differ in channels or depth, or no pixel has a value.
        MachineError: no image can be read because the file system fails.
    """
    count = len(reader)
    wanted = count if sample is None else min(sample, count)
    order = np.unique(np.linspace(0, count - 1, wanted).round().astype(int)).tolist()
    per_image = max(VALUES // max(wanted, 1), 1024)
    sums: list[Distribution] = []
    sizes: list[tuple[int, int]] = []
    missing = pixels = 0
    corrupt: list[tuple[str, str]] = []
    warnings: dict[str, str] = {}
    # where those in the sample are corrupt, others
    for index in itertools.chain(order, sorted({*range(min(count, 1000))} - {*order})):
        if len(sizes) == wanted:
            break
        name, data, *_ = reader[index]
        try:
            image = open_sample(data, settings, name)
            if not sizes:
                settings = settle(settings, image, name)
                image = open_sample(data, settings, name)
            values = image.decode_some() if isinstance(image, StoredImage) else image.decode().flatten(1).numpy()
        except UnreadableImage as error:
            corrupt.append((name, str(error)))
            continue
        for subject, warning in image.warnings.items():
            warnings.setdefault(subject, f"{name}: {warning}")
        if not sums:
            sums = [Distribution(values.dtype, per_image) for _ in range(len(values))]
        valid = find_valid(values, settings.nodata)
        for channel, own, present in zip(sums, values, valid, strict=True):
            channel.add(own[present])
        sizes.append((image.height, image.width))
        pixels, missing = pixels + valid.size, missing + int(valid.size - valid.sum())
        progress(len(sizes))
    if not sizes or settings.type is None:
        raise nothing_readable(corrupt)
    if corrupt:
        first = ": ".join(corrupt[0])
        warnings["corrupt"] = f"cannot be read and left out: {len(corrupt)} of the images; the first is {first}"
    if not any(channel.count for channel in sums):
        raise UserError(
            f"no pixel of the {len(sizes)} images that were read ({reader.name(order[0])}, ...) has a value: all are "
            "NaN, infinite or without data"
        )
    found = _collect(count, settings, sums, sizes, missing / pixels, value_range)
    return dataclasses.replace(found, warnings=tuple(warnings.values()))


def settle(settings: Reading, image: Sample, name: str) -> Reading:
    """How images are read, of which this is the first: of its type, and without data where it has none.

    Raises:
        UserError: its pixels cannot have the value for no data that was given.
    """
    kind, nodata = type_of(image), settings.nodata
    check_nodata(nodata, kind)
    whole = image.image if isinstance(image, WindowSample) else image
    if nodata is None and isinstance(whole, StoredImage) and not kind.is_photo:
        nodata = whole.file.nodata
    example = settings.example if settings.type else f"{name} has"
    return dataclasses.replace(settings, type=kind, example=example, nodata=nodata)


def _collect(
    images: int,
    settings: Reading,
    sums: Sequence[Distribution],
    sizes: Sequence[tuple[int, int]],
    missing: float,
    value_range: Sequence[str],
) -> Statistics:
    assert settings.type is not None
    percentiles = [channel.percentile(PERCENTS) for channel in sums]
    ranges = find_range(value_range, settings.type, sums)
    scaled = [channel.scaled(*own) for channel, own in zip(sums, ranges, strict=True)]
    lows = {channel.minimum for channel in sums}
    suspicious = sorted(lows & {*SENTINELS}) if settings.nodata is None else []
    notes = [
        f"the least value is {value:g}: if it stands for no data, give --data.nodata {value:g}" for value in suspicious
    ]
    groups = {
        "without data in all images": [str(index) for index, channel in enumerate(sums) if not channel.count],
        "of one value in all images": [str(index) for index, own in enumerate(sums) if own.minimum == own.maximum],
    }
    notes += [f"channel {', '.join(found)} is {what}" for what, found in groups.items() if found]
    return Statistics(
        images=images,
        sampled=len(sizes),
        channels=settings.type.channels,
        dtype=settings.type.dtype,
        minimum=tuple(channel.minimum if channel.count else 0.0 for channel in sums),
        maximum=tuple(channel.maximum if channel.count else 0.0 for channel in sums),
        mean=tuple(channel.mean for channel in sums),
        std=tuple(channel.std for channel in sums),
        percentiles={f"{percent:g}": tuple(own[i] for own in percentiles) for i, percent in enumerate(PERCENTS)},
        nodata=settings.nodata,
        nodata_fraction=missing,
        value_range=tuple(ranges),
        scaled_mean=tuple(mean for mean, _ in scaled),
        scaled_std=tuple(max(std, 1e-3) for _, std in scaled),  # a constant channel stays finite
        smallest=min(sizes),
        largest=max(sizes),
        notes=tuple(notes),
    )


def find_range(value_range: Sequence[str], kind: ImageType, sums: Sequence[Distribution]) -> list[ValueRange]:
    """The values of each channel that become 0 and 1.

    Args:
        value_range: checked by `itpn.data.image_type.check_value_range`: ``("dtype",)``; a low and a high value, for
            all channels or a pair for each; or percentiles of the data set, ``("1%", "99%")``. Empty for the whole
            range of 8 bits and for `DEFAULT_RANGE` of deeper numbers.
    """
    eight_bits = kind.is_photo or kind.dtype == "uint8"
    value_range = tuple(value_range) or (("dtype",) if eight_bits else DEFAULT_RANGE)
    if value_range == ("dtype",):
        return [dtype_range(kind)] * kind.channels
    if value_range[0].endswith(PERCENT):
        percents = [float(text.rstrip(PERCENT)) for text in value_range]
        found = [channel.percentile(percents) for channel in sums]
        return [(low, high if high > low else low + 1.0) for low, high in found]
    return [*to_pairs(value_range, kind.channels)]


def dtype_range(kind: ImageType) -> ValueRange:
    """What the type of number can hold; of floats 0 to 1."""
    if kind.is_photo:
        return 0.0, 255.0
    dtype = np.dtype(kind.dtype)
    return (0.0, 1.0) if dtype.kind == "f" else (float(np.iinfo(dtype).min), float(np.iinfo(dtype).max))


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Write ``stats.json``."""
    content = {name: value for name, value in dataclasses.asdict(statistics).items() if name not in UNWRITTEN}
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def read_statistics(path: Path) -> Statistics:
    """Undo :func:`write_statistics`.

    Raises:
        UserError: the file is something else.
    """
    try:
        content: dict[str, Any] = json.loads(read_text(path))
        content["value_range"] = tuple((float(low), float(high)) for low, high in content["value_range"])
        content["percentiles"] = {name: tuple(values) for name, values in content["percentiles"].items()}
        own: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
        }
        statistics = Statistics(**own)
        _check(statistics)
        return statistics
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a file of `itpn stats` ({type(error).__name__}: {error}): remove it") from error


def _check(own: Statistics) -> None:
    """Raise :class:`ValueError` or :class:`TypeError` for numbers that cannot be those of images."""
    channels = (own.minimum, own.maximum, own.mean, own.std, own.scaled_mean, own.scaled_std)
    lists = [*channels, *own.percentiles.values()]
    if any(len(values) != own.channels for values in (*lists, own.value_range)):
        raise ValueError("different numbers of channels")
    numbers = itertools.chain(*lists, *own.value_range, (own.nodata_fraction, own.nodata or 0.0))
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("numbers that are not finite")
    if min(own.scaled_std) <= 0 or any(low >= high for low, high in own.value_range):
        raise ValueError("a standard deviation or value range of 0")
