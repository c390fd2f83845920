"""Sizes of images after resizing, places of windows. No torch, so that every layer can import it."""

import math
from collections.abc import Sequence


def find_starts(whole: int, size: int, overlap: int) -> list[int]:
    """Where windows of ``size`` pixels begin along a side of ``whole`` pixels, evenly, sharing ``overlap`` at least."""
    if whole <= size:
        return [0]
    count = math.ceil((whole - overlap) / (size - overlap))
    return [number * (whole - size) // (count - 1) for number in range(count)]


def fit_sides(sides: Sequence[int], short: float, longest: float) -> list[int]:
    """Height and width after resizing the short side to ``short``, or to less so that the long one fits ``longest``."""
    factor = min(short / min(sides), longest / max(sides))
    return [max(1, round(side * factor)) for side in sides]
