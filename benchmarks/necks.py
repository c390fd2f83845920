"""What it is worth that the neck is pre-trained: detection from several starts, all else equal.

python -c "from itpn.data.shapes import write_shapes; write_shapes('SHAPES')"
itpn train itpn-pixel_nano --data.root SHAPES/coco/train2017 SHAPES/imagefolder/train --data.img-size 96 --name shapes
python benchmarks/necks.py SHAPES/coco --checkpoint runs/itpn-pixel_nano/shapes/model.safetensors
"""

import argparse
import copy
import csv
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from itpn.checkpoints.architecture import find_variant, read_architecture
from itpn.checkpoints.files import read_checkpoint
from itpn.engine.detection import find_sets
from itpn.engine.run import train
from itpn.recipes import read_recipe

# backbone and pyramid pre-trained; the backbone alone, with a fresh pyramid or feature pyramid network; nothing
ARMS = ("pyramid", "fresh", "fpn", "scratch")
FIGURES = ("val_box_ap", "val_box_ap50", "val_mask_ap")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of COCO's layout")
    parser.add_argument("--checkpoint", required=True, help="of a pre-training run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--layer-decay", type=float, default=0.9)
    parser.add_argument("--out", type=Path, default=Path("runs/necks"))
    options = parser.parse_args()
    own = read_architecture(read_checkpoint(options.checkpoint)).backbone
    _, base = read_recipe("detector_nano")
    base.data.root, base.data.batch_size, base.data.num_workers = options.data, options.batch_size, 0
    base.optimizer.lr, base.optimizer.layer_decay = options.lr, options.layer_decay
    base.trainer.max_epochs, base.trainer.max_steps = 10**6, options.steps
    base.trainer.picture_every_n_steps = base.evaluation.every_n_epochs = 10**6  # both at the end
    base.trainer.checkpoint_every_n_steps = 10**6
    base.output_dir = str(options.out)
    sets = find_sets(base)
    rows = []
    for seed in options.seeds:
        for arm in options.arms:
            config = copy.deepcopy(base)
            config.seed, config.name = seed, f"{arm}-{seed}"
            if arm == "scratch":
                config.model.scratch, config.model.name = True, find_variant(own)
                config.model.patch_size = own["patch_size"]
                config.optimizer.layer_decay = None  # which is for layers that know something
            else:
                config.model.checkpoint = options.checkpoint
                config.model.neck = arm
            metrics = json.loads((train(config, "necks", sets) / "summary.json").read_text())["metrics"]
            rows.append({"arm": arm, "seed": seed, **{name: metrics[name] for name in FIGURES}})
            Console().print(rows[-1])
            options.out.mkdir(parents=True, exist_ok=True)
            name = f"necks-{'-'.join(options.arms)}-{'-'.join(map(str, options.seeds))}.csv"
            with (options.out / name).open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    table = Table("arm", *FIGURES, title=f"in %, {options.steps} steps of {options.batch_size}")
    for arm in options.arms:
        cells = []
        for figure in FIGURES:
            values = torch.tensor([100 * row[figure] for row in rows if row["arm"] == arm])
            cells.append(f"{values.mean():.1f}" + (f" \u00b1 {values.std():.1f}" if len(values) > 1 else ""))
        table.add_row(arm, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
