"""What pre-training on all bands of satellite images is worth, against from scratch and against RGB alone.

    python benchmarks/bands.py shared/data/satellite/water

The folder holds `images/{train,val}` and `annotations/{train,val}`. Each arm segments with the same network, steps and
augmentation; bands 3, 2 and 1 (red, green and blue) of the images are copied for the arms of RGB. Metrics go to
OUT/bands.csv.
"""

import argparse
import json
import os
from pathlib import Path

import tifffile
from arms import Failures, show_means, write_rows
from rich.console import Console

import itpn
from itpn.tasks.recipe_files import read_recipe
from itpn.tasks.run import train

RGB = (3, 2, 1)
# by name: whether it sees all bands, and whether it is pre-trained
ARMS = {
    "all bands, pre-trained": (True, True),
    "all bands, scratch": (True, False),
    "RGB, pre-trained": (False, True),
    "RGB, scratch": (False, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of images and annotations")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS])
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.2, 1.0], help="of the labels")
    parser.add_argument("--pretraining-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, nargs=2, default=[1e-3, 1e-3], help="pre-trained, from scratch")
    parser.add_argument("--out", type=Path, default=Path("runs/bands"))
    options = parser.parse_args()
    rgb = copy_rgb(options.data, options.out / "rgb")
    rows: list[dict] = []
    failures = Failures()
    for seed in options.seeds:
        for arm in options.arms:
            everything, pretrained = ARMS[arm]
            data = options.data if everything else rgb
            with failures.of(f"{arm}, seed {seed}"):
                checkpoint = pretrain(data, everything, seed, options) if pretrained else None
                for fraction in options.fractions:
                    miou = segment(data, everything, checkpoint, fraction, seed, options)
                    rows.append({"arm": arm, "fraction": fraction, "seed": seed, "miou": miou})
                    Console().print(rows[-1])
                    write_rows(rows, options.out / "bands.csv")
    show_means(rows, "miou", options.arms, options.fractions, f"mIoU in %, {options.steps} steps")
    failures.end()


def copy_rgb(data: Path, out: Path) -> Path:
    """The same images with three bands, and the same annotations."""
    for path in sorted((data / "images").rglob("*.tif")):
        copied = out / path.relative_to(data)
        copied.parent.mkdir(parents=True, exist_ok=True)
        pixels = itpn.read_image(path)[list(RGB)].numpy()
        tifffile.imwrite(copied, pixels, photometric="minisblack", planarconfig="separate", compression="deflate")
    for name in ("annotations", "classes.json"):
        if not (out / name).exists():
            os.symlink((data / name).resolve(), out / name)
    return out


def pretrain(data: Path, everything: bool, seed: int, options: argparse.Namespace) -> str:
    _, config = read_recipe("itpn-pixel_nano")
    config.seed, config.name = seed, f"{'all' if everything else 'rgb'}-{seed}"
    config.data.root, config.data.batch_size, config.data.num_workers = (str(data / "images/train"),), 32, 0
    config.data.rotate90 = True
    limit(config, options.pretraining_steps, options.out)
    return str(train(config, "bands-pretraining") / "model.safetensors")


def segment(
    data: Path, everything: bool, checkpoint: str | None, fraction: float, seed: int, options: argparse.Namespace
) -> float:
    """Mean IoU on the validation images, of the last step."""
    _, config = read_recipe("segmenter_nano")
    config.seed, config.data.root, config.data.label_fraction = seed, str(data), fraction
    config.data.batch_size, config.data.num_workers, config.data.rotate90 = options.batch_size, 0, True
    config.name = (
        f"{'all' if everything else 'rgb'}-{'scratch' if checkpoint is None else 'pretrained'}-{fraction}-{seed}"
    )
    config.optimizer.lr = options.lr[checkpoint is None]
    if checkpoint is None:
        config.model.name, config.model.scratch, config.model.patch_size = "itpn_nano", True, 8
        config.optimizer.layer_decay = None
    else:
        config.model.checkpoint = checkpoint
    limit(config, options.steps, options.out)
    return json.loads((train(config, "bands") / "summary.json").read_text())["metrics"]["val_miou"]


def limit(config, steps: int, out: Path) -> None:
    """So many steps, evaluated and drawn at the end alone."""
    config.trainer.max_epochs, config.trainer.max_steps = 10**6, steps
    config.trainer.visualize_every_n_steps = config.trainer.checkpoint_every_n_steps = 10**6
    if hasattr(config, "evaluation"):
        config.evaluation.every_n_epochs = 10**6
    config.output_dir = str(out)


if __name__ == "__main__":
    main()
