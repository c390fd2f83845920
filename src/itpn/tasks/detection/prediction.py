"""The objects in images."""

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
from itpn.data.normalize import Normalize
from itpn.metrics.detection import to_results
from itpn.models.detector import Detector
from itpn.system.text import as_file_name, one_line
from itpn.system.writing import name_output, open_whole_text, write_whole
from itpn.tasks.detection.evaluation import detect
from itpn.tasks.drawing import draw_objects, save_whole
from itpn.tasks.prediction import ROWS, PredictionOptions, print_answers, read_as_they_are


def predict(model: Detector, found: Checkpoint, source: ImageSource, options: PredictionOptions) -> None:
    """Write the objects in images, see :func:`predict_objects`."""
    names = found.metadata.get("classes") or [str(number) for number in range(1, model.num_classes)]
    predict_objects(model, read_as_they_are(source, options.max_pixels), names, options.out, options.min_score)


def predict_objects(
    model: Detector, images: Iterator[tuple[str, Tensor]], classes: list[str], out: Path, min_score: float
) -> None:
    """A picture of each image with what is found in it, and all of it in ``predictions.json`` and ``predictions.csv``.

    Boxes are x0, y0, x1, y1 in pixels of the image; masks are COCO's compressed run lengths.
    """
    normalize = Normalize(3, (0.0,), (1.0,))
    answers: list[dict[str, Any]] = []
    table = Table("image", "objects", "likeliest", box=None, pad_edge=False, header_style="bold")
    for number, (name, image) in enumerate(images):
        (found,) = detect(model, normalize, [image])
        keep = found["scores"] >= min_score
        found = {key: value[keep] for key, value in found.items()}
        results = to_results(found, number, tuple(range(len(classes))))
        objects = []
        for result, box in zip(results, found["boxes"].tolist(), strict=True):
            one = {"class": classes[result["category_id"]], "score": result["score"], "box": box}
            objects.append(one | ({"mask": result["segmentation"]} if "segmentation" in result else {}))
        answers.append({"image": name, "size": list(image.shape[-2:]), "objects": objects})
        picture = draw_objects(image, found, classes, min_score)
        save_whole(picture, out / as_file_name(name_output(out, number, name, ".png")))
        if table.row_count < ROWS:
            some = ", ".join(f"{one['class']} {one['score']:.0%}" for one in objects[:4])
            table.add_row(*map(Text, (one_line(Path(name).name), str(len(objects)), some)))
    write_whole(out / "predictions.json", (json.dumps(answers, indent=1) + "\n").encode())
    with open_whole_text(out / "predictions.csv") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "class", "score", "x0", "y0", "x1", "y1"])
        for answer in answers:
            writer.writerows([answer["image"], one["class"], one["score"], *one["box"]] for one in answer["objects"])
    print_answers(table, len(answers), f"{out}/0000-*.png ...\n{out}/predictions.csv, predictions.json")
