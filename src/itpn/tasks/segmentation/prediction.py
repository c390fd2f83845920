"""The classes of the pixels of images: files of `itpn predict`, and visualizations of a run."""

import functools
from collections.abc import Callable

from PIL import Image
from torch import Tensor

from itpn.checkpoints.files import Checkpoint
from itpn.data.evaluation import read_some
from itpn.data.files import ImageSource
from itpn.models.modes import eval_mode
from itpn.models.segmenter import Segmenter
from itpn.system.text import as_file_name
from itpn.system.writing import name_output
from itpn.tasks.data import RunData
from itpn.tasks.drawing import draw_labels, make_display, save_labels, save_whole, stored_display, tile_images
from itpn.tasks.evaluation import EvaluationRequest
from itpn.tasks.finetuning.module import make_normalize
from itpn.tasks.finetuning.network import name_classes
from itpn.tasks.pixels import make_reading, stored_reading
from itpn.tasks.prediction import PredictionOptions, Predictions, read_images
from itpn.tasks.segmentation.config import SegmentationConfig
from itpn.tasks.segmentation.evaluation import resolve_evaluation
from itpn.tasks.segmentation.inference import make_segmentation
from itpn.tasks.segmentation.module import SegmentationModule
from itpn.training.config import freeze

SAMPLES = 6


def predict(model: Segmenter, checkpoint: Checkpoint, source: ImageSource, options: PredictionOptions) -> None:
    """Each image under the classes of its pixels, and these as a PNG of class indices with a palette.

    The files say which fraction of each image is of which class.
    """
    config = freeze(resolve_evaluation(SegmentationConfig(), EvaluationRequest(checkpoint))[0])
    segment, normalize, out = make_segmentation(config), make_normalize(config), options.out
    names, display = name_classes(checkpoint, model.num_classes), stored_display(checkpoint)
    colours = [tuple(colour) for colour in checkpoint.metadata.get("colours") or ()] or None
    written = Predictions(("classes, the largest first",), ("image", "labels", *names))
    for number, (name, image) in enumerate(read_images(source, stored_reading(checkpoint, options.max_pixels))):
        labels = segment(model, normalize, image)
        drawn, mask = (name_output(out, number, name, ending) for ending in (".png", "-labels.png"))
        save_whole(draw_labels(display(image), labels, names, colours), out / as_file_name(drawn))
        save_labels(labels, len(names), colours, out / as_file_name(mask))
        fractions = (labels.flatten().bincount(minlength=len(names)) / labels.numel()).tolist()
        order = sorted(range(len(names)), key=lambda row: -fractions[row])
        own = {names[row]: fractions[row] for row in order if fractions[row]}
        written.add(
            {"image": name, "size": list(image.shape[-2:]), "labels": mask, "fractions": own},
            [(name, mask, *(own.get(name, 0.0) for name in names))],
            (", ".join(f"{one} {fraction:.0%}" for one, fraction in list(own.items())[:5]),),
        )
    written.write(out, f"{out}/0000-*.png, 0000-*-labels.png ...")


# --- visualizations of a run


def build_visualization(
    module: SegmentationModule, config: SegmentationConfig, data: RunData
) -> Callable[[], Image.Image]:
    """Draws the same images at every call."""
    make_display(config)  # which finds wrong channels before the first step
    samples = functools.cache(lambda: [image for _, image in read_some(data.samples, SAMPLES, make_reading(config))])
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
