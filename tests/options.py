"""Options of commands that tests share."""

import itertools
from collections.abc import Sequence


def change(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """Arguments of a command with some options at the end, in place of those of the same names."""
    parts: list[list[str]] = [[]]
    for word in arguments:
        parts += [[word]] if word.startswith("--") else []
        parts[-1] += [] if word.startswith("--") else [word]
    kept = [part for part in parts if not part or part[0] not in options]
    return [*itertools.chain.from_iterable(kept), *options]
