"""The objects in images: files of `itpn predict`, and visualizations of a run."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image
from torch import Tensor

from itpn.checkpoints.files import Checkpoint
from itpn.data.evaluation import read_some
from itpn.data.files import ImageSource
from itpn.data.normalize import Normalize
from itpn.metrics.detection import to_results
from itpn.models.backbone import find_backbone
from itpn.models.detector import Detector
from itpn.models.modes import eval_mode
from itpn.system.console import print_note
from itpn.system.text import as_file_name
from itpn.system.writing import name_output
from itpn.tasks.detection.config import DetectionConfig
from itpn.tasks.detection.data import DetectionData
from itpn.tasks.detection.evaluation import detect
from itpn.tasks.detection.module import DetectionModule
from itpn.tasks.drawing import draw_objects, make_display, save_whole, stored_display, tile_images, to_display
from itpn.tasks.pixels import make_reading, stored_normalize, stored_reading
from itpn.tasks.prediction import PredictionOptions, Predictions, read_images

SAMPLES, MIN_SCORE = 8, 0.3  # images of a visualization, score of the boxes in them


def predict(model: Detector, checkpoint: Checkpoint, source: ImageSource, options: PredictionOptions) -> None:
    """Write the objects in images, see :func:`predict_objects`."""
    names = checkpoint.metadata.get("classes") or [str(number) for number in range(1, model.num_classes)]
    images = read_images(source, stored_reading(checkpoint, options.max_pixels))
    normalize = stored_normalize(checkpoint, find_backbone(model).in_chans)
    if options.max_detections is not None:
        model.limit_detections(options.max_detections)
    predict_objects(model, normalize, images, names, options.out, options.min_score, stored_display(checkpoint))


def predict_objects(
    model: Detector,
    normalize: Normalize,
    images: Iterator[tuple[str, Tensor]],
    classes: list[str],
    out: Path,
    min_score: float,
    display: Callable[[Tensor], Tensor] = to_display,
) -> None:
    """Each image with the objects that are found in it, and all of them in the files.

    Boxes are x0, y0, x1, y1 in pixels of the image; masks are COCO's compressed run lengths.
    """
    count = 0
    written = Predictions(("objects", "likeliest"), ("image", "class", "score", "x0", "y0", "x1", "y1"))
    for number, (name, image) in enumerate(images):
        (found,) = detect(model, normalize, [image])
        keep = found["scores"] >= min_score
        found = {key: value[keep] for key, value in found.items()}
        results = to_results(found, number, tuple(range(len(classes))))
        objects = []
        for result, box in zip(results, found["boxes"].tolist(), strict=True):
            one = {"class": classes[result["category_id"]], "score": result["score"], "box": box}
            objects.append(one | ({"mask": result["segmentation"]} if "segmentation" in result else {}))
        count += len(objects)
        written.add(
            {"image": name, "size": list(image.shape[-2:]), "objects": objects},
            [(name, one["class"], one["score"], *one["box"]) for one in objects],
            (str(len(objects)), ", ".join(f"{one['class']} {one['score']:.0%}" for one in objects[:4])),
        )
        drawn = draw_objects(display(image), found, classes, min_score)
        save_whole(drawn, out / as_file_name(name_output(out, number, name, ".png")))
    written.write(out, f"{out}/0000-*.png ...")
    if not count:
        print_note(f"no object has a score of at least {min_score:g}: a lower --min-score shows more")


# --- visualizations of a run


def build_visualization(
    module: DetectionModule, config: DetectionConfig, data: DetectionData
) -> Callable[[], Image.Image]:
    """Draws the same images at every call."""
    make_display(config)  # which finds wrong channels before the first step
    samples = functools.cache(lambda: [image for _, image in read_some(data.samples, SAMPLES, make_reading(config))])
    return lambda: draw_found(module, samples())


def draw_found(module: DetectionModule, images: list[Tensor]) -> Image.Image:
    """What the network finds in some images."""
    with eval_mode(module):  # one at a time: wide and high images together would be padded to squares
        found = [detect(module.model, module.normalize, [image.to(module.device)])[0] for image in images]
    shown = map(make_display(module.config), images)
    return tile_images(
        [draw_objects(image, one, module.classes, MIN_SCORE) for image, one in zip(shown, found, strict=True)]
    )
