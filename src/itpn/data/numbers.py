"""Numbers and ids in annotations, which tools write as 60, 60.0 or "60"."""

import math
from typing import Any


def read_number(value: Any) -> float | None:
    """A finite number, also given as text; None for anything else, booleans included."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def read_whole(value: Any) -> int | None:
    """A whole number, also given as 60.0, "60" or "60.0"; None for anything else, booleans included."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    number = read_number(value)
    if number is None or not number.is_integer():
        return None
    try:
        return int(value)  # exact, even if the text has more digits than a float
    except ValueError:
        return int(number)


def read_image_id(value: Any) -> int | str | None:
    """The id of an image: 7 for 7, 7.0 and "7"; any other text unchanged; None for anything else."""
    whole = read_whole(value)
    if isinstance(value, str) and (whole is None or str(whole) != value.strip()):
        return value  # "007" and "7" are different ids
    return whole if whole is not None and is_int64(whole) else None


def is_int64(value: int) -> bool:
    return abs(value) < 2**63
