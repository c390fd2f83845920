"""Masks of grey levels that are not class indices."""

import math
from collections.abc import Mapping

WHITE = 255  # in masks of 8 bits
MAX_LEVELS = 10  # grey levels that are recognized as evenly spaced: more are too similar to class indices


def explain_greys(counts: Mapping[int, int]) -> str | None:
    """Whether the values of masks look like grey levels, not class indices.

    Args:
        counts: value -> number of pixels, over all masks.

    Returns:
        What they look like and what to do; None if they may be class indices, or are black and white. Gaps between
        indices, and 255 as the ignored label, do not count as grey levels.
    """
    values = sorted(counts)
    if not values or values[-1] > WHITE or set(values) <= {0, WHITE}:
        return None
    if _are_levels(set(values)):
        shown = ", ".join(map(str, values[:6])) + (", ..." if len(values) > 6 else "")
        return (
            f"values {shown} look like shades of grey, not class indices: give --data.classes FILE with a line "
            "`NAME G G G` for each shade (or with a name for each index, if they are indices)"
        )
    if _are_blurred(counts):
        return (
            f"{len(values)} values from {values[0]} to {values[-1]}, most of a few pixels, look like anti-aliased "
            "shades of grey, not class indices: save masks as PNG without interpolation (or give --data.classes FILE "
            "with a name for each index, if they are indices)"
        )
    return None


def _are_levels(values: set[int]) -> bool:
    """Whether values are evenly spaced from black, at least half of the levels present, as 0, 127, 255."""
    if values == {0, WHITE - 1}:
        return True
    inner = sorted(values - {0, WHITE})
    for parts in range(2, MAX_LEVELS):
        step = WHITE / parts
        levels = {round(value / step) for value in values}
        exact = all(abs(value - round(value / step) * step) < 1 for value in values)
        enough = 2 * len(levels) > parts and (len(inner) > 1 or WHITE in values or (parts == 2 and 0 in values))
        if exact and enough and round(inner[0] / step):
            return True
    step = math.gcd(*inner)
    return len(inner) > 1 and step >= WHITE // MAX_LEVELS and 2 * len(inner) >= inner[-1] / step


def _are_blurred(counts: Mapping[int, int]) -> bool:
    """Whether there is white, and values over the whole range that are rare, each and together."""
    total = sum(counts.values())
    rare = {value: n for value, n in counts.items() if 8 <= value < 248 and n < 0.1 * total}
    spread = any(value < 128 for value in rare) and any(value >= 192 for value in rare)
    return max(counts) >= 250 and spread and sum(rare.values()) < 0.4 * total
