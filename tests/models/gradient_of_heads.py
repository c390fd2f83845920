"""Run by tests, alone and under torchrun: a training step of a detector or segmenter; saves gradients and statistics.

Usage: gradient_of_heads.py INPUT OUTPUT; each process takes its share of the images.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from itpn.models.detector import MaskDetector
from itpn.models.pyramid import PyramidBackbone
from itpn.models.segmenter import Segmenter
from itpn.tasks.segmentation import pixel_loss

# anchors and proposals are drawn in an order that does not depend on which images came before
torch.randperm = lambda n, **kwargs: torch.arange(n, device=kwargs.get("device"))

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")
given = torch.load(sys.argv[1], weights_only=True)
segments = isinstance(given["targets"], torch.Tensor)
backbone = PyramidBackbone(
    "segmentation" if segments else "detection", pyramid_width=32, pyramid_depth=1, **given["backbone"]
)
kind = Segmenter if segments else MaskDetector
model = kind(backbone, num_classes=4, **given["options"])
model.to(given["images"][0].dtype).load_state_dict(given["state"])
images, targets = given["images"][rank::world], given["targets"][rank::world]
network = DistributedDataParallel(model) if world > 1 else model
if segments:
    losses = {name: pixel_loss(logits, targets) for name, logits in network(images).items()}
else:
    losses = network(images, targets)
sum(losses.values()).backward()
if rank == 0:
    gradients = {name: p.grad for name, p in model.named_parameters()}
    torch.save({"gradients": gradients, "buffers": dict(model.named_buffers())}, sys.argv[2])
if world > 1:
    dist.destroy_process_group()
