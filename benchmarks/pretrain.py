"""How fast is a full pre-training step (forward, backward, optimiser), and how near to the hardware's limit?

    python benchmarks/pretrain.py itpn-pixel_nano --batch-size 64
    python benchmarks/pretrain.py itpn-pixel_hivit-base-p16_8xb512-amp-coslr-800e_in1k --batch-size 128 \\
        --precision bf16 --arms compiled eager plain --data data/imagenet --num-workers 16

Arms take steps in turns, and between them goes the best large matrix product in the same precision, so that ratios
hold on a machine whose speed varies: "fraction" and "to the first" are medians over rounds. A row for each arm with
batches that lie in memory and, with --data, one for real files through the reader: means over steps in a row of the
first arm, when what workers have read ahead is used up. An arm that fails is named and left out, and makes the exit
code 1. An EMA is part of the step; an outside teacher is
not, random numbers stand for its features. For the memory of an arm give it alone.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from arms import Failures
from plain import SAVINGS, make_plain, make_plain_optimizer
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from itpn.data.files import find_training_images
from itpn.masked.masked_model import MaskedImageModel
from itpn.tasks.configs import PretrainingConfig
from itpn.tasks.pretraining.data import make_loader
from itpn.tasks.pretraining.module import PretrainingModule
from itpn.tasks.pretraining.network import build_masked_model
from itpn.tasks.recipe_files import read_recipe
from itpn.teachers.ema import EMATeacher
from itpn.training.config import image_size
from itpn.training.launch import device_name, peak_memory_gb

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ARMS = {
    "eager": "as it is",
    "compiled": "by torch.compile",
    "selective": "results of matrix products kept, norms and activation functions recomputed",
    "checkpointed": "all activations recomputed",
    "compiled selective": "compiled, and selective",
    "plain": "the same network without our savings, see plain.py",
    **{f"no {saving}": "eager without this one" for saving in SAVINGS},
}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class BestProduct:
    """The largest rate of square matrix products, which is timed again at every call."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        sizes = (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048, 4096)
        rates = {}
        for size in sizes:
            self.factors = [torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)]
            self.flops_per_second()
            rates[size] = statistics.median(self.flops_per_second() for _ in range(5))
        best = max(rates, key=lambda size: rates[size])
        self.factors = [torch.randn(best, best, device=device, dtype=dtype) for _ in range(2)]

    def flops_per_second(self) -> float:
        a, b = self.factors
        synchronize(self.device)
        begin = time.perf_counter()
        a @ b
        synchronize(self.device)
        return 2 * len(a) ** 3 / (time.perf_counter() - begin)


class Arm:
    """A network with its optimiser, and one way to take a step.

    Attributes:
        step: takes a batch uint8 [B, 3, H, W].
        flops: of a step's forward and backward pass, at the batch size of the first.
    """

    def __init__(
        self, name: str, config: PretrainingConfig, model: MaskedImageModel, dtype: torch.dtype, batch: int
    ) -> None:
        self.name = name
        self.device = next(model.parameters()).device
        self.precision = (
            torch.autocast(self.device.type, dtype) if dtype is not torch.float32 else contextlib.nullcontext()
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype is torch.float16)
        self.momentum = config.teacher.momentum
        size = image_size(config.data)
        self.model = model
        self.ema_teacher = EMATeacher(model) if config.teacher.name == "ema" else None
        self.module = PretrainingModule(model, config, "benchmark", teacher=self.ema_teacher).to(self.device)
        self.outside: dict[str, Any] = {}
        if config.teacher.name and self.ema_teacher is None:
            shape = model.eval()(torch.zeros(1, config.model.in_chans or 3, *size, device=self.device)).prediction.shape
            self.outside["feature"] = torch.randn(batch, *shape[1:], device=self.device)
        model.train()
        without = [saving for saving in SAVINGS if name in ("plain", f"no {saving}")]
        make_plain(model, without)
        if "fused optimizer" in without:
            self.optimizer = make_plain_optimizer(model)
        else:
            self.optimizer = torch.optim.AdamW(self.module.parameter_groups(), fused=True)
        with FlopCounterMode(display=False) as counter:  # before anything is recomputed or compiled
            self._forward_backward(torch.zeros(batch, 3, *size, dtype=torch.uint8))
        self.flops = counter.get_total_flops()
        self.optimizer.zero_grad()
        if "selective" in name or name == "checkpointed":
            model.set_grad_checkpointing("selective" if "selective" in name else True)
        if "compiled" in name:
            model.compile()
            if self.ema_teacher is not None:
                self.ema_teacher.compile()

    def _forward_backward(self, images: torch.Tensor) -> None:
        x = self.module.normalize(images.to(self.device, non_blocking=True))
        with self.precision:
            loss = self.model(x, target=self.module.make_targets(self.outside, x)).loss
        self.scaler.scale(loss).backward()

    def step(self, images: torch.Tensor) -> None:
        self._forward_backward(images)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema_teacher is not None:
            self.ema_teacher.update(self.model, self.momentum)


