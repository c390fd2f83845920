"""One description for any of our networks."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NoReturn

from itpn.models.variants import BACKBONES

Options = Mapping[str, Any]

# how a network is trained, which its weights do not depend on once they are there
TRAINING_ONLY = ("drop_rate", "drop_path_rate", "weight_init")


class FrozenDict(dict[str, Any]):
    """A dict that cannot be changed; deep copies of it can. JSON, ``asdict`` and ``**`` take it for a dict."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a NetworkSpec cannot be changed; with_backbone, with_options and replace make another")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return FrozenDict({name: _freeze(own) for name, own in value.items()})
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class NetworkSpec:
    """What a network is built from (:func:`itpn.models.build.build`), and what checkpoints say of it.

    Attributes:
        backbone: arguments of :func:`itpn.models.build.make_backbone`, those of a classifier aside.
        pyramid: arguments of :class:`itpn.models.pyramid.FeaturePyramid`; None for a network without one.
        levels: the maps of a pyramid without a head, see :class:`itpn.models.pyramid.PyramidBackbone`.
        head: name of the registered head on top (:class:`itpn.models.heads.Head`); None for a backbone, or a backbone
            and its pyramid.
        options: arguments of the head.
    """

    backbone: Options
    pyramid: Options | None = None
    levels: str = "pyramid"
    head: str | None = None
    options: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("backbone", "pyramid", "options"):
            object.__setattr__(self, name, _freeze(getattr(self, name)))

    def __deepcopy__(self, memo: dict[int, Any]) -> "NetworkSpec":
        return self  # nothing in it changes

    def __reduce__(self) -> tuple[Any, ...]:
        return NetworkSpec, tuple(getattr(self, own.name) for own in fields(self))

    @property
    def variant(self) -> str | None:
        """The registered model with these sizes."""
        return find_variant(self.backbone)

    def with_backbone(self, **arguments: Any) -> "NetworkSpec":
        """The same network with other arguments of the backbone."""
        return replace(self, backbone={**self.backbone, **arguments})

    def with_options(self, **options: Any) -> "NetworkSpec":
        """The same network with other options of the head."""
        return replace(self, options={**self.options, **options})

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for JSON, without what is for training only."""
        backbone = {name: value for name, value in self.backbone.items() if name not in TRAINING_ONLY}
        return copy.deepcopy({**vars(self), "backbone": backbone})


def spec_of(network: Any) -> NetworkSpec:
    """What :func:`itpn.models.build.build` built a network from."""
    spec = network.spec
    assert isinstance(spec, NetworkSpec)
    return spec


def find_variant(backbone: Options) -> str | None:
    """The registered model of these widths and depths; of several, one with the same relative positions."""
    found = [name for name, settings in BACKBONES.items() if same_sizes(settings, backbone)]
    biased = bool(backbone.get("rel_pos_bias"))
    return min(found, key=lambda name: BACKBONES[name].get("rel_pos_bias", False) != biased, default=None)


def same_sizes(one: Options, other: Options) -> bool:
    """Whether backbones have the same widths, depths and kind of blocks."""
    keys = ("kind", "embed_dim", "depths", "swiglu", "sub_norm")
    return all(_plain(one.get(key, False)) == _plain(other.get(key, False)) for key in keys)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
