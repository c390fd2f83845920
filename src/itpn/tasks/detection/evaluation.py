"""Evaluation of detectors: COCO's metrics."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from itpn.data.annotations import read_objects
from itpn.data.batches import collect
from itpn.data.normalize import Normalize
from itpn.data.objects import DetectionImages, check_size
from itpn.data.samples import NO_LIMIT
from itpn.metrics.classification import rank_classes
from itpn.metrics.detection import DetectionScores, Results, score_detections, to_results, write_detection_scores
from itpn.models.detector import DETECTIONS, Detector
from itpn.tasks.data import print_once
from itpn.tasks.detection.config import DetectionConfig
from itpn.tasks.detection.data import DetectionData
from itpn.tasks.detection.merging import Objects, describe_objects, merge_objects, to_objects
from itpn.tasks.evaluation import EvaluationRequest, Evaluator, match_classes, trained_bands, trained_windows
from itpn.tasks.finetuning.network import given_heads
from itpn.tasks.large import Tiling, tiling_of_run, usual_side
from itpn.tasks.pixels import adopt_pixels, make_normalize, make_read_settings
from itpn.tasks.source_images import SourceImage
from itpn.tasks.tiling import Grid, Tile

Part = tuple[Results, list[int]]  # detections in COCO's form, and the ids of the images they are of


class DetectionEvaluator(Evaluator[DetectionScores]):
    """Average precision and recall of boxes, and of masks.

    Args:
        masks: whether the network predicts masks.
        max_detections: that AP counts in an image; COCO's 100 at least.
        usual: side of the images that the network was trained on.
    """

    best = "box_ap"
    files = ("evaluation.json", "classes.csv", "results.json")
    tiling: Tiling

    def __init__(
        self,
        config: DetectionConfig,
        images: DetectionImages,
        masks: bool,
        max_detections: int = DETECTIONS,
        usual: int | None = None,
    ) -> None:
        super().__init__(config, images, make_normalize(config), view_whole, collect)
        self.masks = masks and images.has_masks
        kinds = ("box", "mask") if self.masks else ("box",)
        self.names = tuple(f"{kind}_{name}" for kind in kinds for name in ("ap", "ap50", "ap75"))
        self._results: Results = []
        self.max_detections = max(DETECTIONS, max_detections)
        self.tiling = tiling_of_run(config.data, usual or config.data.img_size)
        self.about = {"max_detections": max_detections}

    def compare(self, network: nn.Module, batch: dict[str, Any]) -> Part:
        evaluated = [int(self.images.ids[index]) for index in batch["index"].tolist()]
        results: Results = []
        images = [image.to(self.device, non_blocking=True) for image in batch["image"]]
        for id_, own in zip(evaluated, detect(network, self.normalize, images), strict=True):
            results += to_results(own, id_, self.images.class_ids)
        return results, evaluated

    def compare_tiles(
        self,
        network: nn.Module,
        index: int,
        image: SourceImage,
        known: dict[str, Any],
        grid: Grid,
        tiles: Iterable[Tile],
    ) -> Part:
        check_size((image.height, image.width), known)
        objects = detect_tiles(network, self.normalize, image.read, grid, tiles)
        id_ = int(self.images.ids[index])
        return describe_objects(objects, image.height, image.width, id_, self.images.class_ids), [id_]

    def _is_cut(self, height: int, width: int) -> bool:
        """Whether an image of a size is evaluated in tiles."""
        fits = height * width <= self.config.data.max_pixels
        return self.tiling.grid(height, width, self.normalize.pixels.type.is_photo and fits) is not None

    def score(self, parts: Sequence[Part]) -> DetectionScores:
        results = sorted((one for own, _ in parts for one in own), key=lambda one: one["image_id"])
        evaluated = sorted(id_ for _, ids in parts for id_ in ids)
        self._results = results
        # an image of many tiles has more than the network finds in one
        sizes = self.images.sizes.tolist()
        cut = {id_ for id_, (h, w) in zip(self.images.ids.tolist(), sizes, strict=True) if self._is_cut(h, w)}
        found = Counter(one["image_id"] for one in results if one["image_id"] in cut)
        most = max([self.max_detections, *found.values()])
        return score_detections(self.images, results, evaluated, self.masks, most)

    def metrics(self, scores: DetectionScores) -> dict[str, float]:
        flat = scores.flat()
        return {name: 0.0 if math.isnan(flat[name]) else flat[name] for name in self.names}

    def write(self, scores: DetectionScores, folder: Path, about: Mapping[str, Any]) -> None:
        write_detection_scores(scores, self.classes, self._results, folder, about)

    def rows(self, scores: DetectionScores, about: Mapping[str, Any]) -> dict[str, str]:
        counts = f"{scores.images:,} with {scores.objects:,} objects of {len(self.classes)} classes"
        rows = {"images": f"{counts}, {about['images_skipped']} skipped"}
        for kind, own in scores.metrics.items():
            shown = {name: _percent(value) for name, value in own.items()}
            sizes = ("small", "medium", "large")
            recalls = [name for name in own if name[:2] == "ar" and name[2:].isdigit()]
            rows |= {
                f"{kind} AP": f"{shown['ap']}, AP50 {shown['ap50']}, AP75 {shown['ap75']}",
                f"{kind} AP by size": ", ".join(f"{size} {shown[f'ap_{size}']}" for size in sizes),
                f"{kind} recall": ", ".join(f"{name.upper()} {shown[name]}" for name in recalls),
                f"{kind} recall by size": ", ".join(f"{size} {shown[f'ar_{size}']}" for size in sizes),
            }
        known = {name: v for name, v in zip(self.classes, scores.per_class["box"], strict=True) if not math.isnan(v)}
        return rows | rank_classes(known)

    def summarize(self, metrics: Mapping[str, float | None]) -> dict[str, str]:
        rows = {}
        for kind, title in {"box": "boxes", "mask": "masks"}.items():
            shown = [
                f"{name.upper()} {100 * value:.1f}"
                for name in ("ap", "ap50", "ap75")
                if (value := metrics.get(f"{kind}_{name}")) is not None
            ]
            if shown:
                rows[title] = f"{', '.join(shown)} on {len(self):,} images"
        return rows


def build_evaluator(config: DetectionConfig, data: DetectionData) -> DetectionEvaluator:
    assert data.val is not None
    most = config.evaluation.max_detections or DETECTIONS
    usual = usual_side(data.train, make_read_settings(config, data.train))
    return DetectionEvaluator(config, data.val, data.masks, most, usual)


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


@torch.no_grad()
def detect(network: Any, normalize: Normalize, images: list[Tensor]) -> list[dict[str, Tensor]]:
    """[C, any, any] each as stored -> what torchvision's detectors give each, in the image's own pixels, on the CPU."""
    found = network([normalize.scale(image) for image in images])  # which subtracts mean and std itself
    return [{name: value.cpu() for name, value in one.items()} for one in found]


def detect_tiles(
    network: Any, normalize: Normalize, read: Callable[[Tile], Tensor], grid: Grid, tiles: Iterable[Tile]
) -> Objects:
    """The objects of a large image from those of its tiles, as `itpn.tasks.detection.merging` joins them.

    Args:
        read: the pixels of a tile as stored.
        tiles: those of the grid.
    """
    found = []
    for tile in tiles:
        (own,) = detect(network, normalize, [read(tile).to(normalize.mean.device)])
        found.append(to_objects(own).move(tile.top, tile.left))
    return merge_objects(grid, found, network.roi_heads.nms_thresh)


def view_whole(image: Tensor, known: dict[str, Any]) -> dict[str, Any]:
    """An image as it is evaluated: the network resizes it."""
    check_size(image.shape[-2:], known)
    return {"image": image}


# --- itpn evaluate


def resolve_evaluation(config: DetectionConfig, request: EvaluationRequest) -> tuple[DetectionConfig, dict[str, Any]]:
    """Settings with the checkpoint's network, and the sizes of images and the limit of detections that were given
    instead of the checkpoint's.

    Returns:
        The settings, and arguments of the network that differ from the checkpoint's.
    """
    given = request.given
    config = adopt_pixels(config, request.checkpoint.preprocessing)
    sizes: dict[str, Any] = {}
    if "img_size" in given:
        sizes = {"min_size": config.data.img_size, "max_size": config.data.longest}
    elif "max_size" in given:
        sizes = {"max_size": config.data.longest}
    windows = trained_windows(request.checkpoint.settings.get("data", {}), given)
    config = replace(config, data=replace(config.data, bands=trained_bands(request.checkpoint), **windows))
    limit = config.evaluation.max_detections
    limits = {} if limit is None else {"box_detections_per_img": limit}
    return config, {**sizes, **limits, **given_heads(config.model)}


def find_evaluation_data(
    config: DetectionConfig, model: Detector, request: EvaluationRequest
) -> tuple[DetectionEvaluator, str]:
    """The evaluator, and which images it evaluates on.

    Raises:
        UserError: no images, or objects of classes that the model does not know.
    """
    data = config.data
    where = data.val_root or data.root
    # what is too large to be decoded as a whole may be read in tiles, or is named
    options: dict[str, Any] = {"max_pixels": NO_LIMIT, "bands": data.bands, "axes": data.axes}
    images = read_objects(where, "val", data.invalid_annotations, print_once, optional=True, **options)
    if images is None:  # a folder with one set alone: that
        images = read_objects(where, "train", data.invalid_annotations, print_once, **options)
        print_once(f"no images to evaluate on in {where}: these are those to train on")
    assert images is not None
    if model.has_masks and images.has_masks and images.mask_counts[1]:
        print_once(f"{images.mask_counts[1]:,} objects without a mask are left out")
        images = images.with_masks()
    images = match_classes(images, request.checkpoint.metadata.get("classes"), model.num_classes - 1)
    usual = request.checkpoint.preprocessing.get("image_side") or model.transform.min_size[-1]
    return DetectionEvaluator(config, images, model.has_masks, model.roi_heads.detections_per_img, usual), where
