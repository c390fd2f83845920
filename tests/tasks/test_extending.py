"""A teacher and a pyramid loss of one's own, as CONTRIBUTING.md adds them."""

import csv
from dataclasses import replace

import objectives
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from itpn.masked.masked_model import MaskedImageModel, Objective
from itpn.masked.targets import IMAGE_TARGETS, patchify
from itpn.models.build import build
from itpn.tasks.configs import PretrainingConfig, PretrainingModelConfig
from itpn.tasks.pretraining.module import PretrainingModule
from itpn.tasks.pretraining.network import make_spec
from itpn.tasks.pretraining.prediction import mask_and_predict
from itpn.tasks.run import train
from itpn.teachers.feature_teacher import TEACHERS, FeatureTeacher
from itpn.teachers.timm_teacher import count_teacher_parameters
from itpn.training.config import freeze


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


def mean_colours(images, patch_size, picked):
    return patchify(F.avg_pool2d(images, patch_size), 1, picked)


def build_colour_model():
    """It predicts pixels, and the mean colours of patches by a head on the coarsest level."""
    config = PretrainingModelConfig("itpn_nano", patch_size=8, decoder_depth=1, decoder_embed_dim=32)
    spec = make_spec(config, (32, 32))
    head = {"heads": {"colour_3": 3}, "width": 64, "depth": 1, "num_heads": 1, "levels": (2,), "add_mask_tokens": True}
    objective = {**spec.options["objective"], "weights": {"pixel": 1.0, "colour_3": 1.0}}
    return build(replace(spec, options={**spec.options, "pyramid_heads": {"colour_3": head}, "objective": objective}))


def test_a_pyramid_loss(monkeypatch):
    """Against a slow computation."""
    monkeypatch.setitem(IMAGE_TARGETS, "colour_3", mean_colours)
    model = build_colour_model()
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


def test_visualizations_name_what_they_show(monkeypatch):
    """Pixels where they are predicted, else the first loss: its own target, or the features of a teacher."""
    monkeypatch.setitem(IMAGE_TARGETS, "colour_3", mean_colours)
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)

    def columns(model, teacher=None):
        module = PretrainingModule(model, freeze(PretrainingConfig()), "test", teacher=teacher)
        return list(mask_and_predict(module, images))

    both = build_colour_model()
    assert columns(both) == ["original", "masked", "predicted"]
    own = MaskedImageModel(both.backbone, both.pyramid, None, Objective({"colour_3": 1.0}), None, both.pyramid_heads)
    assert columns(own) == ["original", "masked", "target colour_3", "predicted colour_3"]
    features = objectives.build("feature")
    assert columns(features) == ["original", "masked", "predicted features"]
    taught = columns(features, build_toy(None, (4, 6)))
    assert taught == ["original", "masked", "teacher's features", "predicted features"]
