"""What all images of a data set have in common. Standard library only, so that settings are checked quickly."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from itpn.errors import UserError

PHOTO = "photo"  # in place of a type of number: photographs of 8 bits
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "float16", "float32")

ValueRange = tuple[float, float]  # the values that become 0 and 1


def is_storable(value: float, dtype: str) -> bool:
    """Whether a type of number has a value."""
    if "int" not in dtype:
        return True
    low, high = _limits(dtype)
    return float(value).is_integer() and low <= value <= high


def _limits(dtype: str) -> tuple[int, int]:
    """The least and the greatest value of a type of whole numbers."""
    bits = int(dtype.split("int")[1])
    low = 0 if dtype.startswith("u") else -(2 ** (bits - 1))
    return low, low + 2**bits - 1


def check_nodata(nodata: float | None, kind: "ImageType") -> None:
    """Raise :class:`UserError` for a --data.nodata that no pixel can have."""
    dtype = "uint8" if kind.is_photo else kind.dtype
    if nodata is not None and not math.isfinite(nodata):
        raise UserError(f"--data.nodata {nodata:g} is needless: NaN and infinite values never count as data")
    if nodata is not None and not is_storable(nodata, dtype):
        raise UserError(f"--data.nodata is {nodata:g}, which no pixel of {dtype} can be: the images have {kind}")


@dataclass(frozen=True)
class ImageType:
    """Channels and depth.

    Attributes:
        dtype: name of the type of number that pixels are stored in, or `PHOTO`.
    """

    channels: int
    dtype: str

    @property
    def is_photo(self) -> bool:
        return self.dtype == PHOTO

    def __str__(self) -> str:
        if self.is_photo:
            return "8 bits, grey or RGB"
        return f"{self.channels} channel{'s' * (self.channels != 1)} of {self.dtype}"


PHOTOGRAPH = ImageType(3, PHOTO)
MASKED_PHOTO = ImageType(3, "uint8")  # of photographs in which some pixels have no data


@dataclass(frozen=True)
class Pixels:
    """What the pixels of a data set are once they are read, and how they become the input of a network.

    They are clipped to a value range, scaled to [0, 1], and normalized by mean and std. The defaults are those of
    photographs.

    Each tuple has one number for all channels, or one for each.

    Attributes:
        low, high: the values that become 0 and 1, as they are stored.
        mean, std: of pixels in [0, 1].
        nodata: the value of pixels without data among integers; None for none. Floats without data are NaN.
    """

    type: ImageType = PHOTOGRAPH
    low: tuple[float, ...] = (0.0,)
    high: tuple[float, ...] = (255.0,)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    nodata: float | None = None

    @property
    def stored_mean(self) -> tuple[float, ...]:
        """The mean as pixels are stored."""
        channels = max(map(len, (self.low, self.high, self.mean)))
        low, high, mean = (own * channels if len(own) == 1 else own for own in (self.low, self.high, self.mean))
        return tuple(least + part * (most - least) for least, most, part in zip(low, high, mean, strict=True))


PHOTOGRAPHS = Pixels()


def dtype_range(kind: ImageType) -> ValueRange:
    """What the type of number can hold; of floats 0 to 1."""
    if "float" in kind.dtype:
        return 0.0, 1.0
    low, high = _limits("uint8" if kind.is_photo else kind.dtype)
    return float(low), float(high)


def check_value_range(value_range: Sequence[str]) -> None:
    """Raise :class:`UserError` for what --data.value-range does not take."""
    option, given = "--data.value-range", " ".join(value_range)
    if tuple(value_range) in ((), ("dtype",)):
        return
    percent = {text.endswith("%") for text in value_range}
    try:
        values = [float(text.removesuffix("%")) for text in value_range]
    except ValueError:
        values = []
    if not values or len(values) % 2 or len(percent) > 1 or (True in percent and len(values) != 2):
        raise UserError(f"{option} must be dtype, LOW HIGH or PLOW% PHIGH%, not {given}")
    for low, high in zip(values[::2], values[1::2], strict=True):
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UserError(f"{option} needs a low value and a greater one, not {given}")
        if True in percent and not 0 <= low < high <= 100:
            raise UserError(f"{option} needs percentages from 0% to 100%, not {given}")


def is_resolved(value_range: Sequence[str]) -> bool:
    """Whether a value range is of numbers, not of percentiles or of what a type holds."""
    return bool(value_range) and value_range[0] != "dtype" and not value_range[0].endswith("%")


def to_pairs(value_range: Sequence[str], channels: int) -> tuple[ValueRange, ...]:
    """Low and high of each channel, of a value range of numbers.

    Raises:
        UserError: neither one pair nor a pair for each channel.
    """
    values = [float(text) for text in value_range]
    pairs = tuple(zip(values[::2], values[1::2], strict=True))
    if len(pairs) not in (1, channels):
        raise UserError(
            f"--data.value-range needs a low and a high value, or a pair for each of {channels} channels, not "
            f"{len(values)} values"
        )
    return pairs * channels if len(pairs) == 1 else pairs


def to_percents(value_range: Sequence[str]) -> tuple[float, float]:
    """Two percentages, of a value range of percentiles."""
    low, high = (float(text.removesuffix("%")) for text in value_range)
    return low, high


def to_option(pairs: Sequence[ValueRange]) -> tuple[str, ...]:
    """Undo :func:`to_pairs`."""
    shown = pairs[:1] if len({*pairs}) == 1 else pairs
    return tuple(f"{value:.9g}" for pair in shown for value in pair)
