"""Whose names a file's tensors have, and what they are called here: one file for each origin."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from itpn.checkpoints.adapters import fast_itpn, itpn, mmpretrain, ours
from itpn.models.position import Grid

Layout = Literal["itpn", "official", "official_fast", "mmpretrain"]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """What is known of files of one origin.

    Attributes:
        title: who writes them.
        to_ours: tensors under our names, with the prefixes ``backbone.``, ``pyramid.``, ``decoder.``, ``auxiliary.``
            and the mask token; and those that our networks do not have, under their own names. ValueError where the
            blocks are not those of three stages.
        from_ours: undoes it bit by bit, given the grid of the relative position tables, whose index public files hold
            as well; returns the tensors and those of our names that have none of theirs. None for our own files.
        complete: sets what their code does and no tensor shows.
    """

    title: str
    to_ours: Callable[[Tensors], tuple[dict[str, Tensor], dict[str, Tensor]]]
    from_ours: Callable[[Tensors, Grid | None], tuple[dict[str, Tensor], list[str]]] | None = None
    complete: Callable[[Any], None] = lambda network: None


ADAPTERS: dict[Layout, Adapter] = {
    "itpn": Adapter(ours.TITLE, ours.to_ours),
    "official": Adapter(itpn.TITLE, itpn.to_ours, itpn.from_ours, itpn.complete),
    "official_fast": Adapter(fast_itpn.TITLE, fast_itpn.to_ours, fast_itpn.from_ours, itpn.set_auxiliary_norm),
    "mmpretrain": Adapter(mmpretrain.TITLE, mmpretrain.to_ours, mmpretrain.from_ours, mmpretrain.complete),
}


def detect_layout(names: Iterable[str]) -> Layout | None:
    """Whose names these are; None for another network's."""
    names = set(names)
    if any(re.match(r"(backbone\.)?(stages\.0\.0\.mlp|merges\.0)\.", name) for name in names):
        return "itpn"
    if not any(re.match(r"(backbone\.)?blocks\.\d+\.reduction\.", name) for name in names):
        return None
    if any(name.startswith(("backbone.blocks.", "neck.", "head.fc.", "head.cls_head.")) for name in names):
        return "mmpretrain"
    if any(re.match(r"blocks\.\d+\.(attn\.q_proj|mlp\.w1|mlp\.ffn_ln)\.", name) for name in names):
        return "official_fast"
    # a bare HiViT of mmpretrain differs from the original in one name
    return "mmpretrain" if "pos_embed" in names else "official"


def to_ours(tensors: Tensors, layout: Layout) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """See :class:`Adapter`."""
    return ADAPTERS[layout].to_ours(tensors)


def from_ours(
    tensors: Tensors, layout: Layout, rel_pos_grid: Grid | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """See :class:`Adapter`; there is none to :data:`itpn <Layout>`."""
    convert = ADAPTERS[layout].from_ours
    assert convert is not None
    return convert(tensors, rel_pos_grid)
