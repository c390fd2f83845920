"""Run by test_distributed.py, alone and under torchrun: trains by each settings file, and saves the first gradient.

Usage: gradient_of_a_step.py SETTINGS...; beside them go the gradients as .pt, and as .json the names of the collective
operations of each pass, until the next begins.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

import itpn.masked.masked_model
import itpn.tasks.pretraining.module
import itpn.training.compilation
from itpn.tasks.recipe_files import read_settings
from itpn.tasks.run import train
from itpn.training import loop


def mask_of_content(images, mask_ratio):
    """A mask that depends on each image alone, so that it does not matter which process has the image."""
    masks = []
    for image in images:
        generator = torch.Generator().manual_seed(int(image.double().abs().sum() * 1000))
        masked = torch.randperm(16, generator=generator)[4:]
        masks.append(torch.zeros(16, dtype=torch.bool).scatter(0, masked, True))
    return torch.stack(masks)


class Passes:
    """The collective operations of each pass, from its beginning to the beginning of the next."""

    def __init__(self):
        self.names, self.profile = [], None

    def end(self):
        if self.profile is not None:
            self.profile.stop()
            self.names.append([event.name for event in self.profile.events() if event.name.startswith("c10d::")])

    def begin(self):
        self.end()
        self.profile = profile(activities=[ProfilerActivity.CPU])
        self.profile.start()


def take_pass(run, *args, original=loop.take_pass):
    if run.fabric.global_rank == 0:
        passes.begin()
    return original(run, *args)


def update(run, original=loop.update):
    if run.step == 0:
        gradients = {name: whole(p.grad) for name, p in run.module.model.named_parameters() if p.grad is not None}
        if run.fabric.global_rank == 0:
            torch.save(gradients, path.with_suffix(".pt"))
    original(run)


def train_on(*args, original=loop.train):
    original(*args)
    if args[0].fabric.global_rank == 0:
        passes.end()
        path.with_suffix(".json").write_text(json.dumps(passes.names))


def whole(gradient):
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()


forward = itpn.masked.masked_model.MaskedImageModel.forward
itpn.masked.masked_model.MaskedImageModel.forward = lambda self, images, mask=None, target=None, valid=None: forward(
    self, images, mask_of_content(images, 0.75) if mask is None else mask, target, valid
)
loop.take_pass, loop.update, loop.train = take_pass, update, train_on
compile_network = torch.compile


def fail_in_the_first_process(graph, inputs):
    if torch.distributed.is_initialized() and torch.distributed.get_rank() == 0:
        raise RuntimeError("no compiler here")
    return graph


for path in map(Path, sys.argv[1:]):
    passes = Passes()
    recipe, config = read_settings(path)
    failing = path.stem.startswith("failing")
    # graphs as ever, without generating code
    torch.compile = partial(compile_network, backend=fail_in_the_first_process if failing else "aot_eager")
    # as on a GPU, where networks are compiled by default
    itpn.training.compilation.pays = lambda device, failing=failing: failing
    train(config, recipe)
