"""Where do the MACs, the bytes and the memory of a pre-training step go? Counted, not timed.

    python benchmarks/account.py itpn-pixel_hivit-base-p16_8xb512-amp-coslr-800e_in1k

Forward pass of one image in float32: MACs of each part; bytes that its matrix products (with attention) and
its other operators read and write when each runs alone, views left out; bytes kept for the backward pass. Then what is
kept in all with each kind of activation checkpointing. The backward pass has twice the MACs.
"""

import argparse
import os
from collections import defaultdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from itpn.errors import UserError
from itpn.masked.masked_model import MaskedImageModel
from itpn.models.recompute import PRODUCTS
from itpn.tasks.configs import PretrainingConfig
from itpn.tasks.pretraining.network import build_masked_model
from itpn.tasks.recipe_files import read_recipe
from itpn.training.config import image_size

PARTS = {
    "patch embedding": ["backbone.patch_embed"],
    "stage 1": ["backbone.stages.0"],
    "stage 2": ["backbone.stages.1"],
    "merges": ["backbone.merges"],
    "stage 3": ["backbone.stages.2"],
    "pyramid": ["pyramid"],
    "decoder: embedding": ["decoder.embed_norms", "decoder.embeds"],
    "decoder: blocks": ["decoder.blocks"],
    "decoder: prediction": ["decoder.norm", "decoder.heads"],
    "auxiliary head": ["auxiliary"],
    "heads of pyramid levels": ["pyramid_heads"],
}
ELSE = "masks, targets, losses"


class Account(TorchDispatchMode):
    """Counts MACs and bytes for the part that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.part = ELSE
        self.macs: dict[str, float] = defaultdict(float)
        self.product_bytes: dict[str, float] = defaultdict(float)
        self.other_bytes: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        packet = function._overloadpacket
        if packet in flop_registry:
            self.macs[self.part] += flop_registry[packet](*args, **(kwargs or {}), out_val=out) / 2
        if not function.is_view:
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            kind = self.product_bytes if function in PRODUCTS else self.other_bytes
            kind[self.part] += sum(t.numel() * t.element_size() for t in tensors)
        return out


def take_account(model: MaskedImageModel, images: torch.Tensor) -> tuple[Account, dict[str, float]]:
    """The account of a forward pass, and bytes kept for the backward pass by part."""
    account = Account()
    kept: dict[int, tuple[str, int]] = {}
    alive: list[Any] = []
    parameters = {p.data_ptr() for p in model.parameters()}
    outer: list[str] = []

    def enter(name: str) -> Any:
        def hook(*_: Any) -> None:
            outer.append(account.part)
            account.part = name

        return hook

    def leave(*_: Any) -> None:
        account.part = outer.pop()

    for part, prefixes in PARTS.items():
        for name, module in model.named_modules():
            if f"{name}.".startswith(tuple(f"{prefix}." for prefix in prefixes)):
                module.register_forward_pre_hook(enter(part))
                module.register_forward_hook(leave)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept.setdefault(storage.data_ptr(), (account.part, storage.nbytes()))
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), account:
        model(images, target=draw_targets(model, images))
    by_part: dict[str, float] = defaultdict(float)
    for part, size in kept.values():
        by_part[part] += size
    return account, by_part


def draw_targets(model: MaskedImageModel, images: torch.Tensor) -> dict[str, torch.Tensor]:
    widths = {name: head.out_features for name, head in (model.decoder.heads.items() if model.decoder else ())}
    widths |= {"auxiliary": model.auxiliary.head.out_features} if model.auxiliary else {}
    widths |= {name: head.heads[name].out_features for name, head in model.pyramid_heads.items()}  # type: ignore[union-attr,index]
    patches = model.backbone.grid_of(images.shape[-2:])
    shape = len(images), patches[0] * patches[1]
    return {name: torch.zeros(*shape, widths[name], device=images.device) for name in model.feature_losses}


def measure_kept(model: MaskedImageModel, images: torch.Tensor) -> float:
    """Bytes that a forward pass leaves taken, measured on the CPU."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its remarks are not for users
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = model(images, target=draw_targets(model, images)).loss
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiler.events())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--batch-size", type=int, default=4, help="what is counted is divided by it")
    options = parser.parse_args()
    try:
        recipe, config = read_recipe(options.recipe)
    except UserError as error:
        parser.error(str(error))
    if not isinstance(config, PretrainingConfig) or options.batch_size < 1:
        parser.error("give a recipe of pre-training, and --batch-size of at least 1")
    size, batch = image_size(config.data), options.batch_size
    model = build_masked_model(config.model, size, config.teacher).train()
    images = torch.zeros(batch, config.model.in_chans or 3, *size)
    kept_in_all = {}
    for name, how in {"nothing recomputed": False, "selective": "selective", "all": True}.items():
        model.set_grad_checkpointing(how)  # type: ignore[arg-type]
        kept_in_all[name] = measure_kept(model, images) / batch
    model.set_grad_checkpointing(False)
    account, kept = take_account(model, images)

    total = sum(account.macs.values())
    columns = ("MACs (M)", "fraction", "products (MB)", "others (MB)", "kept (MB)")
    table = Table("part", *columns, title=f"{recipe}, forward pass of an image, float32")
    for part in [*PARTS, ELSE, "all"]:
        parts = [*PARTS, ELSE] if part == "all" else [part]
        macs, products, others, own = (
            sum(amounts[p] for p in parts) / batch
            for amounts in (account.macs, account.product_bytes, account.other_bytes, kept)
        )
        if macs or others:
            sizes = (f"{amount / 1e6:.2f}" for amount in (products, others, own))
            table.add_row(part, f"{macs / 1e6:,.1f}", f"{macs * batch / total:.1%}", *sizes)
    console = Console(width=120)
    console.print(table)
    for name, amount in kept_in_all.items():
        console.print(f"kept for the backward pass, {name}: {amount / 1e6:.1f} MB an image", highlight=False)


if __name__ == "__main__":
    main()
