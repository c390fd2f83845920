"""COCO's metrics for detections: average precision and recall of boxes and masks, as its API computes them."""

import contextlib
import copy
import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle
from torch import Tensor

from itpn.data.objects import DetectionImages
from itpn.system.writing import open_whole_text, write_whole

Results = list[dict[str, Any]]  # detections in COCO's form: image_id, category_id, bbox, score, segmentation

# as COCO's API gives its twelve numbers
METRICS = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)
MAX_DETECTIONS = 100  # of a class in an image, that COCO counts
KINDS = {"box": "bbox", "mask": "segm"}


@dataclass
class DetectionScores:
    """Metrics of a detector on a set.

    Attributes:
        metrics: by "box" or "mask", then by name (see `name_metrics`), from 0 to 1; NaN where there is nothing of the
            kind.
        per_class: by "box" or "mask", average precision of each class, NaN where there is nothing of it.
        images, objects: how many there were, crowds aside.
    """

    metrics: dict[str, dict[str, float]]
    per_class: dict[str, list[float]]
    images: int
    objects: int

    def flat(self, prefix: str = "") -> dict[str, float]:
        """One name each, e.g. "box_ap50"."""
        return {f"{prefix}{kind}_{n}": v for kind, own in self.metrics.items() for n, v in own.items()}


def to_results(found: dict[str, Tensor], image_id: int, class_ids: tuple[int, ...]) -> Results:
    """An image's detections in COCO's form."""
    boxes = found["boxes"].clone()
    boxes[:, 2:] -= boxes[:, :2]
    results: Results = [
        {"image_id": image_id, "category_id": class_ids[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(
            boxes.double().tolist(), found["labels"].tolist(), found["scores"].double().tolist(), strict=True
        )
    ]
    if "masks" in found:
        for result, mask in zip(results, found["masks"], strict=True):
            encoded = rle.encode(np.asfortranarray((mask[0] > 0.5).numpy(), dtype=np.uint8))
            counts = encoded["counts"]
            counts = counts.decode() if isinstance(counts, bytes) else counts
            result["segmentation"] = {"size": [int(side) for side in encoded["size"]], "counts": counts}
    return results


def name_metrics(max_detections: int = MAX_DETECTIONS) -> tuple[str, ...]:
    """`METRICS`, "ar100" being that of another number of detections in an image: "ar300"."""
    return tuple(f"ar{max_detections}" if name == "ar100" else name for name in METRICS)


def score_detections(
    images: DetectionImages,
    results: Results,
    evaluated: list[int],
    masks: bool,
    max_detections: int = MAX_DETECTIONS,
) -> DetectionScores:
    """COCO's metrics of detections in some images.

    Args:
        results: in COCO's form.
        evaluated: ids of the images that were evaluated.
        masks: judge masks as well as boxes.
        max_detections: of a class in an image, those of the highest scores; above 10.
    """
    names = name_metrics(max_detections)
    truth = describe_truth(images, set(evaluated))
    scores = DetectionScores({}, {}, len(evaluated), sum(not one["iscrowd"] for one in truth["annotations"]))
    for kind in KINDS if masks else ["box"]:
        with contextlib.redirect_stdout(io.StringIO()):  # it tells all that it does, and changes what it is given
            known = COCO(truth)
            own = copy.deepcopy(results)
            for one in own if kind == "mask" else []:
                del one["bbox"]  # or else a mask's size would be its box's
            judged = COCOeval_faster(known, known.loadRes(own), KINDS[kind]) if own else None
            if judged is not None:
                judged.params.maxDets = [1, 10, max_detections]
                judged.evaluate()
                judged.accumulate()
                judged.summarize()
        if judged is None:
            present = {one["category_id"] for one in truth["annotations"] if not one["iscrowd"]}
            scores.metrics[kind] = dict.fromkeys(names, 0.0 if present else float("nan"))
            scores.per_class[kind] = [0.0 if id_ in present else float("nan") for id_ in images.class_ids]
            continue
        stats = [float(value) for value in judged.stats[: len(names)]]
        scores.metrics[kind] = {n: _known(v) for n, v in zip(names, stats, strict=True)}
        precision = judged.eval["precision"]  # [thresholds, recalls, classes, areas, detections]
        order = {id_: row for row, id_ in enumerate(judged.params.catIds)}
        scores.per_class[kind] = [
            _known(_mean(precision[:, :, order[id_], 0, -1])) if id_ in order else float("nan")
            for id_ in images.class_ids
        ]
    return scores


def _mean(values: np.ndarray) -> float:
    valid = values[values > -1]
    return float(valid.mean()) if len(valid) else -1.0


def _known(value: float) -> float:
    """COCO's -1 means that there was nothing to be found."""
    return float("nan") if value < 0 else value


def describe_truth(images: DetectionImages, evaluated: set[int]) -> dict[str, Any]:
    """What is known of some images, in COCO's form."""
    truth: dict[str, Any] = {"images": [], "annotations": []}
    truth["categories"] = [{"id": i, "name": n} for i, n in zip(images.class_ids, images.classes, strict=True)]
    for index, (height, width) in enumerate(images.sizes.tolist()):
        image_id = int(images.ids[index])
        if image_id not in evaluated:
            continue
        truth["images"].append({"id": image_id, "height": height, "width": width, "file_name": images.name(index)})
        for known in images.objects_of(index):
            own = {key: value for key, value in known.items() if key != "label"}
            own |= {"id": 1 + len(truth["annotations"]), "image_id": image_id}
            truth["annotations"].append({**own, "category_id": images.class_ids[known["label"]]})
    return truth


def write_detection_scores(
    scores: DetectionScores, classes: tuple[str, ...], results: Results, folder: Path, about: Mapping[str, Any]
) -> None:
    """Write ``evaluation.json``, ``classes.csv`` and ``results.json``, the latter as COCO's test server takes it."""
    metrics = {name: None if np.isnan(value) else value for name, value in scores.flat().items()}
    about = {**about, "images": scores.images, "objects": scores.objects}
    write_whole(folder / "evaluation.json", (json.dumps({**about, **metrics}, indent=2) + "\n").encode())
    with open_whole_text(folder / "classes.csv") as file:
        writer = csv.writer(file)
        writer.writerow(["class", *(f"{kind}_ap" for kind in scores.per_class)])
        for name, *own in zip(classes, *scores.per_class.values(), strict=True):
            writer.writerow([name, *("" if np.isnan(value) else value for value in own)])
    rounded = [
        {**one, "bbox": [round(v, 2) for v in one["bbox"]], "score": round(one["score"], 5)}
        for one in results
        if one["category_id"] >= 0  # of classes that the annotations do not have
    ]
    write_whole(folder / "results.json", json.dumps(rounded).encode())
