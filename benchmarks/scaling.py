"""What a step of a recipe computes, sends and keeps: by calculation, on the meta device; nothing is measured.

Moving averages are left out.

python benchmarks/scaling.py itpn-pixel_hivit-base-p16_8xb512-amp-coslr-800e_in1k [RECIPE...]
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table
from timm import create_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from itpn.errors import UserError
from itpn.tasks.configs import PretrainingConfig
from itpn.tasks.pretraining.network import build_from
from itpn.tasks.recipe_files import read_recipe
from itpn.training.config import image_size

PEAK, FRACTION = 989e12, 0.4  # bf16 FLOP/s of an H100 without sparsity, and what of it is assumed to be reached
# bytes a second each way: between the GPUs of a machine, or out of a machine in all
LINKS = {"NVLink": 450e9, "8x400 Gb/s": 400e9, "PCIe 5": 64e9, "400 Gb/s": 50e9, "100 Gb/s": 12.5e9, "25 Gb/s": 3.1e9}
BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at once: the last ones find no backward pass to hide behind
IMAGES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    titles = ["trained M", "gradients GB", "GFLOP an image", "activations MB an image", "batch", "step ms"]
    table = Table("recipe", *titles, *LINKS)
    for name in parser.parse_args().recipes:
        try:
            _, config = read_recipe(name)
        except UserError as error:
            parser.error(str(error))
        if not isinstance(config, PretrainingConfig):
            parser.error(f"{name} is a recipe of {config.task}, not of pre-training")
        trained, flops, activations = count(config)
        batch, gradients = config.data.batch_size, 4 * trained
        step = batch * flops / (PEAK * FRACTION)
        cells = []
        for speed in LINKS.values():
            sent, last = 2 * gradients / speed, 2 * BUCKET / speed  # a ring of many: each sends all twice
            seen = max(sent - step * 2 / 3, last)  # two thirds of a step are the backward pass
            cells.append(f"{1000 * sent:.0f} ms, {step / (step + seen):.0%}")
        numbers = [f"{trained / 1e6:.2f}", f"{gradients / 1e9:.2f}", f"{flops / 1e9:.1f}", f"{activations / 1e6:.0f}"]
        table.add_row(name, *numbers, str(batch), f"{1000 * step:.0f}", *cells)
    Console(width=220).print(table)


def count(config: PretrainingConfig) -> tuple[int, float, float]:
    """Trained parameters; FLOPs of an image, forward and back, teacher included; bytes kept for the backward pass.

    All in bf16: mixed precision keeps norms in float32, so somewhat more bytes.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = build_from(config).to(torch.bfloat16).train()
        images = torch.zeros(IMAGES, config.model.in_chans or 3, *image_size(config.data), dtype=torch.bfloat16)
        patches = model.backbone.grid_size[0] * model.backbone.grid_size[1]
        targets = {n: torch.zeros(IMAGES, patches, config.teacher.width or 512) for n in model.feature_losses}
        if config.teacher.name is not None:
            with torch.no_grad():
                create_model(config.teacher.name)(torch.zeros(IMAGES, 3, 224, 224))
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        kept: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(images, target=targets or None).loss
        loss.backward()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, counter.get_total_flops() / IMAGES, sum(kept.values()) / IMAGES


if __name__ == "__main__":
    main()
