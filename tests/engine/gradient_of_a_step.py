"""Run by test_distributed.py, alone and under torchrun: trains by each settings file, and saves the first gradient.

Usage: gradient_of_a_step.py SETTINGS...; gradients go beside them, as .pt.
"""

import sys
from pathlib import Path

import torch

import itpn.engine.pretraining
import itpn.pretraining.model
from itpn.config import read_yaml
from itpn.engine.run import train
from itpn.tasks.pretrain import PretrainingTask


def mask_of_content(images, mask_ratio):
    """A mask that depends on each image alone, so that it does not matter which process has the image."""
    masks = []
    for image in images:
        generator = torch.Generator().manual_seed(int(image.double().abs().sum() * 1000))
        hidden = torch.randperm(16, generator=generator)[4:]
        masks.append(torch.zeros(16, dtype=torch.bool).scatter(0, hidden, True))
    return torch.stack(masks)


class Task(PretrainingTask):
    def on_before_optimizer_step(self, optimizer):
        if self.global_rank == 0 and self.trainer.global_step == 0:
            gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
            torch.save(gradients, path.with_suffix(".pt"))


forward = itpn.pretraining.model.MaskedImageModel.forward
itpn.pretraining.model.MaskedImageModel.forward = lambda self, images, mask=None, target=None: forward(
    self, images, mask_of_content(images, 0.75) if mask is None else mask, target
)
itpn.engine.pretraining.PretrainingTask = Task
for path in map(Path, sys.argv[1:]):
    recipe, config = read_yaml(path)
    train(config, recipe)
