"""What do token migration and gathering save, and how much do they change? Against the same network without them.

    python benchmarks/tokens.py
    python benchmarks/tokens.py --run runs/fast-itpn-pixel_nano/cifar --shards data/cifar10 --gather 4,1 4,2

Without --run: time and change of the output for a large network, of RANDOM weights, as no trained ones can be had here;
the change says little then. With --run: for a run's own weights, with the accuracy of k-NN and a linear classifier on
frozen features of labelled images (see objectives.py). Times are of the processor with one thread, two networks by
turns, each time over that of the same round without.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from objectives import read_labelled
from probing import probe
from rich.console import Console
from rich.table import Table
from timm import create_model
from torch import Tensor

import itpn  # noqa: F401  # its models become timm's
from itpn.models.hivit import HiViT
from itpn.tasks.recipe_files import read_settings

OFF = {"migrate_ratio": 0.0, "gather_window": 0, "gather_side": 1}


def combinations(ratios: list[float], gather: list[tuple[int, int]]) -> dict[str, dict]:
    """Each alone, and the largest fraction with each kind of windows."""
    migrate = {f"migrate {ratio:g}": {"migrate_ratio": ratio} for ratio in ratios}
    windows = {f"gather {w}, {s * s} a window": {"gather_window": w, "gather_side": s} for w, s in gather}
    both = {f"migrate {max(ratios):g}, {name}": {"migrate_ratio": max(ratios), **own} for name, own in windows.items()}
    return {name: {**OFF, **own} for name, own in {**migrate, **windows, **both}.items()}


def switch(model: HiViT, settings: dict) -> HiViT:
    for name, value in settings.items():
        setattr(model, name, value)
    return model


@torch.no_grad()
def run(model: HiViT, settings: dict, images: Tensor) -> tuple[Tensor, float]:
    """Stage 3 tokens and the processor's seconds."""
    switch(model, settings)
    begin = time.process_time()
    tokens = model.forward_features(images)
    return tokens, time.process_time() - begin


def relative(after: Tensor, before: Tensor) -> str:
    return f"{(after - before).norm() / before.norm():.3f}"


def compare_speed(options: argparse.Namespace) -> Table:
    title = f"{options.model}, random weights, batch {options.batch_size}, torch {torch.__version__}"
    table = Table("px", "setting", "time: median (range)", "L2 of the map", "L2 of the mean", "cosine", title=title)
    for size in options.img_sizes:
        torch.manual_seed(0)
        model = create_model(options.model, img_size=size, num_classes=0, init_values=0.1).eval()
        images = F.interpolate(torch.randn(options.batch_size, 3, 14, 14), size, mode="bicubic")
        settings = {"off": OFF, **combinations(options.ratios, options.gather)}
        run(model, OFF, images)
        rounds = [{name: run(model, own, images) for name, own in settings.items()} for _ in range(options.rounds)]
        before = rounds[0]["off"][0]
        for name in list(settings)[1:]:
            ratios = [results[name][1] / results["off"][1] for results in rounds]
            after = rounds[0][name][0]
            cells = [
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                relative(after, before),
            ]
            means = after.mean(dim=1), before.mean(dim=1)
            cells += [relative(*means), f"{F.cosine_similarity(*means).mean():.4f}"]
            table.add_row(str(size), name, *cells)
    return table


def compare_accuracy(options: argparse.Namespace) -> Table:
    recipe, config = read_settings(options.run / "config.yaml")
    shards = [sorted(options.shards.glob(f"{split}-*.tar*"))[0] for split in ("train", "test")]
    sets = [
        read_labelled(shard, count) for shard, count in zip(shards, (options.labels, options.test_images), strict=True)
    ]
    table = Table("setting", "knn", "linear", "pyramid_knn", "pyramid_linear", title=f"{recipe}, accuracy in %")
    for name, settings in {"off": OFF, **combinations(options.ratios, options.gather)}.items():
        own = dataclasses.replace(config, model=dataclasses.replace(config.model, **settings))
        accuracy = probe(own, options.run / "model.safetensors", sets)
        table.add_row(name, *[f"{100 * value:.1f}" for value in dataclasses.asdict(accuracy).values()])
    return table


def pair(text: str) -> tuple[int, int]:
    window, side = text.split(",")
    return int(window), int(side)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fast_itpn_base")
    parser.add_argument("--img-sizes", nargs="+", type=int, default=[224, 384, 512])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5], help="of tokens that migrate")
    parser.add_argument("--gather", nargs="+", type=pair, default=[(7, 1), (8, 2)], metavar="WINDOW,SIDE")
    parser.add_argument("--run", type=Path, help="folder of a finished run")
    parser.add_argument("--shards", type=Path, help="folder of train-*.tar* and test-*.tar* with .jpg and .cls members")
    parser.add_argument("--labels", type=int, default=5_000, help="labelled images to learn from")
    parser.add_argument("--test-images", type=int, default=5_000, help="test images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    Console(width=120).print(compare_accuracy(options) if options.run else compare_speed(options))


if __name__ == "__main__":
    main()
