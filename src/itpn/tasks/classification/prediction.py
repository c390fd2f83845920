"""The likeliest classes of images."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from itpn.checkpoints.files import Checkpoint
from itpn.data.files import ImageSource
from itpn.data.normalize import Normalize
from itpn.models.backbone import Backbone
from itpn.system.text import one_line
from itpn.system.writing import open_whole_text, write_whole
from itpn.tasks.drawing import draw_titles
from itpn.tasks.prediction import ROWS, PredictionOptions, print_answers, read_batches, save_picture
from itpn.tasks.preprocessing import read_preprocessing

TOP = 5  # classes of an image in predictions.csv


def predict(model: Backbone, found: Checkpoint, source: ImageSource, options: PredictionOptions) -> None:
    """Write the likeliest classes of images, see :func:`predict_classes`."""
    crop, normalize = read_preprocessing(found, model)
    batches = read_batches(source, crop, options.max_pixels)
    predict_classes(model, normalize, batches, found.metadata.get("classes"), options.out)


@torch.no_grad()
def predict_classes(
    model: Backbone,
    normalize: Normalize,
    batches: Iterator[tuple[list[str], Tensor]],
    classes: list[str] | None,
    out: Path,
) -> None:
    """A table, ``predictions.csv``, ``predictions.json`` and pictures with the likeliest classes.

    Classes are numbers where the file has no names.
    """
    table = Table("image", "class", "probability", "then", box=None, pad_edge=False, header_style="bold")
    path = out / "predictions.csv"
    answers: list[dict[str, Any]] = []
    with open_whole_text(path) as file:
        writer = csv.writer(file)
        writer.writerow(["image", "rank", "class", "probability"])
        for number, (names, images) in enumerate(batches):
            top = model(normalize(images)).softmax(dim=-1).topk(min(TOP, model.num_classes))
            titles = []
            for name, values, indices in zip(names, top.values.tolist(), top.indices.tolist(), strict=True):
                labels = [classes[i] if classes else str(i) for i in indices]
                writer.writerows([name, rank, *pair] for rank, pair in enumerate(zip(labels, values, strict=True), 1))
                likeliest = [
                    {"class": label, "probability": value} for label, value in zip(labels, values, strict=True)
                ]
                answers.append({"image": name, "classes": likeliest})
                others = ", ".join(
                    f"{label} {value:.0%}" for label, value in zip(labels[1:3], values[1:3], strict=True)
                )
                if table.row_count < ROWS:
                    table.add_row(*map(Text, (one_line(Path(name).name), labels[0], f"{values[0]:.1%}", others)))
                titles.append(f"{values[0]:.0%} {labels[0]}")  # a long name is cut at its end
            save_picture(draw_titles(images, titles), out, number)
    write_whole(path.with_suffix(".json"), (json.dumps(answers, indent=1) + "\n").encode())
    print_answers(table, len(answers), f"{path}\n{path.with_suffix('.json')}")
