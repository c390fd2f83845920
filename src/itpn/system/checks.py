"""Checks of values against their type annotations, and the ranges in these."""

import math
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from itpn.errors import UserError
from itpn.system.text import either

LARGEST_INT = 2**63 - 1  # of torch
LARGEST_FLOAT = 3.4028234663852886e38  # of 32 bits, in which networks compute


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
# Bounds far above what anybody uses, and below what a machine hangs or runs out of memory at.
BatchSize = Annotated[int, Range(1, 2**20)]  # the largest ever trained with are some 100,000
NumWorkers = Annotated[int, Range(0, 1024)]  # each is a process: more than the cores of the largest machines
NumDevices = Annotated[int, Range(1, 1024)]  # of one machine, each with a process
Side = Annotated[int, Range(1, 2**14)]  # of a network's images in pixels: attention over them would not end before
PatchSize = Annotated[int, Range(1, 1024)]
Channels = Annotated[int, Range(1, 1024)]  # of images
Channel = Annotated[int, Range(0, 1023)]  # one of them, counted from 0
ChannelMap = tuple[Channel | Literal["-"], ...]  # for each new channel the old one, or none
Width = Annotated[int, Range(1, 2**15)]  # channels: the widest transformers have 18,432
Depth = Annotated[int, Range(0, 1000)]  # blocks: the deepest transformers have 1,000
NumHeads = Annotated[int, Range(1, 1024)]
Factor = Annotated[float, Range(0.01, 100)]  # by which images are resized


def check_range(value: Any, hint: Any, what: str) -> None:
    """Raise :class:`UserError` for a number, or one in a tuple, that is outside of a :class:`Range` of its annotation.

    No number may be NaN, infinite or larger than what networks compute with, whatever its annotation.

    Args:
        hint: the annotation with its extras, which fits the value's type.
    """
    _check_limits(value, hint, what)
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"{what} must be finite, not {number}")
        if isinstance(number, int | float):
            most = LARGEST_INT if isinstance(number, int) else LARGEST_FLOAT
            if abs(number) > most:
                bound = f"at most {most}" if number > 0 else f"at least {-most}"
                raise UserError(f"{what} must be {bound}, not {_shown(number)}")


def _check_limits(value: Any, hint: Any, what: str) -> None:
    for limits in getattr(hint, "__metadata__", ()):
        if not isinstance(limits, Range):
            continue
        if limits.most == math.inf and isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{what} must be finite, not {value}")
        if not limits.least <= value <= limits.most:
            one_sided = limits.most == math.inf or (isinstance(value, int) and value < limits.least)
            wanted = f"be at least {limits.least}" if one_sided else f"lie between {limits.least} and {limits.most}"
            raise UserError(f"{what} must {wanted}, not {_shown(value)}")
        if limits.above and value == limits.least:
            raise UserError(f"{what} must be above {limits.least}")
    if isinstance(value, int | float | tuple):
        for part in get_args(hint):  # of an optional number, or a tuple
            for number in value if isinstance(value, tuple) else (value,):
                _check_limits(number, part, what)


def _shown(value: Any) -> str:
    """A value for a message, not more of it than a line holds."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"  # Python refuses to write one of thousands
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def check_type(value: Any, hint: Any, what: str) -> None:
    """Raise :class:`UserError` if a value is not of the type of its annotation; True and False are no numbers."""
    import typeguard

    strategy = typeguard.CollectionCheckStrategy.ALL_ITEMS
    switches = [one for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, bool)]
    try:
        typeguard.check_type(value, hint, collection_check_strategy=strategy)
    except typeguard.TypeCheckError:
        pass
    else:
        if not switches or {bool, Any, object} & set(_parts(hint)):
            return
    raise UserError(f"{what} must be {describe_type(hint)}, not {_shown(value)}")


def _parts(hint: Any) -> Iterator[Any]:
    """Every type in an annotation."""
    yield hint
    for part in get_args(hint) if get_origin(hint) is not Literal else ():
        yield from _parts(part)


WORDS = {int: "whole number", float: "number", str: "text", bool: "switch"}
COUNTS = {2: "two", 3: "three", 4: "four"}


def describe_type(hint: Any, none: bool = True) -> str:
    """What an annotation asks for, in words: "a whole number or two whole numbers".

    Args:
        none: None counts, where it is allowed.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return describe_type(parts[0])
    if origin in (Union, types.UnionType):
        wanted = [part for part in parts if none or part is not type(None)]
        return either(list(dict.fromkeys(map(describe_type, wanted))))
    if origin is Literal:
        return either([repr(part) for part in parts])
    if origin is tuple:
        inner = _describe_several(parts[0])
        return inner if parts[-1] is ... else f"{COUNTS.get(len(parts), len(parts))} {inner}"
    if hint in (None, type(None)):
        return "None"
    if hint is bool:
        return "True or False"
    return f"a {WORDS[hint]}" if hint in WORDS else getattr(hint, "__name__", str(hint))


def _describe_several(hint: Any) -> str:
    """As :func:`describe_type` of the values of a tuple: "whole numbers or '-'"."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _describe_several(parts[0])
    if origin in (Union, types.UnionType):
        return either(list(map(_describe_several, parts)))
    return describe_type(hint) if origin is Literal else f"{WORDS.get(hint, 'value')}s"
