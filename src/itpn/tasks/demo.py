"""`itpn demo`: the whole story on generated images, in minutes on two cores."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFont
from rich.table import Table
from torch import Tensor

from itpn.checkpoints.load import load
from itpn.data.decode import decode_image
from itpn.data.scenes import CLASSES, GROUNDS
from itpn.data.shapes import ShapesFolders, write_shapes
from itpn.errors import RunStopped
from itpn.system.console import Output
from itpn.tasks.classification.config import ClassificationConfig
from itpn.tasks.detection.config import DetectionConfig
from itpn.tasks.detection.evaluation import detect
from itpn.tasks.drawing import LARGE, add_legend, draw_labels, draw_objects, name_colour, show, tile_images
from itpn.tasks.parallel_runs import PlannedRun, train_side_by_side
from itpn.tasks.pixels import make_normalize
from itpn.tasks.pretraining.config import PretrainingConfig
from itpn.tasks.pretraining.module import PretrainingModule
from itpn.tasks.pretraining.prediction import mask_and_predict
from itpn.tasks.recipe_files import read_recipe
from itpn.tasks.segmentation.config import SegmentationConfig
from itpn.tasks.segmentation.inference import make_segmentation
from itpn.training.config import AnyConfig, freeze

IMG_SIZE, ROWS = 48, 4  # pixels of the images; and rows of demo.png
PRETRAINING_STEPS = 2000
RECIPE = "itpn-pixel_nano"
FIRST_GROUND = len(CLASSES) + 1
COLOURS = [  # of segmentation; shapes have those that they have in detection
    *map(name_colour, range(FIRST_GROUND, FIRST_GROUND + len(GROUNDS))),
    *map(name_colour, range(1, FIRST_GROUND)),
]


@dataclass(frozen=True)
class Comparison:
    """A fine-tuning of the demo.

    Attributes:
        configure: gives its recipe, with settings for the sample set.
        metric: of its summary, which says what a start is worth.
        title: of that metric.
    """

    verb: str
    configure: Callable[[ShapesFolders], tuple[str, Any]]
    steps: int
    metric: str
    title: str


def classifier(folders: ShapesFolders) -> tuple[str, Any]:
    recipe, config = read_recipe("classifier_small")
    assert isinstance(config, ClassificationConfig)
    config.data.root, config.data.batch_size = (str(folders.imagefolder),), 32
    # so few steps are for the shapes, not for what colours and small crops may do to them
    config.data.crop_scale, config.data.crop_pct = (0.7, 1.0), 1.0
    config.data.auto_augment, config.data.erase, config.model.ema_decay = None, 0.0, None
    return recipe, config


def detector(folders: ShapesFolders) -> tuple[str, Any]:
    recipe, config = read_recipe("detector_nano")
    assert isinstance(config, DetectionConfig)
    config.data.root = str(folders.coco)
    # many small steps of boxes alone: the most to be seen in a minute
    config.data.batch_size, config.data.scales, config.model.masks = 4, (1.0, 1.0), False
    config.model.head_width, config.model.rpn_post_nms_top_n_train, config.model.box_batch_size_per_image = 32, 100, 32
    config.evaluation.batch_size = 10
    return recipe, config


def segmenter(folders: ShapesFolders) -> tuple[str, Any]:
    recipe, config = read_recipe("segmenter_nano")
    assert isinstance(config, SegmentationConfig)
    config.data.root, config.data.reduce_zero_label = str(folders.ade20k), True
    return recipe, config


TASKS = (
    Comparison("classify", classifier, 300, "val_top1", "top-1 accuracy"),
    Comparison("detect", detector, 200, "val_box_ap50", "AP50 of boxes"),
    Comparison("segment", segmenter, 120, "val_miou", "mean IoU"),
)


def demo(output_dir: Path) -> None:
    """Write the sample set, pre-train itpn_nano on it, and classify, detect and segment with it and without.

    Raises:
        UserError: the folder cannot be written.
        RunStopped: as :func:`itpn.tasks.run.train`; the same command resumes.
    """
    console = Output()
    folders = write_shapes(output_dir / "shapes", train=1200, val=150, img_size=IMG_SIZE)
    console.print(f"sample images, as ImageNet, COCO and ADE20K have theirs: {output_dir / 'shapes'}", soft_wrap=True)
    pretraining = plan_pretraining(folders, output_dir)
    checkpoint = pretraining.folder.weights
    plans = {
        "pre-train": pretraining,
        **{f"{task.verb} from scratch": plan(task, folders, None, output_dir) for task in TASKS},
        **{task.verb: plan(task, folders, checkpoint, output_dir) for task in TASKS},
    }
    try:
        train_side_by_side(plans, output_dir / "logs", console)
    except RunStopped as stop:
        console.print("stopped; the same command resumes")
        stop.reported = True
        raise
    table = Table("task", "steps", "metric", "from scratch", "pre-trained", title="what pre-training is worth")
    for task in TASKS:
        metrics = [read_metric(plans[title], task.metric) for title in (f"{task.verb} from scratch", task.verb)]
        table.add_row(task.verb, str(task.steps), task.title, *(f"{value:.1%}" for value in metrics))
    console.print(table)
    console.print("learned in minutes from 2,400 images: benchmarks/RESULTS.md has more")
    networks = {title: plan.folder.weights for title, plan in plans.items() if "scratch" not in title}
    image = output_dir / "demo.png"
    draw_story(networks, folders).save(image)
    weights = "\n".join(f"{title + ':':<10} {path}" for title, path in networks.items())
    console.print(
        f"[bold]look at[/bold] {image}: images that none of them has seen\n{weights}\n"
        f"curves:    tensorboard --logdir {output_dir}\n"
        f"your own images: itpn train itpn-mfm_tiny --data.root FOLDER",
        soft_wrap=True,
        highlight=False,
    )


def plan_pretraining(folders: ShapesFolders, output_dir: Path) -> PlannedRun:
    recipe, config = read_recipe(RECIPE)
    assert isinstance(config, PretrainingConfig)
    config.data.root = (str(folders.imagefolder / "train"), str(folders.coco / "train2017"))
    config.data.img_size, config.data.batch_size = IMG_SIZE, 16
    # the most to be seen in a few minutes: many small steps, crops that keep the shapes, a light decoder
    config.model.decoder_depth, config.data.crop_scale = 1, (0.5, 1.0)
    return PlannedRun(recipe, settle(config, PRETRAINING_STEPS, output_dir))


def plan(task: Comparison, folders: ShapesFolders, checkpoint: Path | None, output_dir: Path) -> PlannedRun:
    """Fine-tuning for a task from a checkpoint, or training from scratch with the same steps."""
    recipe, config = task.configure(folders)
    if checkpoint is None:
        config.model.name, config.model.patch_size, config.model.scratch = "itpn_nano", 8, True
        config.name = "scratch"
    else:
        config.model.checkpoint, config.name = str(checkpoint), "pre-trained"
    config.data.img_size, config.optimizer.layer_decay = IMG_SIZE, None
    config.evaluation.every_n_epochs = 1000  # at the end
    return PlannedRun(recipe, settle(config, task.steps, output_dir), after=None if checkpoint is None else "pre-train")


def settle(config: AnyConfig, steps: int, output_dir: Path) -> AnyConfig:
    """With what all runs of the demo have in common."""
    config.optimizer.lr, config.data.num_workers = 1e-3, 0  # two runs keep two cores busy
    config.trainer.max_epochs, config.trainer.max_steps = 1000, steps
    config.trainer.devices = 1  # eight GPUs would make few steps of these images
    config.output_dir = str(output_dir)
    return freeze(config)


def read_metric(plan: PlannedRun, name: str) -> float:
    metrics = json.loads((plan.folder.path / "summary.json").read_bytes())["metrics"]
    return float(metrics[name])


@torch.no_grad()
def draw_story(networks: dict[str, Path], folders: ShapesFolders) -> Image.Image:
    """A row for each of some scenes: what pre-training sees and fills in, what detector and segmenter find in it; and
    another image with the name that the classifier gives it."""
    scenes = _read(sorted((folders.coco / "val2017").glob("*.jpg")))
    singles = _read([min((folders.imagefolder / "val" / name).glob("*.jpg")) for name in CLASSES])
    models: dict[str, Any] = {verb: load(path) for verb, path in networks.items()}
    _, config = read_recipe(RECIPE)
    assert isinstance(config, PretrainingConfig)
    normalize = make_normalize(config)
    columns = mask_and_predict(PretrainingModule(models["pre-train"], config, RECIPE), scenes)
    named = models["classify"](normalize(singles)).softmax(dim=-1)
    _, segmenter = read_recipe("segmenter_nano")
    assert isinstance(segmenter, SegmentationConfig)
    segmenter.data.img_size = IMG_SIZE
    segment = make_segmentation(segmenter)
    font = ImageFont.load_default(size=13)
    tiles = []
    for row, scene in enumerate(scenes):
        probability, label = named[row].max(dim=0)
        name = models["classify"].pretrained_cfg["label_names"][int(label)]  # folders come by the alphabet
        entry = (f"{name} {float(probability):.0%}", name_colour(CLASSES.index(name) + 1))
        (found,) = detect(models["detect"], normalize, [scene])
        tiles += [
            *(show(columns[name][row], LARGE) for name in ("masked", "predicted")),
            add_legend(show(singles[row], LARGE), [entry], font),
            draw_objects(scene, found, CLASSES, 0.2),
            draw_labels(scene, segment(models["segment"], normalize, scene), GROUNDS + CLASSES, COLOURS),
        ]
    titles = ("pre-train: three of four patches are masked", "and predicted", "classify", "detect", "segment")
    return tile_images(tiles, titles, len(titles))


def _read(paths: list[Path]) -> Tensor:
    return torch.stack([decode_image(path.read_bytes()) for path in paths[:ROWS]])
