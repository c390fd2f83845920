"""A teacher and a pyramid loss of one's own, as CONTRIBUTING.md adds them."""

import csv
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from itpn.masked.targets import IMAGE_TARGETS, patchify
from itpn.models.build import build
from itpn.tasks.configs import PretrainingModelConfig
from itpn.tasks.pretraining.network import make_spec
from itpn.tasks.run import train
from itpn.teachers.feature_teacher import TEACHERS, FeatureTeacher
from itpn.teachers.timm_teacher import count_teacher_parameters


class ToyNetwork(nn.Module):
    """[B, 3, h, w] -> [B, h / 16, w / 16, 24]."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 16, 16)

    def forward(self, images):
        return self.conv(images).permute(0, 2, 3, 1)


def build_toy(checkpoint, grid):
    size = (16 * grid[0], 16 * grid[1])
    return FeatureTeacher("toy", ToyNetwork(), grid, size, 24, (0.5,) * 3, (0.25,) * 3)


def test_a_teacher(settings, monkeypatch, capsys):
    monkeypatch.setitem(TEACHERS, "toy", build_toy)
    config = settings(max_steps=2)
    config.teacher.name, config.model.feature_weight = "toy", 1.0
    folder = train(config, "test")
    assert "toy, a teacher of your own" in capsys.readouterr().out
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["loss_feature"]) > 0
    assert count_teacher_parameters("toy", None) == 24 * (3 * 16 * 16 + 1)


def test_a_pyramid_loss(monkeypatch):
    """Mean colours of patches, predicted by a head on the coarsest level, against a slow computation."""

    def mean_colours(images, patch_size, picked):
        return patchify(F.avg_pool2d(images, patch_size), 1, picked)

    monkeypatch.setitem(IMAGE_TARGETS, "colour_3", mean_colours)
    config = PretrainingModelConfig("itpn_nano", patch_size=8, decoder_depth=1, decoder_embed_dim=32)
    spec = make_spec(config, (32, 32))
    head = {"heads": {"colour_3": 3}, "width": 64, "depth": 1, "num_heads": 1, "levels": (2,), "add_mask_tokens": True}
    objective = {**spec.options["objective"], "weights": {"pixel": 1.0, "colour_3": 1.0}}
    model = build(replace(spec, options={**spec.options, "pyramid_heads": {"colour_3": head}, "objective": objective}))
    assert model.feature_losses == []
    for parameter in model.pyramid_heads["colour_3"].heads.parameters():
        nn.init.zeros_(parameter)  # it predicts zeros
    images, mask = torch.randn(2, 3, 32, 32), model.draw_mask(2, (4, 4))
    expected = [
        images[image, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].mean(dim=(1, 2)).square().mean()
        for image in range(2)
        for row in range(4)
        for column in range(4)
        if mask[image, 4 * row + column]
    ]
    for mode in (True, False):  # in training, masked patches alone are predicted
        losses = model.train(mode)(images, mask).losses
        assert losses["colour_3"].item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
