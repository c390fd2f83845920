"""The likeliest classes of images: files of `itpn predict`, and visualizations of a run."""

import functools
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from itpn.checkpoints.files import Checkpoint
from itpn.data.evaluation import read_some
from itpn.data.files import ImageSource
from itpn.models.backbone import Backbone
from itpn.models.modes import eval_mode
from itpn.tasks.classification.config import ClassificationConfig
from itpn.tasks.classification.evaluation import make_evaluation_transform
from itpn.tasks.classification.module import ClassificationModule
from itpn.tasks.data import RunData
from itpn.tasks.display import make_display, stored_display
from itpn.tasks.drawing import caption_files, show, tile_images
from itpn.tasks.finetuning.network import name_classes
from itpn.tasks.pixels import make_read_settings, stored_read_settings
from itpn.tasks.prediction import PredictionOptions, Predictions, read_batches, read_preprocessing, save_image

TOP = 5  # classes of an image in predictions.csv
SAMPLES = 16


@torch.no_grad()
def predict(model: Backbone, checkpoint: Checkpoint, source: ImageSource, options: PredictionOptions) -> None:
    """Write the likeliest classes of images, and the images between their likeliest class and the name of their file.

    Classes are numbers where the file has no names.
    """
    crop, normalize = read_preprocessing(checkpoint, model)
    classes, display = name_classes(checkpoint, model.num_classes), stored_display(checkpoint)
    written = Predictions(("class", "probability", "then"), ("image", "rank", "class", "probability"))
    reading = stored_read_settings(checkpoint, options.max_pixels)
    for number, (names, images) in enumerate(read_batches(source, crop, reading)):
        top = model(normalize(images)).softmax(dim=-1).topk(min(TOP, model.num_classes))
        titles = []
        for name, values, indices in zip(names, top.values.tolist(), top.indices.tolist(), strict=True):
            likeliest = [(classes[i], value) for i, value in zip(indices, values, strict=True)]
            label, value = likeliest[0]
            titles.append(f"{value:.0%} {label}")  # a long name is cut at its end
            written.add(
                {"image": name, "classes": [{"class": label, "probability": value} for label, value in likeliest]},
                [(name, rank, *pair) for rank, pair in enumerate(likeliest, 1)],
                (label, f"{value:.1%}", ", ".join(f"{label} {value:.0%}" for label, value in likeliest[1:3])),
            )
        sheet = tile_images([*map(show, display(images))], titles, side=None, captions=caption_files(names))
        save_image(sheet, options.out, number)
    written.write(options.out)


# --- visualizations of a run


def build_visualization(
    module: ClassificationModule, config: ClassificationConfig, data: RunData
) -> Callable[[], Image.Image]:
    """Draws the same images at every call."""
    make_display(config)  # which finds wrong channels before the first step
    samples = functools.cache(lambda: read_samples(data, config))
    return lambda: draw_classes(module, *samples())


def read_samples(data: RunData, config: ClassificationConfig) -> tuple[Tensor, list[str]]:
    """Readable images from all over a set, [n, C, H, W] as they are stored, and the names of their classes."""
    transform, images = make_evaluation_transform(config), data.samples
    chosen = read_some(images, SAMPLES, make_read_settings(config, data.train))
    pixels = torch.stack([transform(image) for _, image in chosen])
    return pixels, [images.classes[images.labels[index]] for index, _ in chosen]


def draw_classes(module: ClassificationModule, images: Tensor, names: list[str]) -> Image.Image:
    """The likeliest class of each image, and the true one where that is another."""
    with eval_mode(module), torch.no_grad():
        probabilities = module.model(module.normalize(images.to(module.device))).float().softmax(dim=-1).cpu()
    titles = []
    for row, name in zip(probabilities, names, strict=True):
        predicted = module.classes[int(row.argmax())]
        titles.append(f"{row.max():.0%} {predicted}" + ("" if predicted == name else f", is {name}"))
    return tile_images([*map(show, make_display(module.config)(images))], titles, side=None)
