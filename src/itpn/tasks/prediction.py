"""What `itpn predict` shares between tasks: reading and preparing images, and writing what was found."""

import csv
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from itpn.checkpoints.files import Checkpoint
from itpn.data.augment import EvaluationTransform, center_crop
from itpn.data.files import ImageSource
from itpn.data.normalize import Normalize
from itpn.data.stored import ReadSettings
from itpn.models.backbone import find_backbone
from itpn.system.console import Output, print_note
from itpn.system.text import one_line
from itpn.system.writing import open_whole_text, write_whole
from itpn.tasks.drawing import save_whole
from itpn.tasks.pixels import stored_normalize
from itpn.tasks.source_images import SourceImages

Crop = Callable[[Tensor], Tensor]  # of a whole image, uint8 [3, height, width]

PER_IMAGE = 16  # images in one of the written images
ROWS = 20  # images in the table


@dataclass(frozen=True)
class PredictionOptions:
    """Options of `itpn predict`.

    Attributes:
        out: folder of the images, and of ``predictions.csv`` and ``predictions.json`` of what has classes.
        seed: of the masks of a pre-training model.
        min_score: of the objects that a detector's images and files show.
        max_objects: objects that a detector finds in an image at most; None for the checkpoint's own limit.
        max_pixels: images with more are skipped, unless they are cut into tiles that can be decoded alone.
        window_size: side of the tiles that large images are cut into; None to see `itpn.tasks.large.find_tiling`.
        window_overlap: pixels that tiles share.
    """

    out: Path
    max_pixels: int
    seed: int = 0
    min_score: float = 0.5
    max_objects: int | None = None
    window_size: int | None = None
    window_overlap: int | None = None


def read_preprocessing(checkpoint: Checkpoint, model: nn.Module) -> tuple[Crop, Normalize]:
    """How images are cropped and normalized: as the file says, or the largest centre crop and ImageNet's mean and std.

    Raises:
        UserError: the network takes channels of which the file does not say what they are.
    """
    own, (channels, height, width) = checkpoint.preprocessing, find_backbone(model).image_shape
    normalize = stored_normalize(checkpoint, channels)
    if "crop_pct" in own:  # of a classifier: as it was evaluated
        interpolation = own.get("interpolation", "bicubic")
        return EvaluationTransform((height, width), own["crop_pct"], interpolation, normalize.pixels), normalize
    return functools.partial(center_crop, img_size=(height, width), nodata=normalize.pixels.nodata), normalize


def read_batches(source: ImageSource, crop: Crop, reading: ReadSettings) -> Iterator[tuple[list[str], Tensor]]:
    """Names and uint8 images [n, 3, H, W], up to `PER_IMAGE` at a time.

    Args:
        crop: makes images of one size.

    Raises:
        UserError: none of the images can be read.
    """
    images = read_images(source, reading, crop)
    while batch := list(itertools.islice(images, PER_IMAGE)):
        yield [name for name, _ in batch], torch.stack([image for _, image in batch])


def read_images(
    source: ImageSource, reading: ReadSettings, crop: Crop | None = None, report: Callable[[str], object] = print_note
) -> Iterator[tuple[str, Tensor]]:
    """Decode images one after the other: name and uint8 [3, height, width]. Warnings of their values are printed.

    Args:
        crop: None for whole images.
        report: takes which image is skipped, and why.

    Raises:
        UserError: none of the images can be read.
    """
    images = SourceImages(source, reading, report)
    for image in images:
        pixels = None
        with images.skipping(image.name, image):
            pixels = image.whole()
        if pixels is not None:
            yield image.name, pixels if crop is None else crop(pixels)


def save_image(image: Image.Image, out: Path, number: int) -> None:
    path = out / f"prediction-{number:04d}.png"
    save_whole(image, path)
    Output().print(str(path), markup=False, highlight=False, soft_wrap=True)


class Predictions:
    """What was predicted for images: a table of the first, ``predictions.csv`` and ``predictions.json`` of all.

    Args:
        titles: of the table, the image's aside.
        columns: of the CSV file.
    """

    def __init__(self, titles: Sequence[str], columns: Sequence[str]) -> None:
        self.columns = columns
        self.images: list[dict[str, Any]] = []
        self._lines: list[Sequence[Any]] = []
        self._table = Table("image", *titles, box=None, pad_edge=False, header_style="bold")

    def add(self, image: dict[str, Any], lines: Iterable[Sequence[Any]], cells: Sequence[str]) -> None:
        """Add an image.

        Args:
            image: for the JSON file; "image" is its name.
            lines: for the CSV file.
            cells: for the table.
        """
        self.images.append(image)
        self._lines += lines
        if self._table.row_count < ROWS:
            self._table.add_row(*map(Text, (one_line(Path(image["image"]).name), *cells)))

    def write(self, out: Path, images: str = "") -> None:
        """Write the files, print the table and where everything is.

        Args:
            images: names of the written images, for the last line.
        """
        write_whole(out / "predictions.json", (json.dumps(self.images, indent=1) + "\n").encode())
        with open_whole_text(out / "predictions.csv") as file:
            writer = csv.writer(file)
            writer.writerows([self.columns, *self._lines])
        Output().print(self._table, highlight=False)
        if len(self.images) > ROWS:
            Output().print(f"and {len(self.images) - ROWS} more images in the files", highlight=False)
        where = f"{images}\n{out}/predictions.csv, predictions.json".lstrip()
        Output().print(where, markup=False, highlight=False, soft_wrap=True)
