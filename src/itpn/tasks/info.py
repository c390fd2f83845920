"""What `itpn info` says of a network: parameters, MACs, shapes."""

from collections.abc import Callable
from typing import Any

import torch
from timm import create_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from itpn.models.backbone import Backbone
from itpn.models.build import build
from itpn.models.layers import patches_to_map
from itpn.models.spec import NetworkSpec
from itpn.models.variants import BACKBONES, PUBLISHED_PYRAMID, PYRAMIDS, WITH_PYRAMID

Rows = list[tuple[str, str]]  # titles and texts; a row of two empty ones divides


def count_parameters(module: nn.Module) -> float:
    """Millions of parameters, fixed position tables included."""
    return sum(p.numel() for p in module.parameters()) / 1e6


@torch.no_grad()
def count_macs(forward: Callable[..., object], *inputs: Tensor) -> float:
    """Billions of MACs of a forward pass: matrix products and attention."""
    # older versions of torch do not count its fused attention on a CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(*inputs)
    return counter.get_total_flops() / 2e9


def make_images(backbone: Backbone, size: tuple[int, int]) -> Tensor:
    """An image of zeros, on the device of the backbone."""
    return torch.zeros(1, backbone.in_chans, *size, device=next(backbone.parameters()).device)


def describe_backbone(backbone: Backbone, size: tuple[int, int]) -> Rows:
    """MACs of a backbone, all patches computed."""
    images = make_images(backbone, size)
    gmacs = count_macs(backbone.eval().forward_stages, images)
    return [("MACs", f"{gmacs:.2f} G, backbone at {size[0]}x{size[1]} px, all patches")]


def describe_stages(backbone: Backbone, size: tuple[int, int]) -> Rows:
    """The shapes of the stages."""
    stages, grid = backbone.eval().forward_stages(make_images(backbone, size)), backbone.grid_of(size)
    return describe_maps("stage", [patches_to_map(stage, grid) for stage in stages], backbone)


def describe_classifier(backbone: Backbone, classes: str) -> Rows:
    """Of a backbone with a classifier, at the size of its images.

    Args:
        classes: what it tells apart, e.g. "a classifier of 10 classes".
    """
    size = (backbone.image_shape[1], backbone.image_shape[2])
    return [
        ("parameters", f"{count_parameters(backbone):.2f} M with {classes}"),
        *describe_backbone(backbone, size),
        ("", ""),
        *describe_stages(backbone, size),
    ]


def describe_maps(name: str, maps: Any, network: Any) -> Rows:
    """The shapes of maps, finest first."""
    strides = [info["reduction"] for info in network.feature_info]
    return [(f"{name} {i}", _shape(x, strides[i - 1])) for i, x in enumerate(maps, start=1)]


def describe_model(name: str) -> Rows:
    """Of a model that timm knows: a backbone, with its pyramid where there is one."""
    base = next((plain for plain, whole in WITH_PYRAMID.items() if whole == name), name)
    with torch.device("meta"):  # shapes without values
        backbone = create_model(base)
    assert isinstance(backbone, Backbone)
    size = (224, 224)
    aside = ", pyramid aside," if base != name else ""
    rows = [
        ("parameters", f"{count_parameters(backbone):.2f} M{aside} with a classifier of 1000 classes"),
        *describe_backbone(backbone, size),
        ("", ""),
        *describe_stages(backbone, size),
    ]
    if base in WITH_PYRAMID:
        with torch.device("meta"):
            whole = build(NetworkSpec(BACKBONES[base], PYRAMIDS.get(base, PUBLISHED_PYRAMID)))
        maps = whole.eval()(make_images(backbone, size)).values()
        rows += describe_maps("pyramid", maps, whole)
    return rows


def describe_headed(model: Any, classes: int, size: tuple[int, int]) -> Rows:
    """Of a network with a head on backbone and pyramid.

    Args:
        classes: of the head.
        size: height and width of the images in pixels.
    """
    whole, trunk = count_parameters(model), count_parameters(model.backbone.backbone)
    neck = count_parameters(model.backbone) - trunk
    heads = f"pyramid {neck:.2f}, heads for {classes} classes {whole - trunk - neck:.2f}"
    backbone = model.backbone.eval().to("meta")
    images = torch.zeros(1, 3, *size, device="meta")
    gmacs = count_macs(backbone, images)
    return [
        ("parameters", f"{whole:.2f} M: backbone {trunk:.2f}, {heads}"),
        ("MACs", f"{gmacs:.2f} G, backbone and pyramid at {size[0]}x{size[1]} px"),
        ("", ""),
        *describe_maps("level", backbone(images).values(), backbone),
    ]


def _shape(x: Tensor, stride: int) -> str:
    return f"{x.shape[1]} channels, {x.shape[2]}x{x.shape[3]}, stride {stride}"
