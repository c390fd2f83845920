"""What pre-training is worth where labels are few: fine-tuning against the same network from scratch.

Each arm takes the same steps on the same images with the same augmentation; only the weights at the start differ.

    python benchmarks/labels.py CIFAR --checkpoint runs/itpn-pixel_nano/cifar/model.safetensors
"""

import argparse
import copy
import json
from pathlib import Path

from arms import Failures, show_means, write_rows
from rich.console import Console

from itpn.tasks.recipe_files import read_recipe
from itpn.tasks.run import train

ARMS = ("scratch", "pre-trained")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of train-*.tar and test-*.tar with .cls members")
    parser.add_argument("--checkpoint", required=True, help="of a pre-training run on the images of the training set")
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.01, 0.1, 1.0], help="of the labels")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, nargs=2, default=[1e-3, 1e-3], help="of the arms, in their order")
    parser.add_argument("--model", nargs=2, default=["itpn_nano", "4"], help="the network and its patch size")
    parser.add_argument("--out", type=Path, default=Path("runs/labels"))
    options = parser.parse_args()
    _, base = read_recipe("classifier_cifar")
    base.data.root, base.data.batch_size, base.data.num_workers = (str(options.data),), options.batch_size, 0
    base.trainer.max_epochs, base.trainer.max_steps = 10**6, options.steps
    base.trainer.visualize_every_n_steps = base.evaluation.every_n_epochs = 10**6  # both at the end
    base.trainer.checkpoint_every_n_steps = 10**6
    base.output_dir = str(options.out)
    rows: list[dict] = []
    failures = Failures()
    for seed in options.seeds:
        for fraction in options.fractions:
            settings = copy.deepcopy(base)
            settings.seed, settings.data.label_fraction = seed, fraction
            for arm in options.arms:
                with failures.of(f"{arm}, {fraction:.0%} of the labels, seed {seed}"):
                    config = copy.deepcopy(settings)
                    config.name = f"{arm}-{fraction}-{seed}"
                    config.optimizer.lr = options.lr[ARMS.index(arm)]
                    if arm == "scratch":
                        config.model.name, config.model.scratch = options.model[0], True
                        config.model.patch_size, config.optimizer.layer_decay = int(options.model[1]), None
                    else:
                        config.model.checkpoint = options.checkpoint
                    summary = json.loads((train(config, "labels") / "summary.json").read_text())
                    metrics = summary["metrics"]
                    rows.append({"arm": arm, "fraction": fraction, "seed": seed, "top1": metrics["val_top1"]})
                    rows[-1] |= {"ema_top1": metrics["ema_val_top1"], "seconds": summary["duration_seconds"]}
                    Console().print(rows[-1])
                    write_rows(rows, options.out / f"labels-{'-'.join(map(str, options.seeds))}.csv")
    fractions = sorted({row["fraction"] for row in rows})
    show_means(rows, "top1", ARMS, fractions, f"top-1 in %, {options.steps} steps")
    failures.end()


if __name__ == "__main__":
    main()