def time_step(arm: Arm, images: torch.Tensor) -> float:
    """Seconds of a step alone."""
    synchronize(arm.device)
    begin = time.perf_counter()
    arm.step(images)
    synchronize(arm.device)
    return time.perf_counter() - begin


def time_files(arm: Arm, batches: Iterator[torch.Tensor], warmup: int, steps: int) -> tuple[float, float]:
    """Mean seconds of steps in a row, and of waiting for their batches."""
    for _ in range(warmup):
        arm.step(next(batches))
    synchronize(arm.device)
    wait, begin = 0.0, time.perf_counter()
    for _ in range(steps):
        since = time.perf_counter()
        images = next(batches)
        wait += time.perf_counter() - since
        arm.step(images)
    synchronize(arm.device)
    return (time.perf_counter() - begin) / steps, wait / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--img-size", type=int, help="pixels of a side (default: the recipe's)")
    parser.add_argument("--precision", choices=DTYPES, default="32")
    arms = "; ".join(f"{name}: {what}" for name, what in ARMS.items())
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["eager"], metavar="ARM", help=arms)
    parser.add_argument("--data", nargs="+", help="folders or shards for the row of real files")
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", metavar="FILE", help="write the metrics there as well")
    options = parser.parse_args()

    recipe, config = read_recipe(options.recipe)
    config.data.batch_size, config.data.num_workers = options.batch_size, options.num_workers
    if options.img_size:
        config.data.img_size = options.img_size
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as the engine does
    dtype = DTYPES[options.precision]
    model = build_masked_model(config.model, image_size(config.data), config.teacher).to(device)
    failures, networks = Failures(), []
    for name in options.arms:
        with failures.of(name):
            networks.append(Arm(name, config, deepcopy(model), dtype, options.batch_size))
    limit = BestProduct(device, dtype)

    images = torch.randint(0, 256, (options.batch_size, 3, *image_size(config.data)), dtype=torch.uint8).to(device)
    times: dict[str, list[float]] = {arm.name: [] for arm in networks}
    limits: dict[str, list[float]] = {arm.name: [] for arm in networks}
    for number in range(options.warmup + options.steps):
        for arm in networks:
            with failures.of(arm.name):
                before = limit.flops_per_second()
                seconds = time_step(arm, images)
                if number >= options.warmup:
                    times[arm.name].append(seconds)
                    limits[arm.name].append((before + limit.flops_per_second()) / 2)
        networks = [arm for arm in networks if arm.name not in failures.reasons]
    if not networks:
        failures.end()

    firsts = times[networks[0].name]

    def make_row(arm: Arm, source: str, own: list[float], rates: list[float], wait: float) -> dict[str, Any]:
        seconds = statistics.median(own)
        return {
            "recipe": recipe,
            "arm": arm.name,
            "images from": source,
            "batch": options.batch_size,
            "precision": options.precision,
            "images/s": options.batch_size / seconds,
            "step s": seconds,
            "to the first": statistics.median(step / first for step, first in zip(own, firsts, strict=True)),
            "wait s": wait,
            "GFLOP": arm.flops / 1e9,
            "GFLOP/s": arm.flops / seconds / 1e9,
            "best matmul": statistics.median(rates) / 1e9,
            "fraction": statistics.median(arm.flops / step / rate for step, rate in zip(own, rates, strict=True)),
            "peak GB, all arms": peak_memory_gb(device),
        }

    rows = [make_row(arm, "memory", times[arm.name], limits[arm.name], 0.0) for arm in networks]
    if options.data:
        first = networks[0]
        loader = make_loader(config, find_training_images(options.data), 0, 1)
        batches = (batch["image"] for _ in iter(int, 1) for batch in loader)
        ahead = options.warmup + 2 * options.num_workers
        seconds, wait = time_files(first, batches, ahead, options.steps)
        loader.close()
        rows.append(make_row(first, "files", [seconds] * options.steps, limits[first.name], wait))
    table = Table(title=f"{recipe} on {device_name(device)}, torch {torch.__version__}")
    for name in list(rows[0])[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in list(row.values())[1:]))
    Console(width=150).print(table)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": device_name(device), "torch": torch.__version__, "rows": rows}, file, indent=2)
    failures.end()


if __name__ == "__main__":
    main()
