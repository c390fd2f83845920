"""Statistics of the pixels of a data set: what normalizes images that are no photographs."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from itpn.data.decode import UnreadableImage
from itpn.data.distribution import Distribution
from itpn.data.formats.reader import check_size
from itpn.data.image_type import ImageType, ValueRange, dtype_range, to_pairs, to_percents
from itpn.data.readers import Reader
from itpn.data.samples import Sample, open_sample, settle
from itpn.data.shard_images import ShardImages
from itpn.data.skipped import nothing_readable
from itpn.data.stored import ReadSettings, StoredImage, find_valid
from itpn.errors import UserError

NAMED = 8  # channels in a line
SAMPLED = 512  # images of a large data set
VALUES = 2**22  # of each channel that percentiles of more than 16 bits are computed from
ALL_VALUES = 2**26  # of all channels
PERCENTS = (0.0, 0.1, 1.0, 2.0, 5.0, 25.0, 50.0, 75.0, 95.0, 98.0, 99.0, 99.9, 100.0)
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
        fingerprint: of the images' names and sizes, see :func:`itpn.data.statistics_file.sign_images`; empty for none.
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
    fingerprint: str = ""
    notes: tuple[str, ...] = field(default=(), compare=False)
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @property
    def type(self) -> ImageType:
        return ImageType(self.channels, self.dtype)

    def describe(self, where: str, stretch: tuple[float, float] | None = None) -> str:
        """What normalizes the images, in a sentence.

        Args:
            where: the numbers are from.
            stretch: percentiles of each image that become 0 and 1, where they do.
        """
        lows, highs = zip(*self.value_range, strict=True)
        if stretch is not None:
            low, high = stretch
            return f"{self.type}: mean and std are those of {where}, each stretched from {low:g}% to {high:g}%"
        numbers = f"mean, std and value range ({min(lows):.6g} to {max(highs):.6g})"
        missing = f", {self.nodata_fraction:.2%} of the pixels without data" if self.nodata_fraction else ""
        return f"{self.type}: {numbers} are those of {where}{missing}"


@dataclass
class _Sums:
    """What has been read so far."""

    settings: ReadSettings
    in_parts: bool  # windows of images that are larger than is allowed as a whole count too
    channels: list[Distribution] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    pixels: int = 0  # of all channels
    missing: int = 0  # of these, without data
    corrupt: list[tuple[str, str]] = field(default_factory=list)
    warnings: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, image: Sample) -> None:
        """Count an image in.

        Raises:
            UnreadableImage: it cannot be decoded, or is too large to be decoded as a whole and ``in_parts`` is not set.
        """
        if isinstance(image, StoredImage) and not self.in_parts:
            check_size(image.file, self.settings.max_pixels)
        values = image.decode_some() if isinstance(image, StoredImage) else image.decode().flatten(1).numpy()
        for subject, warning in image.warnings.items():
            self.warnings.setdefault(subject, f"{name}: {warning}")
        if not self.channels:
            limit = max(min(VALUES, ALL_VALUES // len(values)), 1024)
            self.channels = [Distribution(values.dtype, limit) for _ in range(len(values))]
        valid = find_valid(values, self.settings.nodata)
        for channel, own, present in zip(self.channels, values, valid, strict=True):
            channel.add(own[present])
        self.sizes.append((image.height, image.width))
        self.pixels, self.missing = self.pixels + valid.size, self.missing + int(valid.size - valid.sum())


def compute_statistics(
    reader: Reader,
    settings: ReadSettings,
    value_range: Sequence[str] = (),
    sample: int | None = SAMPLED,
    progress: Callable[[int, int], object] = lambda read, total: None,
    in_parts: bool = False,
) -> Statistics:
    """Read the images of a data set, or some that are evenly spaced, one at a time.

    The value for no data is the first that one of them declares, where the settings leave it open.

    Args:
        settings: without a type: that of the first image counts.
        value_range: see :func:`find_range`.
        sample: images to read; None for all.
        progress: takes how many images have been read, and how many are to be.
        in_parts: images that are too large to be decoded as a whole count too, by windows all over them.

    Raises:
        UserError: no image can be read, images differ in channels or depth, or no pixel has a value.
        MachineError: no image can be read because the file system fails.
    """
    count = len(reader)
    wanted = count if sample is None else min(sample, count)
    try:
        found = _read_sample(reader, _Sums(settings, in_parts), wanted, progress)
    finally:
        if isinstance(reader, ShardImages):
            reader.close()
    if not found.sizes:
        raise nothing_readable(found.corrupt)
    if found.corrupt:
        first = ": ".join(found.corrupt[0])
        found.warnings["corrupt"] = (
            f"cannot be read and left out: {len(found.corrupt)} of the images; the first is {first}"
        )
    if not any(channel.count for channel in found.channels):
        raise UserError(
            f"no pixel of the {len(found.sizes)} images that were read ({reader.name(0)}, ...) has a value: all are "
            "NaN, infinite or without data"
        )
    return _collect(count, found, value_range)


def _read_sample(reader: Reader, found: _Sums, wanted: int, progress: Callable[[int, int], object]) -> _Sums:
    """Some images that are evenly spaced; where those are corrupt, others."""
    count = len(reader)
    if isinstance(reader, ShardImages):
        found.corrupt += reader.damaged
    order = np.unique(np.linspace(0, count - 1, wanted).round().astype(int)).tolist()
    for index in itertools.chain(order, sorted({*range(min(count, 1000))} - {*order})):
        if len(found.sizes) == wanted:
            break
        name, data, *_ = reader[index]
        try:
            image = open_sample(data, found.settings, name)
            settled = settle(found.settings, image, name)
            if settled != found.settings:
                if found.sizes:  # others count pixels of this value so far, and are read again
                    again = _Sums(replace(found.settings, nodata=settled.nodata), found.in_parts)
                    return _read_sample(reader, again, wanted, progress)
                found.settings = settled
                image = open_sample(data, settled, name)
            found.add(name, image)
        except UnreadableImage as error:
            found.corrupt.append((name, str(error)))
            continue
        progress(len(found.sizes), wanted)
    return found


def _collect(images: int, found: _Sums, value_range: Sequence[str]) -> Statistics:
    settings, sums, sizes = found.settings, found.channels, found.sizes
    assert settings.type is not None
    percentiles = [channel.percentile(PERCENTS) for channel in sums]
    ranges = find_range(value_range, settings.type, sums)
    scaled = [channel.scaled(*own) for channel, own in zip(sums, ranges, strict=True)]
    lows = {channel.minimum for channel in sums}
    suspicious = sorted(lows & {*SENTINELS}) if settings.nodata is None else []
    notes = [
        f"the least value is {value:g}: if it stands for no data, give --data.nodata {value:g}" for value in suspicious
    ]
    kinds = {
        "without data in all images": [index for index, channel in enumerate(sums) if not channel.count],
        "of one value in all images": [index for index, own in enumerate(sums) if own.minimum == own.maximum],
    }
    notes += [f"{_name_channels(own)} {what}" for what, own in kinds.items() if own]
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
        nodata_fraction=found.missing / found.pixels,
        value_range=tuple(ranges),
        scaled_mean=tuple(mean for mean, _ in scaled),
        scaled_std=tuple(max(std, 1e-3) for _, std in scaled),  # a constant channel stays finite
        smallest=min(sizes),
        largest=max(sizes),
        notes=tuple(notes),
        warnings=tuple(found.warnings.values()),
    )


def _name_channels(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"channel {numbers[0]} is"
    more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
    return f"channels {', '.join(map(str, numbers[:NAMED]))}{more} are"


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
    if value_range[0].endswith("%"):
        found = [channel.percentile(to_percents(value_range)) for channel in sums]
        return [(low, high if high > low else low + 1.0) for low, high in found]
    return [*to_pairs(value_range, kind.channels)]
