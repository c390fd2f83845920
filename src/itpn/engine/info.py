"""`itpn info`: how large a network is, what it costs, what comes out where."""

from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from timm import create_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from itpn.config import Config, ModelConfig, image_size
from itpn.models.hivit import HiViT
from itpn.pretraining.build import build_masked_model
from itpn.pretraining.masking import draw_random_mask
from itpn.pretraining.model import MaskedImageModel


def count_parameters(module: nn.Module) -> float:
    """Millions of parameters, fixed position tables included."""
    return sum(p.numel() for p in module.parameters()) / 1e6


@torch.no_grad()
def count_flops(forward: Callable[..., object], *inputs: Tensor) -> float:
    """Billions of multiply-adds of a forward pass: matrix products and attention."""
    with FlopCounterMode(display=False) as counter:
        forward(*inputs)
    return counter.get_total_flops() / 2e9


def print_info(name: str, config: Config | None) -> None:
    """Print parameters, FLOPs and shapes of a recipe's model, or of a bare backbone when there is no config."""
    if config is None:
        backbone = create_model(name)
        assert isinstance(backbone, HiViT)
        size, model = (224, 224), None
        if name.startswith("itpn"):
            model = build_masked_model(ModelConfig(name=name), size)
    else:
        size = image_size(config.data)
        model = build_masked_model(config.model, size)
        backbone = model.backbone
    images = torch.zeros(1, backbone.patch_embed.proj.in_channels, *size)

    table = Table(title=name, show_header=False, title_justify="left")
    if config is None:
        table.add_row("parameters", f"{count_parameters(backbone):.2f} M with a classifier of 1000 classes")
    else:
        assert model is not None
        trunk, rest = count_parameters(backbone), count_parameters(model.pyramid) + count_parameters(model.decoder)
        table.add_row("parameters", f"{trunk + rest:.2f} M: backbone {trunk:.2f}, pyramid and decoder {rest:.2f}")
    gflops = count_flops(backbone.eval().forward_features, images)
    table.add_row("FLOPs", f"{gflops:.2f} G multiply-adds, backbone at {size[0]}x{size[1]} px, all units")
    if config is not None and model is not None:
        hidden = f"{model.mask_ratio:.0%} of the units hidden"
        table.add_row("", f"{_masked_flops(model, images):.2f} G for a forward pass in training, {hidden}")
    table.add_section()
    for i, stage in enumerate(backbone.eval().forward_intermediates(images, intermediates_only=True), start=1):
        table.add_row(f"stage {i}", _shape(stage, backbone.feature_info[i - 1]["reduction"]))
    if model is not None:
        for i, level in enumerate(model.eval().extract_pyramid(images)):
            table.add_row(f"pyramid {i + 1}", _shape(level, backbone.feature_info[i]["reduction"]))
    Console().print(table)


def _masked_flops(model: MaskedImageModel, images: Tensor) -> float:
    model.train()
    grid = model.backbone.grid_of(images.shape[-2:])
    mask = draw_random_mask(1, grid[0] * grid[1], model.mask_ratio)
    return count_flops(model, images, mask)


def _shape(x: Tensor, stride: int) -> str:
    return f"{x.shape[1]} channels, {x.shape[2]}x{x.shape[3]}, stride {stride}"
