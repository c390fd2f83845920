"""What it is worth that the neck is pre-trained: detection or segmentation from several starts, all else equal.

python -c "from itpn.data.shapes import write_shapes; write_shapes('S')"
itpn train itpn-pixel_nano --data.root S/coco/train2017 S/imagefolder/train --data.img-size 96 --data.batch-size 32 ...
python benchmarks/necks.py detector_nano --data.root S/coco --checkpoint CKPT
python benchmarks/necks.py segmenter_nano --data.root S/ade20k --data.reduce-zero-label --checkpoint CKPT
"""

import argparse
import copy
import csv
import json
from pathlib import Path

import torch
from arms import Failures
from rich.console import Console
from rich.table import Table

from itpn.checkpoints.files import read_checkpoint
from itpn.commands.parsing import parse
from itpn.tasks.configs import DetectionConfig, SegmentationConfig
from itpn.tasks.recipe_files import read_recipe
from itpn.tasks.run import train

# backbone and pyramid pre-trained; the backbone alone, with a random pyramid or feature pyramid network; nothing
ARMS = ("pyramid", "random", "fpn", "scratch")
METRICS = {
    "detection": ("val_box_ap", "val_box_ap50", "val_mask_ap"),
    "segmentation": ("val_miou", "val_mean_accuracy", "val_pixel_accuracy"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="all other options are the recipe's",
    )
    parser.add_argument("recipe", help="of a detector or segmenter")
    parser.add_argument("--checkpoint", required=True, help="of a pre-training run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="all that the task has, by default")
    parser.add_argument("--out", type=Path, default=Path("runs/necks"))
    options, others = parser.parse_known_args()
    contents = read_checkpoint(options.checkpoint).contents
    recipe, base = read_recipe(options.recipe)
    assert isinstance(base, DetectionConfig | SegmentationConfig)
    base.data.num_workers, base.optimizer.layer_decay = 0, 0.9
    base.trainer.max_epochs, base.trainer.max_steps = 10**6, 400
    base.trainer.visualize_every_n_steps = base.evaluation.every_n_epochs = 10**6  # both at the end
    base.trainer.checkpoint_every_n_steps = 10**6
    base.output_dir = str(options.out)
    base = parse(type(base), others, "necks.py", base)
    arms = options.arms or [arm for arm in ARMS if arm != "fpn" or base.task == "detection"]
    metrics = METRICS[base.task]
    rows: list[dict] = []
    failures = Failures()
    for seed in options.seeds:
        for arm in arms:
            with failures.of(f"{arm}, seed {seed}"):
                config = copy.deepcopy(base)
                config.seed, config.name = seed, f"{arm}-{seed}"
                if arm == "scratch":
                    config.model.scratch, config.model.name = True, contents.variant
                    config.model.patch_size = contents.backbone["patch_size"]
                    config.optimizer.layer_decay = None  # which is for layers that know something
                else:
                    config.model.checkpoint = options.checkpoint
                    config.model.neck = arm
                metrics = json.loads((train(config, recipe) / "summary.json").read_text())["metrics"]
                rows.append({"arm": arm, "seed": seed, **{name: metrics[name] for name in metrics}})
                Console().print(rows[-1])
                options.out.mkdir(parents=True, exist_ok=True)
                name = f"{recipe}-{'-'.join(arms)}-{'-'.join(map(str, options.seeds))}.csv"
                with (options.out / name).open("w", newline="") as file:
                    writer = csv.DictWriter(file, rows[0])
                    writer.writeheader()
                    writer.writerows(rows)
    title = f"in %, {base.trainer.max_steps} steps of {base.data.batch_size}"
    table = Table("arm", *metrics, title=title)
    for arm in arms:
        cells = []
        for metric in metrics:
            values = torch.tensor([100 * row[metric] for row in rows if row["arm"] == arm])
            spread = f" \u00b1 {values.std():.1f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.1f}{spread}" if len(values) else "failed")
        table.add_row(arm, *cells)
    Console().print(table)
    failures.end()


if __name__ == "__main__":
    main()
