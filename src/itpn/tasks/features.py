"""Features of frozen backbones: for k-NN and linear probes, and for files."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from itpn.data.labelled import LabelledImages
from itpn.data.normalize import Normalize
from itpn.errors import refusal
from itpn.models.backbone import find_backbone
from itpn.models.pyramid import find_pyramid
from itpn.system.console import Output
from itpn.system.text import one_line
from itpn.system.writing import open_whole, open_whole_text, write_whole
from itpn.tasks.evaluation import Evaluator, Scores, none_evaluated

Features = tuple[Tensor, Tensor, Tensor]  # image index int64 [n], label int64 [n], features float32 [n, C]


class FeatureEvaluator(Evaluator[Scores]):
    """Evaluates the features of a frozen backbone: from those of some images, the classes of others are predicted.

    Attributes:
        known: the images to learn from.
    """

    known: LabelledImages

    def batches(self, rank: int, world_size: int) -> Iterable[dict[str, Any]]:
        for number, images in enumerate((self.known, self.images)):
            for batch in self.load(images, rank, world_size):
                yield {**batch, "set": number}

    def compare(self, network: nn.Module, batch: dict[str, Any]) -> Any:
        return batch["set"], compute_features(network, self.normalize, batch)


def compute_features(network: nn.Module, normalize: Normalize, batch: dict[str, Any]) -> Features:
    """Means of the last stage over each image of a batch, on the CPU: int64 [n], int64 [n], float32 [n, C]."""
    images = normalize(batch["image"].to(normalize.mean.device, non_blocking=True))
    features = find_backbone(network).forward_stages(images)[-1].mean(dim=(1, 2, 3)).float().cpu()
    return batch["index"], batch["label"], features


def join_features(parts: Sequence[Features]) -> Features:
    """Together, in the order of the set."""
    if not parts:
        raise none_evaluated([])
    index, label, features = (torch.cat(column) for column in zip(*parts, strict=True))
    order = index.argsort()
    return index[order], label[order], features[order]


def join_sets(parts: Sequence[tuple[int, Features]]) -> tuple[Features, Features]:
    """The features of two sets, those of the first to learn from."""
    first, second = (join_features([own for number, own in parts if number == which]) for which in (0, 1))
    return first, second


def write_features(
    model: nn.Module, normalize: Normalize, batches: Iterator[tuple[list[str], Tensor]], path: Path
) -> None:
    """Write :func:`mean_features` of all images, a row each, and the images' names; an .npy file takes those of the
    last stage alone, and the names lie beside it.

    Raises:
        UserError: the file cannot be written.
    """
    names: list[str] = []
    rows: list[dict[str, Tensor]] = []
    for batch, images in batches:
        names += batch
        rows.append(mean_features(model, normalize(images)))
    columns = {name: torch.cat([row[name] for row in rows]).contiguous() for name in rows[0]}
    levels, lines = [name for name in columns if name != "features"], []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npy":
            with open_whole(path) as file:
                np.save(file, columns["features"].numpy())
            beside = path.with_name(f"{path.name}.txt")
            with open_whole_text(beside) as text:
                text.writelines(f"{one_line(name)}\n" for name in names)
            columns = {"features": columns["features"]}
            lines = [f"{beside}: the images' names, a line each"]
            if levels:
                lines.append(f"a .safetensors file would also hold {', '.join(levels)}")
        else:
            write_whole(path, save(columns, {"images": json.dumps(names)}))
    except OSError as error:
        raise refusal(f"--features {path} cannot be written", error) from error
    shapes = ", ".join(f"{name} {list(column.shape)}" for name, column in columns.items())
    for line in (f"{path}: {shapes}", *lines):
        Output().print(line, markup=False, highlight=False, soft_wrap=True)


@torch.no_grad()
def mean_features(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Means over an image: ``features`` of the last stage [n, C], ``pyramid_1`` (finest) to 3 [n, width]."""
    backbone = find_backbone(model)
    stages = backbone.forward_stages(x)
    means = {"features": stages[-1].mean(dim=(1, 2, 3))}
    pyramid = find_pyramid(model)
    if pyramid is not None:
        levels = pyramid(stages)
        means |= {f"pyramid_{i}": level.mean(dim=(1, 2, 3)) for i, level in enumerate(levels, start=1)}
    return means
