"""Renaming by prefixes: one table serves both directions."""

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

Pairs = list[tuple[str, str]]  # theirs, ours
Tensors = Mapping[str, Tensor]
Depths = tuple[int, int, int]

IN_BLOCKS: Pairs = [("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")]
BLOCK = re.compile(r"((?:backbone\.stages\.\d|auxiliary\.blocks|decoder\.blocks|pyramid\.\w+\.\d)\.\d+)\.(.*)")


def read_depths(names: Iterable[str]) -> Depths:
    """Blocks of each stage under public names, which number blocks and merges together.

    Raises:
        ValueError: there are not two merges.
    """
    numbered = [m for name in names if (m := re.match(r"(?:backbone\.)?blocks\.(\d+)\.(.*)", name))]
    merges = sorted({int(m[1]) for m in numbered if m[2].startswith("reduction")})
    if len(merges) != 2:
        raise ValueError(f"two merges between three stages expected, found {len(merges)}")
    last = max(int(m[1]) for m in numbered)
    return merges[0], merges[1] - merges[0] - 1, last - merges[1]


def read_our_depths(names: Iterable[str]) -> Depths:
    """Blocks of each stage under our names."""
    found = [re.match(r"(?:backbone\.)?stages\.(\d)\.(\d+)\.", name) for name in names]
    blocks = {(int(m[1]), int(m[2])) for m in found if m}
    first, second, third = (1 + max((b for s, b in blocks if s == stage), default=-1) for stage in range(3))
    return first, second, third


def number_blocks(depths: Depths) -> Pairs:
    """Blocks and merges, which public names count in one list."""
    ours = [f"backbone.stages.0.{i}" for i in range(depths[0])] + ["backbone.merges.0"]
    ours += [f"backbone.stages.1.{i}" for i in range(depths[1])] + ["backbone.merges.1"]
    ours += [f"backbone.stages.2.{i}" for i in range(depths[2])]
    return [(f"blocks.{number}", name) for number, name in enumerate(ours)]


def predicts_features(names: Iterable[str]) -> bool:
    """Whether public names are of a model that predicts a teacher's features instead of pixels."""
    return any(name.endswith(("lm_head.weight", "cls_head.weight")) for name in names)


def rename_to_ours(
    tensors: Tensors, pairs: Pairs, inside: Callable[[str], Pairs], skip: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors under our names, and those without one under their own.

    Args:
        inside: of one of our names, the pairs below its block.
        skip: beginnings of our names that are not taken.
    """
    ours, others = {}, {}
    for name, tensor in tensors.items():
        renamed = rename(name, pairs)
        if renamed is None or name.endswith("relative_position_index") or renamed.startswith(skip):
            others[name] = tensor
        else:
            ours[_rename_inside(renamed, inside(renamed))] = tensor
    return ours, others


def rename_from_ours(
    tensors: Tensors, pairs: Pairs, inside: Callable[[str], Pairs]
) -> tuple[dict[str, Tensor], list[str]]:
    """Undo :func:`rename_to_ours`; returns the tensors, and our names that have none of theirs."""
    theirs, left = {}, []
    back = [(ours, their) for their, ours in pairs]
    for name, tensor in tensors.items():
        renamed = rename(_rename_inside(name, [(our, their) for their, our in inside(name)]), back)
        if renamed is None:
            left.append(name)
        else:
            theirs[renamed] = tensor
    return theirs, left


def rename(name: str, pairs: Pairs) -> str | None:
    """A name with its prefix replaced by the first pair that fits; None if none does."""
    for old, new in pairs:
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    return None


def _rename_inside(name: str, pairs: Pairs) -> str:
    """Names below a block, of a tensor whose prefix is ours."""
    found = BLOCK.match(name)
    renamed = rename(found[2], pairs) if found else None
    return name if found is None or renamed is None else f"{found[1]}.{renamed}"
