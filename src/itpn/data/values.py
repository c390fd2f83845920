"""Scaling of values of more than 8 bits to 8, with a warning if their range is unknown or hardly used."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

SMALL_PART = 1 / 4  # of the range: images that use less of it get a warning
OUTLIERS = 1000  # one pixel in so many may be hot or dead, and is left out of the range
NODATA = 42113  # GDAL's tag
SENTINELS = (-9999.0, -99999.0, -32768.0, -(2.0**31))  # values of pixels without data, in files without the tag
HUGE = 1e20  # larger values stand for no data: -3.4e38, 9.97e36, 1e20
ADVICE = "rescale the images if this is not what you want"


def scale_values(
    image: Image.Image, tags: Mapping[int, Any], transparent: int | None = None
) -> tuple[Image.Image, str | None]:
    """Scale a grey image of integers of more than 8 bits, or of floats, to 8 bits.

    Unsigned integers of 12 or 16 bits are divided by a constant, so that images stay comparable. Floats from 0 to 1 (or
    up to 2, because reflectance may exceed 1) are multiplied. Values from 0 to 255 are kept. All others are stretched
    from minimum to maximum. Pixels without data, NaN and infinite ones become black, and are left out of the range.

    Args:
        tags: of a TIFF; none of a PNG, whose values are always unsigned.
        transparent: a value whose pixels become white, and are left out of the range.

    Returns:
        The image in mode L, and a warning about its values or None.
    """
    values = np.asarray(image)
    nodata = _read_nodata(tags.get(NODATA)) if transparent is None else transparent
    bits = (tags.get(258) or (16,))[0]
    if image.mode.startswith("I;16") or not tags:  # older Pillow opens 16-bit PNG as 32-bit integers
        valid = np.full(values.shape, True) if nodata is None else values != nodata
        pixels, warning = _scale_unsigned(values, valid, 12 if bits == 12 else 16)
    else:
        if image.mode == "I" and bits == 32 and (tags.get(339) or (1,))[0] == 1:
            values = values.view(np.uint32)  # which Pillow reads as signed
        valid = find_valid(values, nodata)
        pixels, warning = _scale_unknown(values, valid)
    if tags.get(262) == 0:  # white is zero
        pixels = 255 - pixels
    return Image.fromarray(np.where(valid, pixels, np.uint8(0 if transparent is None else 255))), warning


def check_high_bytes(image: Image.Image, tags: Mapping[int, Any]) -> str | None:
    """A warning about colours of 16 bits, of which Pillow returns the upper 8, or None; alpha is ignored."""
    colours = [band not in ("A", "a") for band in image.getbands()]
    counts = np.array(image.histogram()).reshape(-1, 256)[colours].sum(axis=0)
    nodata = _read_nodata(tags.get(NODATA))
    if nodata is not None and 0 <= nodata < 2**16:
        counts[int(nodata) >> 8] = 0
    total = int(counts.sum())
    few = _count_outliers(image.width * image.height) * sum(colours)
    greatest, counts[255] = int(counts[255]), 0
    for outliers in (0, few):
        low, high = _find_range(counts, outliers)
        # a single value needs no warning; but 8-bit values stored in 16 bits all have the upper byte 0
        if low < high or (low == high == 0 and greatest <= few):
            left_out = total - int(counts[low : high + 1].sum())
            if left_out <= total / 2 and (warning := _check_range(low << 8, (high << 8) + 255, 16, left_out)):
                return warning
    return None


def find_valid(values: np.ndarray, nodata: float | None) -> np.ndarray:
    """bool, True where a value is valid: finite, and not the one that stands for no data.

    Args:
        nodata: that value; None if the file has no tag: then any of `SENTINELS` that is the minimum.
    """
    valid: np.ndarray = np.abs(values) < HUGE if values.dtype.kind == "f" else np.ones(values.shape, dtype=bool)
    if nodata is not None:
        return valid & ~np.isclose(values, nodata, rtol=1e-6, atol=0)
    while valid.any() and (low := float(values[valid].min())) in SENTINELS:
        valid &= values != low
    return valid


def _read_nodata(tag: Any) -> float | None:
    try:
        return float(str(tag).strip(" \0"))
    except ValueError:
        return None


def _scale_unsigned(values: np.ndarray, valid: np.ndarray, bits: int) -> tuple[np.ndarray, str | None]:
    pixels = (values >> (bits - 8)).astype(np.uint8)
    used = valid & (values < 2**bits - 1)  # the maximum may be saturated, or stand for no data
    counts = np.array(Image.fromarray(pixels).histogram(Image.fromarray(used)))
    total = int(valid.sum())
    for outliers in (0, _count_outliers(values.size)):
        low, high = _find_range(counts, outliers)
        left_out = total - int(counts[low : high + 1].sum())
        if low <= high and high - low <= SMALL_PART * 256 and left_out <= total / 2:
            some = values[used & (pixels >= low) & (pixels <= high)]
            if warning := _check_range(int(some.min()), int(some.max()), bits, left_out):
                return pixels, warning
    return pixels, None


def _count_outliers(pixels: int) -> int:
    return -(-pixels // OUTLIERS) if pixels >= 64 else 0


def _find_range(counts: np.ndarray, outliers: int) -> tuple[int, int]:
    """Minimum and maximum of a histogram [256] without outliers at each end; (1, 0) if nothing is left."""
    below, above = np.cumsum(counts) > outliers, np.cumsum(counts[::-1]) > outliers
    return (int(below.argmax()), 255 - int(above.argmax())) if below.any() else (1, 0)


def _check_range(low: int, high: int, bits: int, left_out: int) -> str | None:
    full = 2**bits - 1
    if low == high or high - low >= SMALL_PART * full:
        return None
    needed = max(high.bit_length(), 1)
    as_of = f" ({needed} bits end at {2**needed - 1})" if needed < bits else ""
    which = f"all but {left_out:,} of its values" if left_out else "its values"
    return (
        f"{which} lie between {low} and {high} of {full}{as_of}: divided by {2 ** (bits - 8)} to give 8 bits, they "
        f"show little contrast; {ADVICE}"
    )


def _scale_unknown(values: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, str | None]:
    """Scale values whose range the file does not give."""
    if not valid.any():
        return np.zeros(values.shape, np.uint8), "it has no valid value: all are NaN, infinite or nodata"
    is_float = values.dtype.kind == "f"
    low, high = float(values[valid].min()), float(values[valid].max())
    if is_float and low >= 0 and high <= 2:
        offset, scale, taken = 0.0, 255 / max(high, 1), f"taken as 0 to {max(high, 1):.6g}"
        expected = high <= 1 and high - low >= SMALL_PART
    elif low >= 0 and high <= 255 and (not is_float or high - low >= SMALL_PART * 255):
        offset, scale, taken = 0.0, 1.0, "taken as 8 bits"
        expected = is_float
    else:
        offset, scale, taken = low, 255 / (high - low or 1), "stretched from this image's least to its greatest"
        expected = False
    values = np.where(valid, values, low).astype(np.float32 if is_float else np.float64, copy=False)
    pixels = ((values - offset) * scale).round().clip(0, 255).astype(np.uint8)
    left_out = valid.size - int(valid.sum())
    if (expected or low == high) and not left_out:
        return pixels, None
    without = f" ({left_out} NaN, infinite or nodata left out)" if left_out else ""
    return pixels, f"its values lie between {low:.6g} and {high:.6g}{without}: {taken}; {ADVICE}"
