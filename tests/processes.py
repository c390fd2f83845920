"""Two processes against one: a training step of a detector or segmenter."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from servers import servers
from torch.nn.parallel import DistributedDataParallel

from itpn.models.build import make_pyramid
from itpn.models.detector import MaskDetector
from itpn.models.segmenter import Segmenter
from itpn.tasks.segmentation.module import pixel_loss

PROCESSES = 2
Tensors = dict[str, torch.Tensor]


def compare_processes(given: dict[str, Any], folder: Path) -> int:
    """A training step in one process and in two: the same gradients and statistics of batch norm.

    Returns:
        How many batch norms there are.
    """
    torch.save(given, folder / "given.pt")
    started = [servers.Process(target=take_part, args=(rank, folder)) for rank in range(PROCESSES)]
    for process in started:
        process.start()
    try:
        gradients, buffers = train_step(given)
        for process in started:
            process.join(300)
        assert [process.exitcode for process in started] == [0] * PROCESSES
    finally:
        for process in started:
            process.kill()
    shared_gradients, shared_buffers = torch.load(folder / "taken.pt", weights_only=True)
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, gradient in gradients.items():
        # a bias before batch norm has no gradient but rounding
        assert (shared_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-12 * largest, name
    changed = 0
    for name, buffer in buffers.items():
        assert torch.allclose(shared_buffers[name].float(), buffer.float(), rtol=1e-5, atol=1e-7), name
        changed += name.endswith("running_mean")
    return changed


def train_step(given: dict[str, Any], rank: int = 0, world: int = 1) -> tuple[Tensors, Tensors]:
    """Gradients and buffers after a step with every ``world``-th image."""
    segments = isinstance(given["targets"], torch.Tensor)
    backbone = make_pyramid("joined" if segments else "pooled", pyramid_width=32, pyramid_depth=1, **given["backbone"])
    kind = Segmenter if segments else MaskDetector
    model = kind(backbone, num_classes=4, **given["options"])
    model.to(given["images"][0].dtype).load_state_dict(given["state"])
    images, targets = given["images"][rank::world], given["targets"][rank::world]
    network = DistributedDataParallel(model) if world > 1 else model
    # anchors and proposals are drawn in an order that does not depend on which images came before
    with mock.patch("torch.randperm", lambda n, **kwargs: torch.arange(n, device=kwargs.get("device"))):
        if segments:
            losses = {name: pixel_loss(logits, targets) for name, logits in network(images).items()}
        else:
            losses = network(images, targets)
    sum(losses.values()).backward()
    return {name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers())


def take_part(rank: int, folder: Path) -> None:
    """One of the processes, each of which takes its share of the images."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=PROCESSES)
    taken = train_step(torch.load(folder / "given.pt", weights_only=True), rank, PROCESSES)
    if rank == 0:
        torch.save(taken, folder / "taken.pt")
    dist.destroy_process_group()
