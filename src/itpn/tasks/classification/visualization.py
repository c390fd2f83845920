"""What a classifier says of sample images, as an image."""

import functools
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from itpn.data.evaluation import read_some
from itpn.data.labelled import LabelledImages
from itpn.models.modes import eval_mode
from itpn.tasks.classification.config import ClassificationConfig
from itpn.tasks.classification.evaluation import make_evaluation_transform
from itpn.tasks.classification.module import ClassificationTask
from itpn.tasks.data import RunData
from itpn.tasks.drawing import draw_titles

SAMPLES = 16


def build_visualization(
    module: ClassificationTask, config: ClassificationConfig, data: RunData
) -> Callable[[], Image.Image]:
    """Draws the same images at every call."""
    samples = functools.cache(lambda: read_samples(data.samples, config))
    return lambda: draw_answers(module, *samples())


def read_samples(images: LabelledImages, config: ClassificationConfig) -> tuple[Tensor, list[str]]:
    """Readable images from all over a set, uint8 [n, 3, H, W], and the names of their classes."""
    transform = make_evaluation_transform(config)
    chosen = read_some(images, SAMPLES, config.data.max_pixels)
    pixels = torch.stack([transform(image) for _, image in chosen])
    return pixels, [images.classes[images.labels[index]] for index, _ in chosen]


def draw_answers(task: ClassificationTask, images: Tensor, names: list[str]) -> Image.Image:
    """What the network says of some images, and what they are where that is something else."""
    with eval_mode(task), torch.no_grad():
        probabilities = task.model(task.normalize(images.to(task.device))).float().softmax(dim=-1).cpu()
    titles = []
    for row, name in zip(probabilities, names, strict=True):
        answer = task.classes[int(row.argmax())]
        titles.append(f"{row.max():.0%} {answer}" + ("" if answer == name else f", is {name}"))
    return draw_titles(images, titles)
