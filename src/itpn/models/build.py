"""The only place that builds networks: from a :class:`NetworkSpec`, with the heads that tasks have registered."""

from collections.abc import Mapping
from typing import Any

from timm import create_model
from torch import nn

from itpn.models.heads import find_head
from itpn.models.hivit import HiViT
from itpn.models.pyramid import PyramidBackbone
from itpn.models.spec import NetworkSpec, find_variant
from itpn.models.variants import BACKBONES, WITH_PYRAMID


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


def build_backbone(spec: NetworkSpec, num_classes: int = 0, **classifier: Any) -> HiViT:
    """The backbone of a spec, with a classifier or without one."""
    network = _make(HiViT, {name: name for name in BACKBONES}, {**spec.backbone, **classifier}, num_classes=num_classes)
    assert isinstance(network, HiViT)
    return network


def build_pyramid(spec: NetworkSpec, levels: str) -> PyramidBackbone:
    """Backbone and pyramid of a spec as maps, see :class:`PyramidBackbone`."""
    own = {name if name == "mlp_ratio" else f"pyramid_{name}": value for name, value in (spec.pyramid or {}).items()}
    network = _make(PyramidBackbone, WITH_PYRAMID, {**own, **spec.backbone}, levels=levels)
    assert isinstance(network, PyramidBackbone)
    return network


def _make(kind: type[nn.Module], names: Mapping[str, str], arguments: dict[str, Any], **more: Any) -> nn.Module:
    """Through timm where it knows the network, whose settings it then carries."""
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()} | more
    variant = find_variant(arguments)
    return create_model(names[variant], **arguments) if variant and variant in names else kind(**arguments)
