"""`itpn predict`: pictures of what a pre-training checkpoint predicts, names from a classifier, features from any."""

import csv
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from rich.text import Text
from safetensors.torch import save
from torch import Tensor, nn

from itpn.checkpoints.files import Checkpoint, read_checkpoint
from itpn.checkpoints.loading import check_sound, load_found
from itpn.config import Config, DataConfig, SegmentationConfig, image_size
from itpn.data.augment import EvaluationTransform
from itpn.data.files import ImageSource
from itpn.data.folders import name_output
from itpn.data.normalize import Normalize
from itpn.data.shards import check_shards
from itpn.errors import UserError, refusal
from itpn.masked.masked_model import MaskedImageModel
from itpn.metrics.detection import to_results
from itpn.models.detector import Detector
from itpn.models.hivit import HiViT, find_backbone
from itpn.models.pyramid import PyramidBackbone
from itpn.models.segmenter import Segmenter
from itpn.system.console import Output, print_aside
from itpn.system.text import as_file_name, one_line
from itpn.system.writing import open_whole, open_whole_text, write_whole
from itpn.tasks.detection.module import detect
from itpn.tasks.drawing import (
    draw_labels,
    draw_objects,
    draw_predictions,
    draw_titles,
    read_whole_images,
    save_labels,
    save_whole,
)
from itpn.tasks.pretraining.module import PretrainingTask
from itpn.tasks.segmentation.evaluation import take_over
from itpn.tasks.segmentation.run import make_segmentation
from itpn.training.run_folder import make_folder, writing_to

PER_PICTURE = 16
TOP = 5  # classes of an image in predictions.csv
ROWS = 20  # images in the table
MIN_SCORE = 0.5  # of objects


def predict(
    checkpoint: str,
    source: ImageSource,
    out: Path,
    seed: int = 0,
    features: Path | None = None,
    min_score: float = MIN_SCORE,
    max_pixels: int | None = None,
) -> None:
    """Write what a checkpoint has to say about images; unreadable ones are named and skipped.

    Args:
        out: folder of the pictures, and of ``predictions.csv`` and ``predictions.json`` of what has names.
        seed: which units a pre-training model does not get to see.
        features: a ``.safetensors`` or ``.npy`` file to be written instead: see :func:`compute_features`.
        min_score: of the objects that a detector's pictures and files show.
        max_pixels: larger images are skipped; None for the checkpoint's own limit.

    Raises:
        UserError: no checkpoint that is known, one that only gives features, or no image can be read.
    """
    found = read_checkpoint(checkpoint)
    check_sound(found)
    for note in [*source.notes, *(check_shards(source.shards, source.members) if source.shards else ())]:
        print_aside(note)
    model, notes = load_found(found)
    for note in notes:
        print_aside(note)
    config = settings_of(found, model, seed)
    config.data.max_pixels = max_pixels or config.data.max_pixels
    normalize = Normalize(config.model.in_chans, config.data.mean, config.data.std)
    crop_pct = found.preprocessing.get("crop_pct")  # a classifier of ours: as it was evaluated
    crop = (
        None
        if crop_pct is None
        else EvaluationTransform(image_size(config.data), crop_pct, found.preprocessing.get("interpolation", "bicubic"))
    )
    batches = read_batches(source, config, crop)
    if features is not None:
        write_features(model, normalize, batches, features)
        return
    if not isinstance(model, MaskedImageModel | Detector | Segmenter) and not (
        isinstance(model, HiViT) and model.num_classes
    ):
        raise UserError(
            f"checkpoint {checkpoint} has neither decoder, classifier, detector nor segmenter: it gives --features "
            "FILE only"
        )
    make_folder(out)
    with writing_to(out):
        write_predictions(found, model, config, normalize, source, batches, out, min_score)


def write_predictions(
    found: Checkpoint,
    model: nn.Module,
    config: Config,
    normalize: Normalize,
    source: ImageSource,
    batches: Iterator[tuple[list[str], Tensor]],
    out: Path,
    min_score: float,
) -> None:
    """What a network says, by what it is; see :func:`predict`."""
    if isinstance(model, MaskedImageModel):
        task = PretrainingTask(model, config, "predict")
        for number, (_, images) in enumerate(batches):
            save_picture(draw_predictions(task, images), out, number)
    elif isinstance(model, Detector):
        names = found.metadata.get("classes") or [str(number) for number in range(1, model.num_classes)]
        whole = read_images(source, (0, 0), config.data.max_pixels, lambda image: image)
        predict_objects(model, whole, names, out, min_score)
    elif isinstance(model, Segmenter):
        whole = read_images(source, (0, 0), config.data.max_pixels, lambda image: image)
        predict_scenes(model, found, whole, out)
    else:
        assert isinstance(model, HiViT)
        predict_classes(model, normalize, batches, found.metadata.get("classes"), out)


