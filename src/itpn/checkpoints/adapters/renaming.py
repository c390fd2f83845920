"""Renaming by prefixes: one table serves both directions."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from itpn.models.position import Grid, relative_position_index

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


class Adapter:
    """What is known of files of one origin.

    Attributes:
        title: who writes them.
    """

    title: str

    def pairs(self, depths: Depths, features: bool) -> Pairs:
        """Prefixes, theirs and ours.

        Args:
            features: of a model that predicts a teacher's features, not pixels.
        """
        return []

    def pairs_inside(self, name: str) -> Pairs:
        """Of one of our names, the pairs below its block."""
        return IN_BLOCKS

    def skip(self, tensors: Tensors) -> tuple[str, ...]:
        """Beginnings of our names that are not taken."""
        return ()

    def unshown(self, pyramid: bool, headed: bool) -> tuple[dict[str, Any], list[str]]:
        """What their code does and no tensor shows; of heads :meth:`itpn.models.heads.Head.adjust` knows it.

        Args:
            pyramid: whether the file has one.
            headed: whether it has a head on its pyramid that is read.

        Returns:
            Arguments of the backbone, and those that may be wrong, as "name=value (reason)".
        """
        return {}, []

    def to_ours(self, tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tensors under our names: prefixes ``backbone.``, ``pyramid.``, ``decoder.``, ``auxiliary.``, or a mask token.

        Returns:
            These, and those that our networks do not have, under their own names.

        Raises:
            ValueError: the blocks are not those of three stages.
        """
        pairs = self.pairs(read_depths(tensors), predicts_features(tensors))
        skip = self.skip(tensors)
        ours, others = {}, {}
        for name, tensor in tensors.items():
            renamed = None if name.endswith("relative_position_index") else rename(name, pairs)
            if renamed is None or renamed.startswith(skip):
                others[name] = tensor
            else:
                ours[_rename_inside(renamed, self.pairs_inside(renamed))] = tensor
        return ours, others

    def from_ours(self, tensors: Tensors, rel_pos_grid: Grid | None = None) -> tuple[dict[str, Tensor], list[str]]:
        """Undo :meth:`to_ours` bit by bit.

        Args:
            rel_pos_grid: of the relative position tables, whose index public files hold as well.

        Returns:
            The tensors, and our names that have none of theirs.
        """
        features = any(name.startswith("decoder.heads.feature") for name in tensors)
        back = _swap(self.pairs(read_our_depths(tensors), features))
        theirs, left = {}, []
        for name, tensor in tensors.items():
            renamed = rename(_rename_inside(name, _swap(self.pairs_inside(name))), back)
            if renamed is None:
                left.append(name)
            else:
                theirs[renamed] = tensor
        if rel_pos_grid is not None:
            index = relative_position_index(rel_pos_grid)
            theirs |= {name: index.clone() for name in self.index_names(theirs)}
        return theirs, left

    def index_names(self, theirs: Tensors) -> list[str]:
        """Their names of the index of relative positions."""
        return ["relative_position_index"]


def _swap(pairs: Pairs) -> Pairs:
    return [(ours, theirs) for theirs, ours in pairs]


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
