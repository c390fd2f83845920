"""`itpn demo`: the whole path on generated images, in minutes on two cores."""

import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from itpn.config import ClassificationConfig, Config
from itpn.data.files import find_images
from itpn.data.shapes import write_shapes
from itpn.engine.pictures import read_whole_images
from itpn.engine.probe import Accuracy, probe
from itpn.engine.run import train
from itpn.recipes import read_recipe

FINE_TUNING_STEPS = 400
RECIPES = {"pixels": "itpn-pixel_nano", "pixels and features (MFM)": "itpn-mfm_nano"}


def demo(output_dir: Path) -> None:
    """Write the sample set, pre-train itpn_nano on it with and without MFM, and compare what was learned.

    Raises:
        UserError: the folder cannot be written.
        RunStopped: as :func:`itpn.engine.run.train`; the same command goes on.
    """
    console = Console()
    folders = write_shapes(output_dir / "shapes", train=1200, val=300, img_size=64)
    console.print(f"sample images: {folders.imagefolder} (also as COCO and ADE20K beside it)", soft_wrap=True)
    table = Table(
        "predicted", "loss", "backbone", "pyramid", title="shapes that a linear classifier on frozen features names"
    )
    runs = []
    for name in RECIPES.values():
        recipe, config = read_recipe(name)
        assert isinstance(config, Config)
        config.data.root = (str(folders.imagefolder),)
        # many small steps: the most to be seen in a few minutes on two cores
        config.data.batch_size, config.data.num_workers = 8, 1
        config.optimizer.lr = 7e-4
        config.trainer.max_epochs = 8
        config.trainer.devices = 1  # eight GPUs would make few steps of these images
        config.output_dir = str(output_dir)
        runs.append((config, train(config, recipe)))
    sets = [_read_labelled(folders.imagefolder / split) for split in ("train", "val")]
    table.add_row("nothing: random weights", "", *_percent(probe(runs[0][0], None, sets)))
    for title, (config, run) in zip(RECIPES, runs, strict=True):
        table.add_row(title, _last_loss(run), *_percent(probe(config, run / "model.safetensors", sets)))
    console.print(table)
    console.print("six shapes, so chance is 17 %; a few minutes are little for either: benchmarks/RESULTS.md has more")
    title = f"shapes that a classifier names after {FINE_TUNING_STEPS} steps of fine-tuning"
    table = Table("start", "accuracy", title=title)
    starts = {"random weights": None, "pre-trained on pixels": runs[0][1] / "model.safetensors"}
    for start, checkpoint in starts.items():
        classifier = fine_tune(folders.imagefolder, checkpoint, output_dir)
        figures = json.loads((classifier / "summary.json").read_text())["metrics"]
        table.add_row(start, f"{figures['val_top1']:.1%}")
    console.print(table)
    pictures = "\n".join(str(max((run / "reconstructions").glob("*.png"))) for _, run in runs)
    console.print(
        f"[bold]look at[/bold] these, three of four units were hidden:\n{pictures}\n"
        f"weights: {runs[-1][1] / 'model.safetensors'}\nclassifier: {classifier / 'model.safetensors'}\n"
        f"curves: tensorboard --logdir {output_dir}\n"
        f"your own images: itpn train itpn-mfm_tiny --data.root FOLDER",
        soft_wrap=True,
        highlight=False,
    )


def fine_tune(images: Path, checkpoint: Path | None, output_dir: Path) -> Path:
    """Train a classifier of the sample set from a checkpoint, or from scratch with the same steps."""
    recipe, config = read_recipe("classifier_small")
    assert isinstance(config, ClassificationConfig)
    if checkpoint is None:
        config.model.name, config.model.patch_size, config.model.scratch = "itpn_nano", 8, True
        config.name = "scratch"
    else:
        config.model.checkpoint, config.name = str(checkpoint), "pre-trained"
    config.data.root, config.data.img_size, config.data.crop_pct = (str(images),), 64, 1.0
    config.data.batch_size, config.data.num_workers = 32, 1
    # so few steps are for the shapes, not for what colours and small crops may do to them
    config.data.crop_scale, config.data.auto_augment, config.data.erase = (0.7, 1.0), None, 0.0
    config.optimizer.lr, config.optimizer.layer_decay = 1e-3, None
    config.trainer.max_epochs, config.trainer.max_steps = 100, FINE_TUNING_STEPS
    config.trainer.devices = 1
    config.evaluation.every_n_epochs = 100  # at the end
    config.output_dir = str(output_dir)
    return train(config, recipe)


def _read_labelled(folder: Path) -> tuple[Tensor, Tensor]:
    """Images of a folder of classes, uint8 [n, 3, 64, 64], and their labels, int64 [n]."""
    source = find_images([folder])
    classes = sorted({Path(path).parent.name for path in source.images})
    labels = [classes.index(Path(path).parent.name) for path in source.images]
    return torch.stack([image for _, image in read_whole_images(source, (64, 64), 2**20)]), torch.tensor(labels)


def _percent(accuracy: Accuracy) -> list[str]:
    return [f"{accuracy.linear:.1%}", f"{accuracy.pyramid_linear:.1%}"]


def _last_loss(run: Path) -> str:
    header, *_, last = (run / "metrics.csv").read_text().splitlines()
    row = dict(zip(header.split(","), last.split(","), strict=True))
    return ", ".join(f"{name.removeprefix('loss_')} {float(row[name]):.2f}" for name in row if name.startswith("loss"))
