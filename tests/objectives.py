"""Small networks with every combination of losses, and a training step."""

import torch
from torch import Tensor

from itpn.masked.masked_model import MaskedImageModel
from itpn.tasks.configs import PretrainingModelConfig, TeacherConfig
from itpn.tasks.pretraining.network import build_masked_model
from itpn.teachers.ema import EMATeacher

OBJECTIVES = {
    "pixel": {},
    "feature": {
        "pixel_weight": 0.0,
        "feature_weight": 1.0,
        "auxiliary_weight": 1.0,
        "feature_patches": "all",
        "masked_patches": "mask_token",
        "mask": "block",
        "mask_ratio": 0.4,
        "decoder_depth": 0,
        "rel_pos_bias": True,
        "init_values": 0.1,
    },
    "feature of masked patches": {
        "pixel_weight": 0.0,
        "feature_weight": 1.0,
        "masked_patches": "mask_token",
        "mask": "block",
        "decoder_depth": 0,
    },
    "feature, dropped": {"feature_weight": 1.0, "auxiliary_weight": 1.0, "rel_pos_bias": True},
    "mfm": {"pyramid_weights": (0.1, 0.2, 0.3), "mask": "block"},
}


def build_small(teacher: str | None, img_size: tuple[int, int] = (32, 48), **settings) -> MaskedImageModel:
    """Of other teachers than an EMA the features have 24 channels."""
    torch.manual_seed(0)
    small = {
        "patch_size": 8,
        "decoder_embed_dim": 32,
        "decoder_depth": 1,
        "decoder_num_heads": 2,
        "pyramid_head_width": 64,
    }
    config = PretrainingModelConfig("itpn_nano", **{**small, **settings})
    return build_masked_model(config, img_size, TeacherConfig(teacher, width=None if teacher in (None, "ema") else 24))


def build(objective: str, **settings) -> MaskedImageModel:
    teacher = {"pixel": None, "mfm": "ema"}.get(objective, "outside")
    return build_small(teacher, **{**OBJECTIVES[objective], **settings})


def step(model: MaskedImageModel, teacher: EMATeacher | None, images: Tensor, forward=None) -> Tensor:
    """Forward and backward pass on normalized images [B, 3, 32, 48]; returns the loss."""
    forward = model if forward is None else forward
    target = teacher(images) if teacher else None
    if target is None and model.feature_losses:
        target = torch.linspace(-1, 1, 24 * 24, device=images.device).reshape(1, 24, 24).expand(len(images), -1, -1)
    loss = forward(images, target=target).loss
    loss.backward()
    return loss
