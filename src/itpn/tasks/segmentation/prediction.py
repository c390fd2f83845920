"""The classes of the pixels of images: files of `itpn predict`, and visualizations of a run."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from itpn.checkpoints.files import Checkpoint
from itpn.data.decode import MAX_PIXELS
from itpn.data.files import ImageSource
from itpn.models.modes import eval_mode
from itpn.models.segmenter import Segmenter
from itpn.system.text import as_file_name
from itpn.system.writing import name_output
from itpn.tasks.data import RunData, read_samples
from itpn.tasks.display import make_display, stored_display
from itpn.tasks.drawing import draw_labels, name_colour, save_labels, save_whole, tile_images
from itpn.tasks.evaluation import EvaluationRequest
from itpn.tasks.finetuning.network import name_classes
from itpn.tasks.georeference import ROWS, write_raster
from itpn.tasks.large import find_tiling, show_tiles, tiling_of_run
from itpn.tasks.overview import Overview, label_array
from itpn.tasks.pixels import make_normalize, stored_read_settings
from itpn.tasks.prediction import PredictionOptions, Predictions
from itpn.tasks.segmentation.config import SegmentationConfig
from itpn.tasks.segmentation.evaluation import resolve_evaluation
from itpn.tasks.segmentation.inference import enlarge_labels, make_segmentation, segment_tiles
from itpn.tasks.segmentation.module import SegmentationModule
from itpn.tasks.source_images import NO_DATA, SourceImage, SourceImages, find_missing
from itpn.tasks.tiling import Grid, Tile
from itpn.training.config import freeze

SAMPLES = 6


def predict(model: Segmenter, checkpoint: Checkpoint, source: ImageSource, options: PredictionOptions) -> None:
    """Each image under the classes of its pixels, and these as a PNG of class indices with a palette.

    Of a georeferenced image they are a GeoTIFF too. The files say which fraction of each image is of which class.
    """
    config = freeze(resolve_evaluation(SegmentationConfig(), EvaluationRequest(checkpoint))[0])
    trained, usual = checkpoint.settings.get("data", {}), checkpoint.preprocessing.get("image_side")
    tiling = find_tiling(options.window_size, options.window_overlap, trained, usual or config.data.short)
    segment = functools.partial(make_segmentation(config).probabilities, model, make_normalize(config))
    names, display = name_classes(checkpoint, model.num_classes), stored_display(checkpoint)
    colours = [tuple(colour) for colour in checkpoint.metadata.get("colours") or ()]
    files = LabelFiles(options.out, names, colours or [name_colour(number) for number in range(1, len(names) + 1)])
    images = SourceImages(source, stored_read_settings(checkpoint, options.max_pixels))
    for image in images:
        with (
            images.skipping(image.name, image),
            label_array(options.out, image.height, image.width) as labels,
        ):
            grid = tiling.cut(image)
            fill = fill_whole if grid is None else functools.partial(fill_tiles, grid)
            pixels, shown = fill(segment, image, labels)
            files.add(image, labels, display(pixels), shown)
    files.finish()


Probabilities = Callable[[Tensor], Tensor]  # of the classes of an image's pixels


def fill_whole(segment: Probabilities, image: SourceImage, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Classes of the pixels of an image.

    Returns:
        The pixels of the image and its classes, to be drawn.
    """
    pixels = image.whole()
    found = enlarge_labels(segment(pixels), pixels.shape[-2:])
    found[find_missing(pixels, image.nodata)] = NO_DATA
    labels[:] = found.numpy()
    return pixels, found


def fill_tiles(grid: Grid, segment: Probabilities, image: SourceImage, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """As :func:`fill_whole`, of an image in tiles; what is drawn is smaller."""
    overview = Overview(image.height, image.width)

    def read(tile: Tile) -> Tensor:
        pixels = image.read(tile)
        overview.add(tile, pixels)
        labels[tile.slices][find_missing(pixels, image.nodata).numpy()] = NO_DATA  # a tile begins where none is done
        return pixels

    for part, own in segment_tiles(segment, read, grid, show_tiles(grid, image.name)):
        known = labels[part.slices]
        known[known != NO_DATA] = own.numpy()[known != NO_DATA]
    shown = torch.from_numpy(labels[:: overview.step, :: overview.step].copy())
    return overview.pixels, shown


class LabelFiles:
    """The files of `itpn predict`: drawings, class maps, and which fraction of each image is of which class.

    Args:
        classes: their names.
        colours: of the classes.
    """

    def __init__(self, out: Path, classes: Sequence[str], colours: Sequence[tuple[int, int, int]]) -> None:
        self.out, self.classes, self.colours = out, classes, colours
        self._written = Predictions(("classes, the largest first",), ("image", "labels", *classes))

    def add(self, image: SourceImage, labels: np.ndarray, photo: Tensor, shown: Tensor) -> None:
        """Write an image's files.

        Args:
            labels: uint8 [H, W], with `NO_DATA` where there are none.
            photo, shown: uint8 [3, h, w] and [h, w], to be drawn.
        """
        number, names = len(self._written.images), self.classes
        endings = (".png", "-labels.png", "-labels.tif")
        drawn, mask, raster = (name_output(self.out, number, image.name, ending) for ending in endings)
        save_whole(draw_labels(photo, shown, names, self.colours), self.out / as_file_name(drawn))
        place = image.place()
        if place is not None:
            write_raster(self.out / as_file_name(raster), labels, place, self.colours)
        if place is None or labels.size <= MAX_PIXELS:
            colours = [*self.colours, *[(0, 0, 0)] * (NO_DATA + 1 - len(self.colours))]  # or 255 would not be kept
            save_labels(torch.from_numpy(labels), len(names), colours, self.out / as_file_name(mask))
        else:
            mask = raster
        counts = np.zeros(len(names), np.int64)
        for top in range(0, image.height, ROWS):
            counts += np.bincount(labels[top : top + ROWS].reshape(-1), minlength=NO_DATA + 1)[: len(names)]
        fractions = (counts / max(counts.sum(), 1)).tolist()
        order = sorted(range(len(names)), key=lambda row: -fractions[row])
        own = {names[row]: fractions[row] for row in order if fractions[row]}
        size = {"size": [image.height, image.width], "labels": mask}
        size |= {} if place is None else {"raster": raster}
        self._written.add(
            {"image": image.name, **size, "fractions": own},
            [(image.name, mask, *(own.get(name, 0.0) for name in names))],
            (", ".join(f"{one} {fraction:.0%}" for one, fraction in list(own.items())[:5]),),
        )

    def finish(self) -> None:
        """Write what is of all images, and print where everything is."""
        self._written.write(self.out, f"{self.out}/0000-*.png, 0000-*-labels.png ...")


# --- visualizations of a run


def build_visualization(
    module: SegmentationModule, config: SegmentationConfig, data: RunData
) -> Callable[[], Image.Image]:
    """Draws the same images at every call."""
    make_display(config)  # which finds wrong channels before the first step
    tiling = tiling_of_run(config.data, module.image_side or config.data.short)
    samples = functools.cache(lambda: read_samples(config, data, SAMPLES, tiling))
    return lambda: draw_scenes(module, config, samples())


def draw_scenes(module: SegmentationModule, config: SegmentationConfig, images: list[Tensor]) -> Image.Image:
    """Some images under the classes of their pixels."""
    segment, display = make_segmentation(config), make_display(config)
    with eval_mode(module):
        labels = [segment(module.model, module.normalize, image.to(module.device)) for image in images]
    return tile_images(
        [draw_labels(display(i), own, module.classes, module.colours) for i, own in zip(images, labels, strict=True)],
        per_row=3,
    )
