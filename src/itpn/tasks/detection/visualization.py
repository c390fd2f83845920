"""What a detector finds in sample images, as an image."""

import functools
from collections.abc import Callable

from PIL import Image
from torch import Tensor

from itpn.data.evaluation import read_some
from itpn.models.modes import eval_mode
from itpn.tasks.detection.config import DetectionConfig
from itpn.tasks.detection.data import DetectionData
from itpn.tasks.detection.evaluation import detect
from itpn.tasks.detection.module import DetectionTask
from itpn.tasks.drawing import draw_objects, join_pictures

SAMPLES, MIN_SCORE = 8, 0.3  # images, score of the boxes in them


def build_visualization(
    module: DetectionTask, config: DetectionConfig, data: DetectionData
) -> Callable[[], Image.Image]:
    """Draws the same images at every call."""
    samples = functools.cache(lambda: [image for _, image in read_some(data.samples, SAMPLES, config.data.max_pixels)])
    return lambda: draw_found(module, samples())


def draw_found(task: DetectionTask, images: list[Tensor]) -> Image.Image:
    """What the network finds in some images."""
    with eval_mode(task):  # one at a time: wide and high images together would be padded to squares
        found = [detect(task.model, task.normalize, [image.to(task.device)])[0] for image in images]
    return join_pictures(
        [draw_objects(image, one, task.classes, MIN_SCORE) for image, one in zip(images, found, strict=True)]
    )
