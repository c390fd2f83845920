"""Checks of values against their type annotations, and the ranges in these."""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from itpn.errors import UserError


@dataclass(frozen=True)
class Range:
    """In an annotation: the range of a number, ``least`` to ``most``; with ``above``, ``least`` itself is excluded."""

    least: float
    most: float = math.inf
    above: bool = False


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
NonNegativeFloat = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
PositiveFraction = Annotated[float, Range(0, 1, above=True)]


def check_range(value: Any, hint: Any, what: str) -> None:
    """Raise :class:`UserError` for a number, or one in a tuple, that is outside of a :class:`Range` of its annotation.

    Args:
        hint: the annotation with its extras, which fits the value's type.
    """
    for limits in getattr(hint, "__metadata__", ()):
        if not isinstance(limits, Range):
            continue
        if not limits.least <= value <= limits.most or value == math.inf:
            bounded = f"lie between {limits.least} and {limits.most}"
            wanted = (
                bounded
                if limits.most < math.inf
                else f"be at least {limits.least}"
                if value < math.inf
                else "be finite"
            )
            raise UserError(f"{what} must {wanted}, not {value}")
        if limits.above and value == limits.least:
            raise UserError(f"{what} must be above {limits.least}")
    if isinstance(value, int | float | tuple):
        for part in get_args(hint):  # of an optional number, or a tuple
            for number in value if isinstance(value, tuple) else (value,):
                check_range(number, part, what)


def check_type(value: Any, hint: Any, what: str) -> None:
    """Raise :class:`UserError` if a value is not of the type of its annotation."""
    import typeguard

    try:
        typeguard.check_type(value, hint, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
    except typeguard.TypeCheckError:
        wanted = hint.__name__ if isinstance(hint, type) else re.sub(r"(\w+\.)+", "", str(hint))
        raise UserError(f"{what} must be {wanted}, not {value!r}") from None
