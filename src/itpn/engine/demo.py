"""`itpn demo`: the whole story on generated images, in minutes on two cores."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFont
from rich.console import Console
from rich.table import Table
from torch import Tensor

from itpn.checkpoints.loading import load
from itpn.config import ClassificationConfig, Config, FineTuningRun, SegmentationConfig
from itpn.data.decode import decode_image
from itpn.data.normalize import Normalize
from itpn.data.shapes import CLASSES, GROUNDS, ShapesFolders, write_shapes
from itpn.engine.pictures import (
    LARGE,
    add_legend,
    draw_labels,
    draw_objects,
    enlarge,
    hide_and_predict,
    join_pictures,
    name_colour,
)
from itpn.engine.run import train
from itpn.engine.segmentation import make_segmentation
from itpn.recipes import read_recipe
from itpn.tasks.classification import classify
from itpn.tasks.detection import detect
from itpn.tasks.pretrain import PretrainingTask

IMG_SIZE, PER_SET = 64, 4  # pixels; rows of the picture
RECIPE = "itpn-pixel_nano"
FIRST_GROUND = len(CLASSES) + 1
COLOURS = [  # of segmentation; shapes have those that they have in detection
    *map(name_colour, range(FIRST_GROUND, FIRST_GROUND + len(GROUNDS))),
    *map(name_colour, range(1, FIRST_GROUND)),
]


@dataclass(frozen=True)
class Task:
    """A fine-tuning of the demo.

    Attributes:
        layout: of the sample set.
        settings: of its recipe, to be others.
        figure: of its summary, which says what a start is worth.
        title: of that figure.
    """

    verb: str
    recipe: str
    layout: str
    steps: int
    settings: dict[str, dict[str, Any]]
    figure: str
    title: str


# so few steps are for the shapes, not for what colours and small crops may do to them
MILD = {"batch_size": 32, "crop_pct": 1.0, "crop_scale": (0.7, 1.0), "auto_augment": None, "erase": 0.0}
NARROW = {"head_width": 32, "samples": 32, "proposals": 100}
TASKS = (
    Task("classify", "classifier_small", "imagefolder", 300, {"data": MILD}, "val_top1", "images named"),
    Task("detect", "detector_nano", "coco", 150, {"model": NARROW}, "val_box_ap50", "AP50 of boxes"),
    Task("segment", "segmenter_nano", "ade20k", 200, {"data": {"reduce_zero_label": True}}, "val_miou", "mean IoU"),
)


def demo(output_dir: Path) -> None:
    """Write the sample set, pre-train itpn_nano on it, and classify, detect and segment with it and without.

    Raises:
        UserError: the folder cannot be written.
        RunStopped: as :func:`itpn.engine.run.train`; the same command goes on.
    """
    console = Console()
    folders = write_shapes(output_dir / "shapes", train=1200, val=300, img_size=IMG_SIZE)
    console.print(f"sample images, as ImageNet, COCO and ADE20K have theirs: {output_dir / 'shapes'}", soft_wrap=True)
    recipe, config = read_recipe(RECIPE)
    assert isinstance(config, Config)
    config.data.root = (str(folders.imagefolder / "train"), str(folders.coco / "train2017"))
    # many small steps: the most to be seen in a few minutes on two cores
    config.data.batch_size, config.data.num_workers = 8, 1
    config.optimizer.lr = 7e-4
    config.trainer.max_epochs = 4
    config.trainer.devices = 1  # eight GPUs would make few steps of these images
    config.output_dir = str(output_dir)
    checkpoint = train(config, recipe) / "model.safetensors"
    table = Table("task", "steps", "figure", "from scratch", "pre-trained", title="what pre-training is worth")
    networks = {"pre-train": checkpoint}
    for task in TASKS:
        cells = []
        for start in (None, checkpoint):
            run = fine_tune(task, folders, start, output_dir)
            cells.append(f"{json.loads((run / 'summary.json').read_text())['metrics'][task.figure]:.1%}")
        networks[task.verb] = run / "model.safetensors"
        table.add_row(task.verb, str(task.steps), task.title, *cells)
    console.print(table)
    console.print("in these minutes everything is learned from 2,400 images: benchmarks/RESULTS.md has more")
    picture = output_dir / "demo.png"
    draw_story(networks, folders).save(picture)
    weights = "\n".join(f"{verb + ':':<10} {path}" for verb, path in networks.items())
    console.print(
        f"[bold]look at[/bold] {picture}: images that none of them has seen\n{weights}\n"
        f"curves:    tensorboard --logdir {output_dir}\n"
        f"your own images: itpn train itpn-mfm_tiny --data.root FOLDER",
        soft_wrap=True,
        highlight=False,
    )


def fine_tune(task: Task, folders: ShapesFolders, checkpoint: Path | None, output_dir: Path) -> Path:
    """Train for a task from a checkpoint, or from scratch with the same steps."""
    recipe, config = read_recipe(task.recipe)
    assert isinstance(config, FineTuningRun)
    if checkpoint is None:
        config.model.name, config.model.patch_size, config.model.scratch = "itpn_nano", 8, True
        config.name = "scratch"
    else:
        config.model.checkpoint, config.name = str(checkpoint), "pre-trained"
    root = str(getattr(folders, task.layout))
    config.data.root = (root,) if isinstance(config, ClassificationConfig) else root
    config.data.img_size, config.data.num_workers = IMG_SIZE, 1
    for part, settings in task.settings.items():
        for name, value in settings.items():
            setattr(getattr(config, part), name, value)
    config.optimizer.lr, config.optimizer.layer_decay = 1e-3, None
    config.trainer.max_epochs, config.trainer.max_steps = 100, task.steps
    config.trainer.devices = 1
    config.evaluation.every_n_epochs = 100  # at the end
    config.output_dir = str(output_dir)
    return train(config, recipe)


@torch.no_grad()
def draw_story(networks: dict[str, Path], folders: ShapesFolders) -> Image.Image:
    """A row for each of some scenes: what pre-training sees and fills in, what detector and segmenter find in it; and
    another image with the name that the classifier gives it."""
    scenes = _read(sorted((folders.coco / "val2017").glob("*.jpg")))
    singles = _read([min((folders.imagefolder / "val" / name).glob("*.jpg")) for name in CLASSES])
    models: dict[str, Any] = {verb: load(path) for verb, path in networks.items()}
    _, config = read_recipe(RECIPE)
    assert isinstance(config, Config)
    normalize = Normalize(3, config.data.mean, config.data.std)
    columns = hide_and_predict(PretrainingTask(models["pre-train"], config, RECIPE), scenes)
    named = classify(models["classify"], normalize, singles).exp()
    _, segmenter = read_recipe("segmenter_nano")
    assert isinstance(segmenter, SegmentationConfig)
    segmenter.data.img_size = IMG_SIZE
    segment = make_segmentation(segmenter)
    font = ImageFont.load_default(size=13)
    pictures = []
    for row, scene in enumerate(scenes):
        share, label = named[row].max(dim=0)
        name = models["classify"].pretrained_cfg["label_names"][int(label)]  # folders come by the alphabet
        entry = (f"{name} {float(share):.0%}", name_colour(CLASSES.index(name) + 1))
        (found,) = detect(models["detect"], Normalize(3, (0.0,), (1.0,)), [scene])
        pictures += [
            *(_show(columns[name][row]) for name in ("masked", "predicted")),
            add_legend(_show(singles[row]), [entry], font),
            draw_objects(scene, found, CLASSES, 0.5),
            draw_labels(scene, segment(models["segment"], normalize, scene), GROUNDS + CLASSES, COLOURS),
        ]
    titles = ("pre-train: three of four units are hidden", "and filled in", "classify", "detect", "segment")
    return join_pictures(pictures, len(titles), titles)


def _read(paths: list[Path]) -> Tensor:
    return torch.stack([decode_image(path.read_bytes()) for path in paths[:PER_SET]])


def _show(image: Tensor) -> Image.Image:
    return Image.fromarray(enlarge(image, LARGE).permute(1, 2, 0).numpy())
