"""Sizes of images after resizing. No torch, so that every layer can import it."""

from collections.abc import Sequence


def fit_sides(sides: Sequence[int], short: float, longest: float) -> list[int]:
    """Height and width after resizing the short side to ``short``, or to less so that the long one fits ``longest``."""
    factor = min(short / min(sides), longest / max(sides))
    return [max(1, round(side * factor)) for side in sides]
