"""The objects in images: files of `itpn predict`, and visualizations of a run."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from itpn.checkpoints.files import Checkpoint
from itpn.data.files import ImageSource
from itpn.data.formats.georeference import Georeference
from itpn.data.mask_pieces import Piece
from itpn.models.backbone import find_backbone
from itpn.models.detector import Detector
from itpn.models.modes import eval_mode
from itpn.system.console import print_note
from itpn.system.text import as_file_name
from itpn.system.writing import name_output
from itpn.tasks.data import read_samples
from itpn.tasks.detection.config import DetectionConfig
from itpn.tasks.detection.data import DetectionData
from itpn.tasks.detection.evaluation import detect, detect_tiles
from itpn.tasks.detection.merging import Objects, describe_objects, to_objects
from itpn.tasks.detection.module import DetectionModule
from itpn.tasks.display import make_display, stored_display
from itpn.tasks.drawing import draw_objects, name_colour, save_whole, tile_images
from itpn.tasks.georeference import make_feature, write_geojson, write_geopackage
from itpn.tasks.large import find_tiling, show_tiles, tiling_of_run
from itpn.tasks.overview import Overview
from itpn.tasks.pixels import stored_normalize, stored_read_settings
from itpn.tasks.prediction import PredictionOptions, Predictions
from itpn.tasks.source_images import SourceImages

SAMPLES, MIN_SCORE = 8, 0.3  # images of a visualization, score of the boxes in them
NAMED = 100  # objects of an image whose names are written


def predict(model: Detector, checkpoint: Checkpoint, source: ImageSource, options: PredictionOptions) -> None:
    """Each image with the objects that are found in it, and all of them in the files, see :class:`ObjectFiles`."""
    names = checkpoint.metadata.get("classes") or [str(number) for number in range(1, model.num_classes)]
    normalize = stored_normalize(checkpoint, find_backbone(model).in_chans)
    display = stored_display(checkpoint)
    if options.max_objects is not None:
        model.limit_detections(options.max_objects)
    trained, usual = checkpoint.settings.get("data", {}), checkpoint.preprocessing.get("image_side")
    side = usual or model.transform.min_size[-1]
    tiling = find_tiling(options.window_size, options.window_overlap, trained, side)
    files = ObjectFiles(options.out, names, options.min_score)
    images = SourceImages(source, stored_read_settings(checkpoint, options.max_pixels))
    for image in images:
        with images.skipping(image.name, image):
            grid = tiling.cut(image)
            if grid is None:
                pixels = image.whole()
                (found,) = detect(model, normalize, [pixels])
                objects, photo, step = to_objects(found), display(pixels), 1
            else:
                overview = Overview(image.height, image.width)
                tiles = show_tiles(grid, image.name)
                objects = detect_tiles(model, normalize, overview.watch(image.read), grid, tiles)
                photo, step = display(overview.pixels), overview.step
            files.add(image.name, (image.height, image.width), objects, photo, step, image.place())
    files.finish()


class ObjectFiles:
    """The files of `itpn predict`: drawings, and all objects as JSON and CSV; at their places on the ground as GeoJSON
    and GeoPackage.

    Boxes are x0, y0, x1, y1 in pixels of the image; masks are COCO's compressed run lengths.

    Args:
        classes: their names.
        min_score: of the objects.
    """

    def __init__(self, out: Path, classes: Sequence[str], min_score: float) -> None:
        self.out, self.classes, self.min_score = out, classes, min_score
        self._written = Predictions(("objects", "likeliest"), ("image", "class", "score", "x0", "y0", "x1", "y1"))
        self._count = 0

    def add(
        self,
        name: str,
        size: tuple[int, int],
        objects: Objects,
        photo: Tensor,
        step: int = 1,
        place: Georeference | None = None,
    ) -> None:
        """Write an image's files.

        Args:
            size: height and width of the image.
            photo: uint8 [3, h, w], to be drawn on.
            step: pixels of the image between those of ``photo``.
        """
        number, out = len(self._written.images), self.out
        objects = objects.take(objects.scores >= self.min_score)
        described = []
        for result, box in zip(
            describe_objects(objects, *size, number, range(len(self.classes))), objects.boxes.tolist(), strict=True
        ):
            one = {"class": self.classes[result["category_id"]], "score": result["score"], "box": box}
            described.append(one | ({"mask": result["segmentation"]} if "segmentation" in result else {}))
        self._count += len(objects)
        record: dict[str, Any] = {"image": name, "size": list(size)}
        if place is not None:
            record |= self._write_places(number, name, objects, place)
        self._written.add(
            {**record, "objects": described},
            [(name, one["class"], one["score"], *one["box"]) for one in described],
            (str(len(objects)), ", ".join(f"{one['class']} {one['score']:.0%}" for one in described[:4])),
        )
        drawn = draw_large(photo, objects, self.classes, step)
        save_whole(drawn, out / as_file_name(name_output(out, number, name, ".png")))

    def _write_places(self, number: int, name: str, objects: Objects, place: Georeference) -> dict[str, str]:
        geojson, package = (name_output(self.out, number, name, ending) for ending in (".geojson", ".gpkg"))
        columns = objects.labels.tolist(), objects.scores.tolist(), objects.boxes.tolist(), objects.masks
        masks = [None] * len(objects) if objects.masks is None else objects.masks
        features = [
            make_feature(self.classes[label - 1], score, box, mask)
            for label, score, box, mask in zip(*columns[:3], masks, strict=True)
        ]
        write_geojson(self.out / as_file_name(geojson), features, name, place)
        write_geopackage(self.out / as_file_name(package), features, name, place)
        return {"geojson": geojson, "geopackage": package}

    def finish(self) -> None:
        """Write what is of all images, and print where everything is."""
        self._written.write(self.out, f"{self.out}/0000-*.png ...")
        if not self._count:
            print_note(f"no object has a score of at least {self.min_score:g}: a lower --min-score shows more")


def draw_large(photo: Tensor, objects: Objects, classes: Sequence[str], step: int) -> Image.Image:
    """An image, perhaps every n-th pixel of a larger one, with its objects; names are written of a few alone."""
    found = {"boxes": objects.boxes / step, "labels": objects.labels, "scores": objects.scores}
    if step == 1 and len(objects) <= NAMED:
        if objects.masks is not None:
            found["masks"] = torch.zeros(len(objects), 1, *photo.shape[-2:])
            for mask, (top, left, pixels) in zip(found["masks"], objects.masks, strict=True):
                mask[0, top : top + pixels.shape[0], left : left + pixels.shape[1]] = torch.from_numpy(pixels)
        return draw_objects(photo, found, classes, 0.0)
    colours = [name_colour(label) for label in objects.labels.tolist()]
    photo = paint_masks(photo, objects.masks or [], colours, step)
    if len(objects) <= NAMED:
        return draw_objects(photo, found, classes, 0.0)
    drawn = Image.fromarray(photo.permute(1, 2, 0).numpy())
    for (x0, y0, x1, y1), colour in zip(found["boxes"].tolist(), colours, strict=True):
        ImageDraw.Draw(drawn).rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=colour)
    return drawn


def paint_masks(photo: Tensor, masks: Sequence[Piece], colours: Sequence[tuple[int, int, int]], step: int) -> Tensor:
    """An image of every n-th pixel with its masks in colour, one after the other: they are never held together."""
    painted = photo.clone()
    for (top, left, pixels), colour in zip(masks, colours, strict=False):
        seen = torch.from_numpy(pixels[-top % step :: step, -left % step :: step])
        part = painted[:, -(-top // step) :, -(-left // step) :][:, : seen.shape[0], : seen.shape[1]]
        mixed = 0.55 * part.float() + 0.45 * torch.tensor(colour).reshape(3, 1, 1)
        part[:, seen] = mixed.round().to(torch.uint8)[:, seen]
    return painted


# --- visualizations of a run


def build_visualization(
    module: DetectionModule, config: DetectionConfig, data: DetectionData
) -> Callable[[], Image.Image]:
    """Draws the same images at every call."""
    make_display(config)  # which finds wrong channels before the first step
    tiling = tiling_of_run(config.data, module.image_side or config.data.img_size)
    samples = functools.cache(lambda: read_samples(config, data, SAMPLES, tiling))
    return lambda: draw_found(module, samples())


def draw_found(module: DetectionModule, images: list[Tensor]) -> Image.Image:
    """What the network finds in some images."""
    with eval_mode(module):  # one at a time: wide and high images together would be padded to squares
        found = [detect(module.model, module.normalize, [image.to(module.device)])[0] for image in images]
    shown = map(make_display(module.config), images)
    return tile_images(
        [draw_objects(image, one, module.classes, MIN_SCORE) for image, one in zip(shown, found, strict=True)]
    )
