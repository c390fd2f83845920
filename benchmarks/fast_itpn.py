"""Is Fast-iTPN not slower per image than iTPN of the same depths at equal FLOPs? Two models by turns in one process.

    python benchmarks/fast_itpn.py
    python benchmarks/fast_itpn.py --pairs fast_itpn_large:itpn_large_2240 --no-step --rounds 8

One row for the forward pass of the backbone and one for a step of masked pixel pre-training (forward, backward,
optimiser). The order within a round changes with every round; a ratio is of the two times of one round, so that what
else the machine does falls on both; times are of the processor, with one thread. Below 1 in the last column, Fast-iTPN
gets more FLOPs done in the same time.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from timm import create_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import itpn  # noqa: F401  # its models become timm's
from itpn.tasks.configs import PretrainingModelConfig
from itpn.tasks.pretraining.network import build_masked_model

Work = Callable[[], None]


def forward_of(name: str, images: torch.Tensor, compiled: bool) -> tuple[Work, float]:
    """The backbone's forward pass, and its FLOPs."""
    model = create_model(name, img_size=images.shape[-1], num_classes=0).eval()

    @torch.no_grad()
    def work() -> None:
        model(images)

    flops = count_flops(work)
    if compiled:
        model.compile()
    return work, flops


def step_of(name: str, images: torch.Tensor, compiled: bool) -> tuple[Work, float]:
    """A step of masked pixel pre-training on the same masks in the same order, and its FLOPs."""
    size = images.shape[-1]
    model = build_masked_model(PretrainingModelConfig(name=name), (size, size)).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def work() -> None:
        model(images).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    flops = count_flops(work)
    if compiled:
        model.compile()
    return work, flops


def count_flops(work: Work) -> float:
    # the plain formula of attention: not every kernel of it is known to the counter
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def compare(fast: Work, slow: Work, warmup: int, rounds: int) -> list[float]:
    """Ratios of the two times, round by round."""
    ratios = []
    for i in range(warmup + rounds):
        seconds = {}
        for name, work in [("fast", fast), ("slow", slow)][:: 1 if i % 2 else -1]:
            begin = time.process_time()
            work()
            seconds[name] = time.process_time() - begin
        ratios.append(seconds["fast"] / seconds["slow"])
    return ratios[warmup:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", metavar="FAST:OTHER", default=["fast_itpn_base:itpn_base_3324"])
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-step", action="store_true", help="the forward pass alone")
    parser.add_argument("--compile", action="store_true", help="compile the models with torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(options.batch_size, 3, options.img_size, options.img_size)
    table = Table(title=f"{options.img_size} px, batch {options.batch_size}, torch {torch.__version__}")
    for column in ("models", "what", "FLOPs", "time: median (quartiles)", "time / FLOPs"):
        table.add_column(column)
    for pair in options.pairs:
        fast, other = pair.split(":")
        for what, make in [("forward", forward_of), ("step", step_of)][: 1 if options.no_step else 2]:
            (fast_work, fast_flops), (other_work, other_flops) = (
                make(name, images, options.compile) for name in (fast, other)
            )
            ratios = compare(fast_work, other_work, options.warmup, options.rounds)
            low, median, high = statistics.quantiles(ratios, n=4)
            flops = fast_flops / other_flops
            cells = f"{flops:.3f}", f"{median:.3f} ({low:.3f} to {high:.3f})", f"{median / flops:.3f}"
            table.add_row(f"{fast} / {other}", what, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
