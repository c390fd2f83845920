"""The classes of the pixels of images."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import Tensor

from itpn.checkpoints.files import Checkpoint
from itpn.data.files import ImageSource
from itpn.models.segmenter import Segmenter
from itpn.system.text import as_file_name, one_line
from itpn.system.writing import name_output, open_whole_text, write_whole
from itpn.tasks.drawing import draw_labels, save_labels, save_whole
from itpn.tasks.prediction import ROWS, PredictionOptions, print_answers, read_as_they_are
from itpn.tasks.segmentation.config import SegmentationConfig
from itpn.tasks.segmentation.evaluation import make_normalize, resolve_evaluation
from itpn.tasks.segmentation.inference import make_segmentation


def predict(model: Segmenter, found: Checkpoint, source: ImageSource, options: PredictionOptions) -> None:
    """Write the classes of the pixels of images, see :func:`predict_scenes`."""
    predict_scenes(model, found, read_as_they_are(source, options.max_pixels), options.out)


def predict_scenes(model: Segmenter, found: Checkpoint, images: Iterator[tuple[str, Tensor]], out: Path) -> None:
    """A picture of each image under its classes, and the classes as a PNG of numbers with a palette.

    ``predictions.csv`` and ``.json`` say how much of each image is of which class.
    """
    config, _ = resolve_evaluation(SegmentationConfig(), found, ())
    segment, normalize = make_segmentation(config), make_normalize(config)
    names = found.metadata.get("classes") or [str(number) for number in range(model.num_classes)]
    colours = [tuple(colour) for colour in found.metadata.get("colours") or ()] or None
    answers: list[dict[str, Any]] = []
    table = Table("image", "classes, the largest first", box=None, pad_edge=False, header_style="bold")
    for number, (name, image) in enumerate(images):
        labels = segment(model, normalize, image)
        drawn, mask = (name_output(out, number, name, ending) for ending in (".png", "-labels.png"))
        save_whole(draw_labels(image, labels, names, colours), out / as_file_name(drawn))
        save_labels(labels, len(names), colours, out / as_file_name(mask))
        shares = (labels.flatten().bincount(minlength=len(names)) / labels.numel()).tolist()
        order = sorted(range(len(names)), key=lambda row: -shares[row])
        own = {names[row]: shares[row] for row in order if shares[row]}
        answers.append({"image": name, "size": list(image.shape[-2:]), "labels": mask, "shares": own})
        if table.row_count < ROWS:
            some = ", ".join(f"{one} {share:.0%}" for one, share in list(own.items())[:5])
            table.add_row(*map(Text, (one_line(Path(name).name), some)))
    write_whole(out / "predictions.json", (json.dumps(answers, indent=1) + "\n").encode())
    with open_whole_text(out / "predictions.csv") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "labels", *names])
        for answer in answers:
            writer.writerow([answer["image"], answer["labels"], *(answer["shares"].get(name, 0.0) for name in names)])
    files = f"{out}/0000-*.png, 0000-*-labels.png ...\n{out}/predictions.csv, predictions.json"
    print_answers(table, len(answers), files)
