"""What `itpn predict` shares between tasks: reading images, features of any network, telling what was written."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from safetensors.torch import save
from torch import Tensor, nn

from itpn.data.decode import UnreadableImage, open_sample
from itpn.data.files import ImageSource
from itpn.data.normalize import Normalize
from itpn.data.readers import FileReader
from itpn.data.shards import read_shard
from itpn.errors import UserError, refusal
from itpn.models.hivit import find_backbone
from itpn.models.pyramid import find_pyramid
from itpn.system.console import Output, print_aside, print_warnings
from itpn.system.text import one_line
from itpn.system.writing import open_whole, open_whole_text, write_whole
from itpn.tasks.drawing import save_whole
from itpn.tasks.preprocessing import Crop

PER_IMAGE = 16  # images in one of the written images
ROWS = 20  # images in the table


@dataclass(frozen=True)
class PredictionOptions:
    """Options of `itpn predict`.

    Attributes:
        out: folder of the images, and of ``predictions.csv`` and ``predictions.json`` of what has classes.
        seed: which patches a pre-training model does not get to see.
        min_score: of the objects that a detector's images and files show.
        max_pixels: larger images are skipped.
    """

    out: Path
    seed: int
    min_score: float
    max_pixels: int


def read_batches(source: ImageSource, crop: Crop, max_pixels: int) -> Iterator[tuple[list[str], Tensor]]:
    """Names and uint8 images [n, 3, H, W], up to `PER_IMAGE` at a time.

    Args:
        crop: makes images of one size.

    Raises:
        UserError: none of the images can be read.
    """
    images = read_images(source, crop, max_pixels)
    while batch := list(itertools.islice(images, PER_IMAGE)):
        yield [name for name, _ in batch], torch.stack([image for _, image in batch])


def read_as_they_are(source: ImageSource, max_pixels: int) -> Iterator[tuple[str, Tensor]]:
    """Names and uint8 images [3, height, width] of any size."""
    return read_images(source, lambda image: image, max_pixels)


def read_images(source: ImageSource, crop: Crop, max_pixels: int) -> Iterator[tuple[str, Tensor]]:
    """Names and uint8 images, see :func:`decode_images`; unreadable ones are named, UserError if all are."""
    empty, reason = True, ""

    def skip(text: str) -> None:
        nonlocal reason
        reason = reason or f"; the first is {text}"
        print_aside(f"skipped {text}")

    for named in decode_images(source, crop, max_pixels, skip):
        empty = False
        yield named
    if empty:
        raise UserError(f"none of the images in {', '.join(source.roots)} can be read{reason}")


def decode_images(
    source: ImageSource, crop: Crop, max_pixels: int, skipped: Callable[[str], None] = lambda message: None
) -> Iterator[tuple[str, Tensor]]:
    """Decode images one after the other: name and uint8 [3, height, width]. Warnings of their values are printed.

    Args:
        skipped: told "name: reason" of an unreadable one.
    """
    files = FileReader(source.images)
    shards = (read_shard(shard, source.members) for shard in source.shards)
    for name, data in itertools.chain((files[number] for number in range(len(files))), *shards):
        try:
            image = open_sample(data, max_pixels)
            pixels = image.decode()
        except UnreadableImage as error:
            skipped(f"{name}: {error}")
            continue
        print_warnings({kind: (name, remark) for kind, remark in image.warnings.items()})
        yield name, crop(pixels)


def write_features(
    model: nn.Module, normalize: Normalize, batches: Iterator[tuple[list[str], Tensor]], path: Path
) -> None:
    """Write :func:`mean_features` of all images, a row each, and the images' names.

    Raises:
        UserError: the file cannot be written.
    """
    names: list[str] = []
    rows: list[dict[str, Tensor]] = []
    for batch, images in batches:
        names += batch
        rows.append(mean_features(model, normalize(images)))
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
def mean_features(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Means over an image: ``features`` of the last stage [n, C], ``pyramid_1`` (finest) to 3 [n, width]."""
    backbone = find_backbone(model)
    stages = backbone.forward_stages(x)
    means = {"features": stages[-1].mean(dim=(1, 2, 3))}
    pyramid = find_pyramid(model)
    if pyramid is not None:
        levels = pyramid(stages)
        means |= {f"pyramid_{i}": level.mean(dim=(1, 2, 3)) for i, level in enumerate(levels, start=1)}
    return means


def save_picture(picture: Image.Image, out: Path, number: int) -> None:
    path = out / f"prediction-{number:04d}.png"
    save_whole(picture, path)
    Output().print(str(path), markup=False, highlight=False, soft_wrap=True)


def print_answers(table: Table, count: int, files: str) -> None:
    """The first answers, how many more there are, and where."""
    Output().print(table, highlight=False)
    if count > ROWS:
        Output().print(f"and {count - ROWS} more images in the files", highlight=False)
    Output().print(files, markup=False, highlight=False, soft_wrap=True)
