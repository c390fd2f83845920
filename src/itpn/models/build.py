"""The only place that builds networks: from a :class:`NetworkSpec`, with the heads that tasks have registered."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from timm import create_model
from torch import nn

from itpn.errors import UserError
from itpn.models.backbone import Backbone
from itpn.models.heads import find_head
from itpn.models.hivit import HiViT
from itpn.models.layers import WeightInit
from itpn.models.pyramid import Levels, PyramidBackbone, check_no_classifier
from itpn.models.spec import NetworkSpec, find_variant
from itpn.models.variants import BACKBONES, WITH_PYRAMID

# classes of backbones, by the "kind" of their variants; those without one are "hivit"
KINDS: dict[str, type[Backbone]] = {"hivit": HiViT}


def build(spec: NetworkSpec) -> nn.Module:
    """Build a network, randomly initialized.

    Raises:
        TypeError, ValueError, RuntimeError: there is no such argument, or sizes do not fit one another.
        KeyError: no head of that name is registered.
    """
    if spec.head is not None:
        network = find_head(spec.head).build(spec)
    elif spec.pyramid is not None:
        network = build_pyramid(spec, spec.levels)
    else:
        network = build_backbone(spec)
    network.spec = spec  # type: ignore[assignment]  # what checkpoints of the network hold
    return network


def build_backbone(spec: NetworkSpec, num_classes: int = 0, **classifier: Any) -> Backbone:
    """The backbone of a spec, with a classifier or without one."""
    arguments = {**spec.backbone, **classifier, "num_classes": num_classes}
    network = _make(make_backbone, {name: name for name in BACKBONES}, **arguments)
    assert isinstance(network, Backbone)
    return network


def build_pyramid(spec: NetworkSpec, levels: str) -> PyramidBackbone:
    """Backbone and pyramid of a spec as maps, see :class:`PyramidBackbone`."""
    own = {name if name == "mlp_ratio" else f"pyramid_{name}": value for name, value in (spec.pyramid or {}).items()}
    network = _make(make_pyramid, WITH_PYRAMID, **{**own, **spec.backbone, "levels": levels})
    assert isinstance(network, PyramidBackbone)
    return network


def _make(make: Callable[..., nn.Module], names: Mapping[str, str], **arguments: Any) -> nn.Module:
    """Through timm where it knows the network, whose settings it then carries."""
    variant = find_variant(arguments)
    return create_model(names[variant], **arguments) if variant and variant in names else make(**arguments)


def make_backbone(kind: str = "hivit", **arguments: Any) -> Backbone:
    """A backbone of one of :data:`KINDS`.

    Settings name the options of HiViT whatever the backbone: another class need not have those that are off.

    Raises:
        TypeError, ValueError: there is no such argument, or sizes do not fit one another.
        UserError: there is no such kind.
    """
    known, usual = backbone_arguments(kind), backbone_arguments()
    off = {name for name in arguments.keys() & usual.keys() if arguments[name] == usual[name].default}
    return KINDS[kind](**{name: value for name, value in arguments.items() if name in known or name not in off})


def make_pyramid(
    levels: Levels = "pyramid",
    pyramid_width: int = 256,
    pyramid_depth: int = 2,
    mlp_ratio: float = 4.0,
    num_classes: int = 0,
    global_pool: str = "",
    weight_init: WeightInit = "trunc_normal",
    **backbone: Any,
) -> PyramidBackbone:
    """A backbone with its pyramid, by the arguments that ``timm.create_model`` passes on.

    Raises:
        ValueError: ``num_classes`` or ``global_pool`` is set, or sizes do not fit one another.
    """
    check_no_classifier(num_classes, global_pool)
    inner = make_backbone(num_classes=0, weight_init=weight_init, **backbone)
    return PyramidBackbone(inner, levels, pyramid_width, pyramid_depth, mlp_ratio, weight_init)


def backbone_arguments(kind: str = "hivit") -> Mapping[str, inspect.Parameter]:
    """The arguments of a class of backbones by name.

    Raises:
        UserError: there is no such kind.
    """
    if str(kind) not in KINDS:
        raise UserError(f"no kind of backbone {kind!r}; there are {', '.join(KINDS)}: a newer itpn may have it")
    return inspect.signature(KINDS[kind]).parameters