def settings_of(found: Checkpoint, model: nn.Module, seed: int) -> Config:
    """The run's own settings, or those that files of others are used with: ImageNet's mean and deviation."""
    backbone = find_backbone(model)
    config = found.config
    if config is None:
        size = backbone.image_shape[1:]
        config = Config(data=DataConfig(img_size=size))
        config.model.in_chans = backbone.patch_embed.proj.in_channels
        if isinstance(own := found.metadata.get("preprocessing"), dict):
            config.data.mean, config.data.std = tuple(own["mean"]), tuple(own["std"])
    if config.model.in_chans not in (1, 3):
        raise UserError(
            f"checkpoint {found.source} is of images with {config.model.in_chans} channels, not of pictures"
        )
    config.seed = seed
    return config


def read_batches(
    source: ImageSource, config: Config, crop: Callable[[Tensor], Tensor] | None = None
) -> Iterator[tuple[list[str], Tensor]]:
    """Names and uint8 images [n, 3, H, W] of a picture each.

    Raises:
        UserError: none of the images can be read.
    """

    images = read_images(source, image_size(config.data), config.data.max_pixels, crop)
    while batch := list(itertools.islice(images, PER_PICTURE)):
        yield [name for name, _ in batch], torch.stack([image for _, image in batch])


def read_images(
    source: ImageSource, size: tuple[int, int], max_pixels: int, crop: Callable[[Tensor], Tensor] | None
) -> Iterator[tuple[str, Tensor]]:
    """Names and uint8 images, see :func:`read_whole_images`; unreadable ones are named, UserError if all are."""
    empty, reason = True, ""

    def skip(text: str) -> None:
        nonlocal reason
        reason = reason or f"; the first is {text}"
        print_aside(f"skipped {text}")

    for named in read_whole_images(source, size, max_pixels, skip, crop):
        empty = False
        yield named
    if empty:
        raise UserError(f"none of the images in {', '.join(source.roots)} can be read{reason}")


def save_picture(picture: Image.Image, out: Path, number: int) -> None:
    path = out / f"prediction-{number:04d}.png"
    save_whole(picture, path)
    Output().print(str(path), markup=False, highlight=False, soft_wrap=True)


@torch.no_grad()
def predict_classes(
    model: HiViT,
    normalize: Normalize,
    batches: Iterator[tuple[list[str], Tensor]],
    classes: list[str] | None,
    out: Path,
) -> None:
    """A table, ``predictions.csv``, ``predictions.json`` and pictures with the likeliest classes.

    Classes are numbers where the file has no names.
    """
    table = Table("image", "class", "probability", "then", box=None, pad_edge=False, header_style="bold")
    path = out / "predictions.csv"
    answers: list[dict[str, Any]] = []
    with open_whole_text(path) as file:
        writer = csv.writer(file)
        writer.writerow(["image", "rank", "class", "probability"])
        for number, (names, images) in enumerate(batches):
            top = model(normalize(images)).softmax(dim=-1).topk(min(TOP, model.num_classes))
            titles = []
            for name, values, indices in zip(names, top.values.tolist(), top.indices.tolist(), strict=True):
                labels = [classes[i] if classes else str(i) for i in indices]
                writer.writerows([name, rank, *pair] for rank, pair in enumerate(zip(labels, values, strict=True), 1))
                likeliest = [
                    {"class": label, "probability": value} for label, value in zip(labels, values, strict=True)
                ]
                answers.append({"image": name, "classes": likeliest})
                others = ", ".join(
                    f"{label} {value:.0%}" for label, value in zip(labels[1:3], values[1:3], strict=True)
                )
                if table.row_count < ROWS:
                    table.add_row(*map(Text, (one_line(Path(name).name), labels[0], f"{values[0]:.1%}", others)))
                titles.append(f"{values[0]:.0%} {labels[0]}")  # a long name is cut at its end
            save_picture(draw_titles(images, titles), out, number)
    write_whole(path.with_suffix(".json"), (json.dumps(answers, indent=1) + "\n").encode())
    print_answers(table, len(answers), f"{path}\n{path.with_suffix('.json')}")


def predict_objects(
    model: Detector, images: Iterator[tuple[str, Tensor]], classes: list[str], out: Path, min_score: float
) -> None:
    """A picture of each image with what is found in it, and all of it in ``predictions.json`` and ``predictions.csv``.

    Boxes are x0, y0, x1, y1 in pixels of the image; masks are COCO's compressed run lengths.
    """
    normalize = Normalize(3, (0.0,), (1.0,))
    answers: list[dict[str, Any]] = []
    table = Table("image", "objects", "likeliest", box=None, pad_edge=False, header_style="bold")
    for number, (name, image) in enumerate(images):
        (found,) = detect(model, normalize, [image])
        keep = found["scores"] >= min_score
        found = {key: value[keep] for key, value in found.items()}
        results = to_results(found, number, tuple(range(len(classes))))
        objects = []
        for result, box in zip(results, found["boxes"].tolist(), strict=True):
            one = {"class": classes[result["category_id"]], "score": result["score"], "box": box}
            objects.append(one | ({"mask": result["segmentation"]} if "segmentation" in result else {}))
        answers.append({"image": name, "size": list(image.shape[-2:]), "objects": objects})
        picture = draw_objects(image, found, classes, min_score)
        save_whole(picture, out / as_file_name(name_output(out, number, name, ".png")))
        if table.row_count < ROWS:
            some = ", ".join(f"{one['class']} {one['score']:.0%}" for one in objects[:4])
            table.add_row(*map(Text, (one_line(Path(name).name), str(len(objects)), some)))
    write_whole(out / "predictions.json", (json.dumps(answers, indent=1) + "\n").encode())
    with open_whole_text(out / "predictions.csv") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "class", "score", "x0", "y0", "x1", "y1"])
        for answer in answers:
            writer.writerows([answer["image"], one["class"], one["score"], *one["box"]] for one in answer["objects"])
    print_answers(table, len(answers), f"{out}/0000-*.png ...\n{out}/predictions.csv, predictions.json")


