"""`itpn predict`: what a checkpoint predicts for images, by its task, or features of any checkpoint."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from itpn.checkpoints.files import read_checkpoint
from itpn.checkpoints.load import check_finite, load_found
from itpn.data.decode import MAX_PIXELS
from itpn.data.files import ImageSource
from itpn.data.normalize import Normalize
from itpn.data.shards import check_shards
from itpn.errors import UserError, refusal
from itpn.models.backbone import find_backbone
from itpn.models.pyramid import find_pyramid
from itpn.models.spec import spec_of
from itpn.system.console import Output, print_aside
from itpn.system.text import one_line
from itpn.system.writing import make_folder, open_whole, open_whole_text, write_whole, writing_to
from itpn.tasks.prediction import PredictionOptions, read_batches
from itpn.tasks.preprocessing import read_preprocessing
from itpn.tasks.spec import find_task


def predict(
    checkpoint: str,
    source: ImageSource,
    out: Path,
    seed: int = 0,
    features: Path | None = None,
    min_score: float = 0.5,
    max_pixels: int | None = None,
) -> None:
    """Write what a checkpoint predicts for images; unreadable ones are named and skipped.

    Args:
        out, seed, min_score: as of :class:`itpn.tasks.prediction.PredictionOptions`.
        features: a ``.safetensors`` or ``.npy`` file to be written instead: see :func:`compute_features`.
        max_pixels: larger images are skipped; None for the checkpoint's own limit.

    Raises:
        UserError: no checkpoint that is known, one that only gives features, or no image can be read.
    """
    found = read_checkpoint(checkpoint)
    check_finite(found)
    for note in [*source.notes, *(check_shards(source.shards, source.members) if source.shards else ())]:
        print_aside(note)
    model, notes = load_found(found)
    for note in notes:
        print_aside(note)
    max_pixels = max_pixels or found.settings.get("data", {}).get("max_pixels") or MAX_PIXELS
    if features is not None:
        crop, normalize = read_preprocessing(found, model)
        write_features(model, normalize, read_batches(source, crop, max_pixels), features)
        return
    head = spec_of(model).head
    if head is None:
        raise UserError(
            f"checkpoint {checkpoint} has neither decoder, classifier, detector nor segmenter: it gives --features "
            "FILE only"
        )
    task = find_task(head)
    make_folder(out)
    with writing_to(out):
        task.predict(model, found, source, PredictionOptions(out, seed, min_score, max_pixels))


def write_features(
    model: nn.Module, normalize: Normalize, batches: Iterator[tuple[list[str], Tensor]], path: Path
) -> None:
    """Write :func:`compute_features` of all images, a row each, and the images' names.

    Raises:
        UserError: the file cannot be written.
    """
    names: list[str] = []
    rows: list[dict[str, Tensor]] = []
    for batch, images in batches:
        names += batch
        rows.append(compute_features(model, normalize(images)))
    columns = {name: torch.cat([row[name] for row in rows]).contiguous() for name in rows[0]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npy":
            with open_whole(path) as file:
                np.save(file, columns["features"].numpy())
            with open_whole_text(path.with_name(f"{path.name}.txt")) as text:
                text.writelines(f"{one_line(name)}\n" for name in names)
        else:
            write_whole(path, save(columns, {"images": json.dumps(names)}))
    except OSError as error:
        raise refusal(f"--features {path} cannot be written", error) from error
    shapes = ", ".join(f"{name} {list(column.shape)}" for name, column in columns.items())
    Output().print(f"{path}: {shapes}", markup=False, highlight=False, soft_wrap=True)


@torch.no_grad()
def compute_features(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Means over an image: ``features`` of the last stage [n, C], ``pyramid_1`` (finest) to 3 [n, width]."""
    backbone = find_backbone(model)
    stages = backbone.forward_stages(x)
    means = {"features": stages[-1].mean(dim=(1, 2, 3))}
    pyramid = find_pyramid(model)
    if pyramid is not None:
        levels = pyramid(stages)
        means |= {f"pyramid_{i}": level.mean(dim=(1, 2, 3)) for i, level in enumerate(levels, start=1)}
    return means
