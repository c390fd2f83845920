"""`itpn predict` for a pre-training checkpoint: pictures of its predictions."""

import itertools
from pathlib import Path

import torch
from rich.console import Console

from itpn.checkpoints.weights import load_weights, read_weights
from itpn.config import image_size
from itpn.data.files import ImageSource
from itpn.engine.pictures import draw_predictions, read_whole_images
from itpn.errors import UserError
from itpn.pretraining.build import build_masked_model
from itpn.tasks.pretrain import PretrainingTask

PER_PICTURE = 16


def predict_hidden(checkpoint: str, source: ImageSource, out: Path, seed: int) -> None:
    """Write a picture for every 16 images: original, masked, predicted. Unreadable ones are named and skipped.

    Raises:
        UserError: the checkpoint is not ours, or no image can be read.
    """
    console = Console()
    weights = read_weights(checkpoint)
    config = weights.config
    config.seed = seed  # draws the mask
    model = build_masked_model(config.model, image_size(config.data), config.teacher)
    load_weights(model, weights, checkpoint)
    task = PretrainingTask(model, config, weights.recipe)

    def skipped(message: str) -> None:
        Console(stderr=True).print(f"skipped {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
    images = read_whole_images(source, image_size(config.data), config.data.max_pixels, skipped)
    for number in itertools.count():
        batch = list(itertools.islice(images, PER_PICTURE))
        if not batch:
            break
        path = out / f"prediction-{number:04d}.png"
        draw_predictions(task, torch.stack(batch)).save(path)
        console.print(str(path), highlight=False, soft_wrap=True)
    if number == 0:
        raise UserError("none of the images can be read")