def predict_scenes(model: Segmenter, found: Checkpoint, images: Iterator[tuple[str, Tensor]], out: Path) -> None:
    """A picture of each image under its classes, and the classes as a PNG of numbers with a palette.

    ``predictions.csv`` and ``.json`` say how much of each image is of which class.
    """
    config = SegmentationConfig()
    take_over(config, found)
    assert config.data.mean is not None
    assert config.data.std is not None
    segment, normalize = make_segmentation(config), Normalize(3, config.data.mean, config.data.std)
    names = found.metadata.get("classes") or [str(number) for number in range(model.num_classes)]
    colours = [tuple(colour) for colour in found.metadata.get("colours") or ()] or None
    answers: list[dict[str, Any]] = []
    table = Table("image", "classes, the largest first", box=None, pad_edge=False, header_style="bold")
    for number, (name, image) in enumerate(images):
        labels = segment(model, normalize, image)
        drawn, mask = (name_output(out, number, name, ending) for ending in (".png", "-labels.png"))
        save_whole(draw_labels(image, labels, names, colours), out / as_file_name(drawn))
        save_labels(labels, len(names), colours, out / as_file_name(mask))
        shares = (labels.flatten().bincount(minlength=len(names)) / labels.numel()).tolist()
        order = sorted(range(len(names)), key=lambda row: -shares[row])
        own = {names[row]: shares[row] for row in order if shares[row]}
        answers.append({"image": name, "size": list(image.shape[-2:]), "labels": mask, "shares": own})
        if table.row_count < ROWS:
            some = ", ".join(f"{one} {share:.0%}" for one, share in list(own.items())[:5])
            table.add_row(*map(Text, (one_line(Path(name).name), some)))
    write_whole(out / "predictions.json", (json.dumps(answers, indent=1) + "\n").encode())
    with open_whole_text(out / "predictions.csv") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "labels", *names])
        for answer in answers:
            writer.writerow([answer["image"], answer["labels"], *(answer["shares"].get(name, 0.0) for name in names)])
    files = f"{out}/0000-*.png, 0000-*-labels.png ...\n{out}/predictions.csv, predictions.json"
    print_answers(table, len(answers), files)


def print_answers(table: Table, count: int, files: str) -> None:
    """The first answers, how many more there are, and where."""
    Output().print(table, highlight=False)
    if count > ROWS:
        Output().print(f"and {count - ROWS} more images in the files", highlight=False)
    Output().print(files, markup=False, highlight=False, soft_wrap=True)


def write_features(
    model: nn.Module, normalize: Normalize, batches: Iterator[tuple[list[str], Tensor]], path: Path
) -> None:
    """Write :func:`compute_features` of all images, a row each, and the images' names.

    Raises:
        UserError: the file cannot be written.
    """
    names: list[str] = []
    rows: list[dict[str, Tensor]] = []
    for batch, images in batches:
        names += batch
        rows.append(compute_features(model, normalize(images)))
    columns = {name: torch.cat([row[name] for row in rows]).contiguous() for name in rows[0]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npy":
            with open_whole(path) as file:
                np.save(file, columns["features"].numpy())
            with open_whole_text(path.with_name(f"{path.name}.txt")) as text:
                text.writelines(f"{one_line(name)}\n" for name in names)
        else:
            write_whole(path, save(columns, {"images": json.dumps(names)}))
    except OSError as error:
        raise refusal(f"--features {path} cannot be written", error) from error
    shapes = ", ".join(f"{name} {list(column.shape)}" for name, column in columns.items())
    Output().print(f"{path}: {shapes}", markup=False, highlight=False, soft_wrap=True)


@torch.no_grad()
def compute_features(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Means over an image: ``features`` of the last stage [n, C], ``pyramid_1`` (finest) to 3 [n, width]."""
    backbone = find_backbone(model)
    stages = backbone.forward_stages(x)
    means = {"features": stages[-1].mean(dim=(1, 2, 3))}
    whole = model.backbone if isinstance(model, Detector | Segmenter) else model
    if isinstance(whole, MaskedImageModel | PyramidBackbone):
        levels = whole.pyramid(stages)
        means |= {f"pyramid_{i}": level.mean(dim=(1, 2, 3)) for i, level in enumerate(levels, start=1)}
    return means
