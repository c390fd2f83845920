"""Does masked feature modelling help? Pixels, pixels and features, features alone: the same images, then a probe.

    python benchmarks/objectives.py SHARDS_OF_CIFAR --images 16000 --seeds 0 1 2

Each arm trains the same small network on the training shards without their labels. Then k-NN and a
linear classifier on its frozen features (with 5,000 labelled images) are evaluated on the test shard, beside the
same network with random initialization. Metrics go to OUT/objectives.csv, losses to each run's metrics.csv.
"""

import argparse
import csv
import tarfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from arms import Failures
from probing import probe
from rich.console import Console
from rich.table import Table
from torch import Tensor

from itpn.data.augment import center_crop
from itpn.data.decode import decode_image
from itpn.tasks.configs import PretrainingConfig
from itpn.tasks.recipe_files import read_recipe
from itpn.tasks.run import train

ARMS = ("random", "pixel", "pixel + mfm", "mfm alone", "feature alone")


def make_config(arm: str, options: argparse.Namespace, seed: int) -> PretrainingConfig:
    _, config = read_recipe("itpn-pixel_nano" if arm == "pixel" else "itpn-mfm_nano")
    if arm in ("mfm alone", "feature alone"):
        config.model.pixel_weight = 0.0
    if arm == "feature alone":
        config.model.pyramid_weights, config.model.feature_weight = (0.0, 0.0, 0.0), 1.0
    elif arm != "pixel" and options.weight is not None:
        config.model.pyramid_weights = (options.weight,) * 3
    if options.momentum is not None and config.teacher.name:
        config.teacher.momentum = options.momentum
    config.model.patch_size, config.data.img_size = 4, 32
    config.data.root = tuple(str(p) for p in sorted(options.data.glob("train-*")))
    config.data.samples_per_epoch = options.images
    config.data.batch_size, config.data.num_workers = options.batch_size, options.num_workers
    config.optimizer.lr = options.lr
    config.trainer.max_epochs, config.trainer.checkpoint_every_n_steps = 1, 10**6
    config.seed, config.output_dir = seed, str(options.out)
    config.name = f"seed-{seed}"
    return config


def read_labelled(shard: Path, count: int) -> tuple[Tensor, Tensor]:
    """The first images of a shard, uint8 [n, 3, 32, 32], and their labels, int64 [n]."""
    images, labels = {}, {}
    with tarfile.open(shard, "r|*") as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is None:
                continue
            key, _, kind = member.name.rpartition(".")
            if kind == "cls":
                labels[key] = int(file.read())
            else:
                images[key] = center_crop(decode_image(file.read()), (32, 32))
    keys = list(images)[:count]
    return torch.stack([images[key] for key in keys]), torch.tensor([labels[key] for key in keys])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of train-*.tar* and test-*.tar* with .jpg and .cls members")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=16_000, help="trained on (default: %(default)s)")
    parser.add_argument(
        "--labels", type=int, default=5_000, help="labelled images to learn from (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight", type=float, help="of each pyramid level (default: the recipe's)")
    parser.add_argument("--momentum", type=float, help="of the EMA at the start (default: the recipe's)")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    options = parser.parse_args()
    train_shard, test_shard = (sorted(options.data.glob(f"{split}-*.tar*"))[0] for split in ("train", "test"))
    sets = [read_labelled(train_shard, options.labels), read_labelled(test_shard, 10_000)]
    rows: list[dict] = []
    failures = Failures()
    for seed in options.seeds:
        for arm in options.arms:
            row: dict | None = None
            with failures.of(f"{arm}, seed {seed}"):
                config = make_config(arm, options, seed)
                begin, weights = time.perf_counter(), None
                if arm != "random":
                    weights = train(config, arm.replace(" ", "-")) / "model.safetensors"
                seconds = time.perf_counter() - begin
                row = {"arm": arm, "seed": seed, **asdict(probe(config, weights, sets)), "seconds": seconds}
            if row is None:
                continue
            rows.append(row)
            Console().print(rows[-1])
            options.out.mkdir(parents=True, exist_ok=True)
            with (options.out / "objectives.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    if not rows:
        failures.end()
    names = list(rows[0])[2:]
    table = Table("arm", *names, title=f"{options.images} images of CIFAR-10, accuracy in %")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = []
        for name in names:
            values = torch.tensor([float(row[name]) for row in rows if row["arm"] == arm])
            values, digits = (values, 0) if name == "seconds" else (100 * values, 1)
            spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{digits}f}{spread}")
        table.add_row(arm, *cells)
    Console(width=120).print(table)
    failures.end()


if __name__ == "__main__":
    main()
