"""`itpn info`: how large a network is, what it costs, what comes out where."""

from collections.abc import Callable

import torch
from rich.table import Table
from timm import create_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from itpn.checkpoints.files import read_checkpoint
from itpn.checkpoints.finetuning import build_recipe
from itpn.config import Config, ModelConfig, RunConfig, image_size
from itpn.masked.build import build_masked_model
from itpn.models.detector import Detector
from itpn.models.hivit import HiViT
from itpn.models.segmenter import Segmenter
from itpn.models.variants import WITH_PYRAMID
from itpn.system.console import Answer
from itpn.tasks.recipes import CLIP_B
from itpn.teachers.timm_teacher import count_teacher_parameters


def count_parameters(module: nn.Module) -> float:
    """Millions of parameters, fixed position tables included."""
    return sum(p.numel() for p in module.parameters()) / 1e6


@torch.no_grad()
def count_flops(forward: Callable[..., object], *inputs: Tensor) -> float:
    """Billions of multiply-adds of a forward pass: matrix products and attention."""
    # older versions of torch do not count its fused attention on a CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(*inputs)
    return counter.get_total_flops() / 2e9


def print_info(name: str, config: RunConfig | None, checkpoint: str | None = None) -> None:
    """Print parameters, FLOPs and shapes of a recipe's model, or of a bare backbone when there is no config.

    Args:
        checkpoint: gives the network of a recipe that takes it from one.
    """
    found = None if checkpoint is None else read_checkpoint(checkpoint)
    if config is None:
        base = next((plain for plain, whole in WITH_PYRAMID.items() if whole == name), name)
        size, model = (224, 224), None
        with torch.device("meta"):  # shapes without values
            backbone = create_model(base)
            if base in WITH_PYRAMID:
                model = build_masked_model(ModelConfig(name=base), size)
        assert isinstance(backbone, HiViT)
    elif not isinstance(config, Config):
        built = build_recipe(config, found=found)[0]
        if isinstance(built, Detector | Segmenter):
            print_headed(name, built, config)
            return
        backbone, model, base = built, None, name
        size = (backbone.image_shape[1], backbone.image_shape[2])
    else:
        size = image_size(config.data)
        with torch.device("meta"):
            model = build_masked_model(config.model, size, config.teacher)
        backbone = model.backbone
    images = torch.zeros(
        1, backbone.patch_embed.proj.in_channels, *size, device=backbone.patch_embed.proj.weight.device
    )

    table = Table(title=name, show_header=False, title_justify="left")
    if not isinstance(config, Config):
        aside = ", pyramid aside," if base != name else ""
        size_m = f"{count_parameters(backbone):.2f} M"
        table.add_row("parameters", f"{size_m}{aside} with a classifier of 1000 classes")
    else:
        assert model is not None
        whole, trunk = count_parameters(model), count_parameters(backbone)
        table.add_row("parameters", f"{whole:.2f} M: backbone {trunk:.2f}, pyramid and decoder {whole - trunk:.2f}")
        for i, line in enumerate(_teacher_lines(config, whole)):
            table.add_row("" if i else "teacher", line)
    gflops = count_flops(backbone.eval().forward_features, images)
    table.add_row("FLOPs", f"{gflops:.2f} G multiply-adds, backbone at {size[0]}x{size[1]} px, all units")
    if isinstance(config, Config) and model is not None:
        hidden = f"{model.objective.mask_ratio:.0%} of the units hidden"
        table.add_row("", f"{count_flops(model.train(), images):.2f} G for a forward pass in training, {hidden}")
        if config.teacher.name == "ema":
            average = count_flops(model.eval().extract_pyramid, images)
            table.add_row("", f"{average:.2f} G for that of the moving average, nothing hidden")
        elif config.teacher.name is not None:
            table.add_row("", "and that of the teacher")
    table.add_section()
    for i, stage in enumerate(backbone.eval().forward_intermediates(images, intermediates_only=True), start=1):
        table.add_row(f"stage {i}", _shape(stage, backbone.feature_info[i - 1]["reduction"]))
    if model is not None:
        for i, level in enumerate(model.eval().extract_pyramid(images)):
            table.add_row(f"pyramid {i + 1}", _shape(level, backbone.feature_info[i]["reduction"]))
    Answer().print(table)


def print_headed(name: str, model: Detector | Segmenter, config: RunConfig) -> None:
    """Print parameters, FLOPs and shapes of a detector or segmenter."""
    whole, trunk = count_parameters(model), count_parameters(model.backbone.backbone)
    neck = count_parameters(model.backbone) - trunk
    if isinstance(model, Detector):
        # as torchvision pads an image whose sides are 3:5
        step, classes = model.transform.size_divisible, model.num_classes - 1
        sides = [-(-side // step) * step for side in (model.transform.min_size[-1], model.transform.max_size)]
    else:
        step, classes = model.backbone.backbone.patch_size, model.num_classes
        sides = [-(-side // step) * step for side in image_size(config.data)]
    table = Table(title=name, show_header=False, title_justify="left")
    heads = f"pyramid {neck:.2f}, heads for {classes} classes {whole - trunk - neck:.2f}"
    table.add_row("parameters", f"{whole:.2f} M: backbone {trunk:.2f}, {heads}")
    backbone = model.backbone.eval().to("meta")
    images = torch.zeros(1, 3, *sides, device="meta")
    gflops = count_flops(backbone, images)
    table.add_row("FLOPs", f"{gflops:.2f} G multiply-adds, backbone and pyramid at {sides[0]}x{sides[1]} px")
    table.add_section()
    for i, level in enumerate(backbone(images).values()):
        table.add_row(f"level {i + 1}", _shape(level, backbone.feature_info[i]["reduction"]))
    Answer().print(table)


WHOLE_CLIP_B = 149.62  # millions of parameters of OpenAI's CLIP with ViT-B/16, text tower included


def _teacher_lines(config: Config, student: float) -> list[str]:
    """Who teaches, and what that adds; nothing of a teacher is trained or kept in model.safetensors."""
    name = config.teacher.name
    if name is None:
        return []
    if name == "ema":
        return ["ema: the network's own moving average, a copy of backbone and pyramid"]
    size = count_teacher_parameters(name, config.teacher.checkpoint) / 1e6
    lines = [f"{name}: {size:.2f} M, frozen, not in the sum above nor in model.safetensors"]
    if config.model.name == "itpn_base" and name == CLIP_B:
        lines.append(
            f"mmpretrain's table has 233 M for this: {student:.2f} and {WHOLE_CLIP_B} of the whole CLIP, whose text "
            "tower is never needed"
        )
    return lines


def _shape(x: Tensor, stride: int) -> str:
    return f"{x.shape[1]} channels, {x.shape[2]}x{x.shape[3]}, stride {stride}"
