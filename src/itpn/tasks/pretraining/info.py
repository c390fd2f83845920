"""What `itpn info` says of a pre-training recipe."""

import torch

from itpn.checkpoints.files import Checkpoint
from itpn.tasks.info import (
    Rows,
    count_macs,
    count_parameters,
    describe_backbone,
    describe_maps,
    describe_stages,
    make_images,
)
from itpn.tasks.pretraining.config import PretrainingConfig
from itpn.tasks.pretraining.network import build_from
from itpn.tasks.pretraining.recipes import CLIP_B
from itpn.teachers.timm_teacher import count_teacher_parameters
from itpn.training.config import image_size


def describe(config: PretrainingConfig, checkpoint: Checkpoint | None) -> Rows:
    with torch.device("meta"):
        model = build_from(config)
    backbone, size = model.backbone, image_size(config.data)
    images = make_images(backbone, size)
    whole, trunk = count_parameters(model), count_parameters(backbone)
    rows = [("parameters", f"{whole:.2f} M: backbone {trunk:.2f}, pyramid and decoder {whole - trunk:.2f}")]
    rows += [("" if i else "teacher", line) for i, line in enumerate(_teacher_lines(config, whole))]
    rows += describe_backbone(backbone, size)
    masked = f"{model.objective.mask_ratio:.0%} masked"
    rows.append(("", f"{count_macs(model.train(), images):.2f} G for a forward pass in training, {masked}"))
    if config.teacher.name == "ema":
        ema = count_macs(model.eval().extract_pyramid, images)
        rows.append(("", f"{ema:.2f} G for that of the EMA teacher, nothing masked"))
    elif config.teacher.name is not None:
        rows.append(("", "and that of the teacher"))
    rows += [("", ""), *describe_stages(backbone, size)]
    return rows + describe_maps("pyramid", model.eval().extract_pyramid(images), backbone)


WHOLE_CLIP_B = 149.62  # millions of parameters of OpenAI's CLIP with ViT-B/16, text tower included


def _teacher_lines(config: PretrainingConfig, student: float) -> list[str]:
    """Who teaches, and what that adds; nothing of a teacher is trained or kept in model.safetensors."""
    name = config.teacher.name
    if name is None:
        return []
    if name == "ema":
        return ["ema: the EMA of the network itself, a copy of backbone and pyramid"]
    size = count_teacher_parameters(name, config.teacher.checkpoint) / 1e6
    lines = [f"{name}: {size:.2f} M, frozen, not in the sum above nor in model.safetensors"]
    if config.model.name == "itpn_base" and name == CLIP_B:
        lines.append(
            f"mmpretrain's table has 233 M for this: {student:.2f} and {WHOLE_CLIP_B} of the whole CLIP, whose text "
            "tower is never needed"
        )
    return lines
