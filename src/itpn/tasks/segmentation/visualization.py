"""The classes of pixels of sample images, as an image."""

import functools
from collections.abc import Callable

from PIL import Image
from torch import Tensor

from itpn.data.evaluation import read_some
from itpn.models.modes import eval_mode
from itpn.tasks.data import RunData
from itpn.tasks.drawing import draw_labels, join_pictures
from itpn.tasks.segmentation.config import SegmentationConfig
from itpn.tasks.segmentation.inference import make_segmentation
from itpn.tasks.segmentation.module import SegmentationTask

SAMPLES = 6


def build_visualization(
    module: SegmentationTask, config: SegmentationConfig, data: RunData
) -> Callable[[], Image.Image]:
    """Draws the same images at every call."""
    samples = functools.cache(lambda: [image for _, image in read_some(data.samples, SAMPLES, config.data.max_pixels)])
    return lambda: draw_scenes(module, config, samples())


def draw_scenes(task: SegmentationTask, config: SegmentationConfig, images: list[Tensor]) -> Image.Image:
    """What the network sees in some images."""
    segment = make_segmentation(config)
    with eval_mode(task):
        labels = [segment(task.model, task.normalize, image.to(task.device)) for image in images]
    return join_pictures(
        [draw_labels(i, own, task.classes, task.colours) for i, own in zip(images, labels, strict=True)], per_row=3
    )
