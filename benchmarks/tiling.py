"""What tiles cost in accuracy: the same checkpoint and labelled images, whole and in tiles of several sizes.

Stage 3 attends over the whole of what the network sees, so that tiles see less. The scale is the same in all arms: a
tile of so many pixels is evaluated at that size.

    python benchmarks/tiling.py segmenter_nano runs/segmenter_nano/water/model.safetensors shared/data/satellite/water \
        --whole 128 --tiles 96 64
"""

import argparse
import json
from pathlib import Path

from arms import Failures
from rich.console import Console
from rich.table import Table

from itpn.cli import main as itpn

METRICS = ("miou", "mean_accuracy", "pixel_accuracy", "box_ap", "box_ap50", "mask_ap", "mask_ap50")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("checkpoint")
    parser.add_argument("data", help="whose images have a short side of --whole pixels")
    parser.add_argument("--whole", type=int, required=True, help="short side of all images in pixels")
    parser.add_argument("--tiles", nargs="+", type=int, required=True, help="sides of tiles in pixels")
    parser.add_argument("--overlaps", nargs="+", type=float, default=[0.25, 0.0], help="fractions of their side")
    parser.add_argument("--out", type=Path, default=Path("runs/tiling"))
    options = parser.parse_args()
    arms = [(options.whole, 0)]
    arms += [(side, round(overlap * side)) for side in options.tiles for overlap in options.overlaps]
    found: dict[str, dict[str, float]] = {}
    failures = Failures()
    for side, overlap in arms:
        name = "whole" if side == options.whole else f"{side} px, overlap {overlap}"
        with failures.of(name):
            found[name] = measure(options, side, overlap)
    names = [metric for metric in METRICS if any(metric in own for own in found.values())]
    table = Table("images", *names)
    for name, own in found.items():
        table.add_row(name, *(f"{100 * own[metric]:.1f}" for metric in names))
    Console().print(table)
    failures.end()


def measure(options: argparse.Namespace, side: int, overlap: int) -> dict[str, float]:
    """Metrics of one arm."""
    out = options.out / f"{side}-{overlap}"
    windows = ["--data.window-size", str(side), "--data.window-overlap", str(overlap)]
    command = ["evaluate", options.recipe, "--checkpoint", options.checkpoint, "--data.root", options.data]
    sizes = ["--data.img-size", str(side), "--data.num-workers", "0", "--out", str(out)]
    if itpn([*command, *sizes, *(windows if side != options.whole else [])]):
        raise RuntimeError("itpn evaluate has failed")
    found: dict[str, float] = json.loads((out / "evaluation.json").read_text())
    return found


if __name__ == "__main__":
    main()
