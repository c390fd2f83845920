"""How fast is a full pre-training step (forward, backward, optimiser), and how near to the hardware's limit?

    python benchmarks/pretrain.py itpn-pixel_nano --batch-size 64
    python benchmarks/pretrain.py itpn-pixel_hivit-base-p16_8xb512-amp-coslr-800e_in1k --batch-size 128 \\
        --precision bf16 --compile --data data/imagenet --num-workers 16

One row for batches that lie in memory and, with --data, one for real files through the reader. The limit is the
best large matrix product in the same precision, measured in the same run. A moving average is part of the step; an
outside teacher is not, numbers drawn at random stand for its features.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timm.optim import param_groups_weight_decay
from torch.utils.flop_counter import FlopCounterMode

from itpn.config import image_size
from itpn.data.files import find_training_images
from itpn.engine.launch import device_name, peak_memory_gb
from itpn.engine.pretraining import make_loader
from itpn.pretraining.average import MovingAverageTeacher
from itpn.pretraining.build import build_masked_model
from itpn.recipes import read_recipe
from itpn.tasks.pretrain import PretrainingTask

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best square matrix product, medians of repeated runs."""
    best = 0.0
    for size in (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048, 4096):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        times = []
        for _ in range(8):
            synchronize(device)
            begin = time.perf_counter()
            a @ b
            synchronize(device)
            times.append(time.perf_counter() - begin)
        best = max(best, 2 * size**3 / statistics.median(times[2:]))
    return best


def measure(
    step: Callable[[torch.Tensor], None], batches: Iterator[torch.Tensor], device: torch.device, warmup: int, steps: int
) -> tuple[float, float]:
    """Median seconds of a step, waiting for its batch included, and mean seconds of that waiting."""
    times, waits = [], []
    for i in range(warmup + steps):
        synchronize(device)
        begin = time.perf_counter()
        images = next(batches)
        wait = time.perf_counter() - begin
        step(images)
        synchronize(device)
        if i >= warmup:
            times.append(time.perf_counter() - begin)
            waits.append(wait)
    return statistics.median(times), statistics.mean(waits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--img-size", type=int, help="pixels of a side (default: the recipe's)")
    parser.add_argument("--precision", choices=DTYPES, default="32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--data", nargs="+", help="folders or shards for the row of real files")
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()

    recipe, config = read_recipe(options.recipe)
    config.data.batch_size, config.data.num_workers = options.batch_size, options.num_workers
    if options.img_size:
        config.data.img_size = options.img_size
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as the engine does
    dtype = DTYPES[options.precision]
    size = image_size(config.data)
    model = build_masked_model(config.model, size, config.teacher).to(device).train()
    average = MovingAverageTeacher(model) if config.teacher.name == "ema" else None
    task = PretrainingTask(model, config, recipe, teacher=average).to(device)
    outside: dict[str, Any] = {}
    if config.teacher.name and average is None:
        shape = model.eval()(torch.zeros(1, config.model.in_chans, *size, device=device)).prediction.shape
        outside["feature"] = torch.randn(options.batch_size, *shape[1:], device=device)
        model.train()
    groups = param_groups_weight_decay(
        model, config.optimizer.weight_decay, no_weight_decay_list=model.no_weight_decay()
    )
    optimizer = torch.optim.AdamW(groups, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
    precision = torch.autocast(device.type, dtype) if options.precision != "32" else contextlib.nullcontext()

    def forward_backward(images: torch.Tensor) -> None:
        x = task.normalize(images.to(device, non_blocking=True))
        with precision:
            loss = model(x, target=task.make_targets(outside, x)).loss
        scaler.scale(loss).backward()

    def step(images: torch.Tensor) -> None:
        forward_backward(images)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if average is not None:
            average.update(model, config.teacher.momentum)

    images = torch.randint(0, 256, (options.batch_size, 3, *size), dtype=torch.uint8).to(device)
    with FlopCounterMode(display=False) as counter:  # before compiling: it counts what runs, layer by layer
        forward_backward(images)
    flops = counter.get_total_flops()
    optimizer.zero_grad()
    if options.compile:
        model.compile()

    limit = best_matmul_flops(device, dtype)
    sources: dict[str, Iterator[torch.Tensor]] = {"memory": iter(lambda: images, None)}
    if options.data:
        loader = make_loader(config, find_training_images(options.data), 0, 1)
        sources["files"] = (batch["image"] for _ in iter(int, 1) for batch in loader)
    rows: list[dict[str, Any]] = []
    for source, batches in sources.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, wait = measure(step, batches, device, options.warmup, options.steps)
        rows.append(
            {
                "recipe": recipe,
                "images from": source,
                "batch": options.batch_size,
                "precision": options.precision,
                "compiled": options.compile,
                "images/s": options.batch_size / seconds,
                "step s": seconds,
                "wait s": wait,
                "GFLOP/s": flops / seconds / 1e9,
                "best matmul GFLOP/s": limit / 1e9,
                "fraction": flops / seconds / limit,
                "peak GB": peak_memory_gb(device),
            }
        )
    if options.data:
        loader.close()
    table = Table(title=f"{recipe} on {device_name(device)}, torch {torch.__version__}")
    for name in list(rows[0])[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in list(row.values())[1:]))
    Console(width=150).print(table)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": device_name(device), "torch": torch.__version__, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
