"""Evaluation of segmenters: mean IoU and accuracy over all pixels of a set."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from itpn.checkpoints.files import Checkpoint
from itpn.data.batches import collect
from itpn.data.class_names import Names
from itpn.data.labelmaps import read_to_evaluate
from itpn.data.mask_checks import LabelMaps
from itpn.data.mask_files import open_mask
from itpn.data.masks import LabelTable, name_labels
from itpn.data.segmentation_transform import check_same_size, view_labels
from itpn.metrics.classification import rank_classes
from itpn.metrics.segmentation import PixelScores, compare, write_pixel_scores
from itpn.models.segmenter import Segmenter
from itpn.tasks.data import RunData
from itpn.tasks.evaluation import (
    EvaluationRequest,
    Evaluator,
    match_classes,
    real_paths,
    trained_bands,
    trained_windows,
)
from itpn.tasks.finetuning.network import given_heads, resolve_with_head
from itpn.tasks.large import tiling_of_run, usual_side
from itpn.tasks.pixels import make_normalize, make_read_settings
from itpn.tasks.segmentation.config import SegmentationConfig
from itpn.tasks.segmentation.data import describe_sets
from itpn.tasks.segmentation.inference import make_segmentation, segment_tiles
from itpn.tasks.source_images import SourceImage
from itpn.tasks.tiling import Grid, Tile


class SegmentationEvaluator(Evaluator[PixelScores]):
    """Metrics of one confusion matrix over all pixels.

    Args:
        left_out: images whose masks cannot be right.
        usual: side of the images that the network was trained on.
    """

    names = ("miou", "mean_accuracy", "pixel_accuracy")
    best = "miou"
    files = ("evaluation.json", "classes.csv", "confusion.csv", "confusion.png")

    def __init__(
        self, config: SegmentationConfig, images: LabelMaps, left_out: int = 0, usual: int | None = None
    ) -> None:
        view = functools.partial(view_scene, images.table, config.data.max_pixels)
        super().__init__(config, images, make_normalize(config), view, collect)
        self.left_out = left_out
        self.segment = make_segmentation(config)
        self.tiling = tiling_of_run(config.data, usual or config.data.short)
        data, how = config.data, config.evaluation
        self.about: Mapping[str, Any] = {
            **{"img_size": data.img_size, "short_side": data.short, "interpolation": data.interpolation},
            **{"mode": how.mode, "stride": how.stride, "scales": how.scales, "flip": how.flip},
        }

    def compare(self, network: nn.Module, batch: dict[str, Any]) -> PixelScores:
        classes = len(self.classes)
        confusion = torch.zeros(classes, classes, dtype=torch.int64)
        for image, target in zip(batch["image"], batch["target"], strict=True):
            labels = self.segment(network, self.normalize, image.to(self.device, non_blocking=True))
            confusion += compare(labels, target, classes)
        return PixelScores(confusion, len(batch["image"]))

    def compare_tiles(
        self, network: nn.Module, index: int, image: SourceImage, known: str, grid: Grid, tiles: Iterable[Tile]
    ) -> PixelScores:
        classes = len(self.classes)
        confusion = torch.zeros(classes, classes, dtype=torch.int64)
        mask = open_mask(known, self.config.data.max_pixels)
        check_same_size(known, (mask.height, mask.width), (image.height, image.width))
        segment = functools.partial(self.segment.probabilities, network, self.normalize)
        top, rows = -1, torch.empty(0)  # of the mask, as wide as the image
        for part, own in segment_tiles(segment, lambda tile: image.read(tile).to(self.device), grid, tiles):
            if part.top != top:
                top, rows = part.top, self.images.table.read_window(mask, (part.top, 0, part.height, image.width))
            confusion += compare(own, rows[:, part.left : part.left + part.width], classes)
        return PixelScores(confusion, 1)

    def score(self, parts: Sequence[PixelScores]) -> PixelScores:
        return PixelScores(torch.stack([own.confusion for own in parts]).sum(dim=0), sum(own.images for own in parts))

    def metrics(self, scores: PixelScores) -> dict[str, float]:
        return scores.metrics

    def write(self, scores: PixelScores, folder: Path, about: Mapping[str, Any]) -> None:
        write_pixel_scores(scores, self.classes, folder, about)

    def rows(self, scores: PixelScores, about: Mapping[str, Any]) -> dict[str, str]:
        metrics = {name: f"{100 * value:.1f} %" for name, value in scores.metrics.items()}
        pixels = int(scores.confusion.sum())
        rows = {
            "images": f"{scores.images:,} with {pixels:,} labelled pixels, {about['images_skipped']} skipped; of "
            f"{about['data']}",
            "mIoU": metrics["miou"],
            "pixel accuracy": metrics["pixel_accuracy"],
            "mean class accuracy": metrics["mean_accuracy"],
        }
        known = {name: v for name, v in zip(self.classes, scores.iou.tolist(), strict=True) if v == v}
        return rows | rank_classes(known)

    def summarize(self, metrics: Mapping[str, float | None]) -> dict[str, str]:
        miou, mean, pixels = (metrics[name] for name in self.names)
        if miou is None or mean is None or pixels is None:
            return {}
        accuracy = f"pixel accuracy {100 * pixels:.1f} %, mean class accuracy {100 * mean:.1f} %"
        return {"mIoU": f"{100 * miou:.1f} %, {accuracy}, on {len(self):,} images"}


def build_evaluator(config: SegmentationConfig, data: RunData) -> SegmentationEvaluator:
    return SegmentationEvaluator(config, data.val, usual=usual_side(data.train, make_read_settings(config, data.train)))


def view_scene(table: LabelTable, max_pixels: int, image: Tensor, mask: str) -> dict[str, Any]:
    """An image and its classes, as they are."""
    return {"image": image, "target": view_labels(image, table, mask, max_pixels)}


# --- itpn evaluate


def resolve_evaluation(
    config: SegmentationConfig, request: EvaluationRequest
) -> tuple[SegmentationConfig, dict[str, Any]]:
    """Settings with the checkpoint's network and images, but for the settings of the data that were given.

    Among them are what labels mean, and, of the very folder that it was trained on, which images were held out.

    Returns:
        The settings, and arguments of the network that differ from the checkpoint's.
    """
    checkpoint = request.checkpoint
    own, trained, data, seed = checkpoint.preprocessing, checkpoint.settings.get("data", {}), config.data, config.seed
    values: dict[str, Any] = {"mean": None, "std": None, "short_side": trained.get("short_side")}
    values["bands"] = trained_bands(checkpoint)
    if "reduce_zero_label" in trained:
        values["reduce_zero_label"] = trained["reduce_zero_label"]
    if "ignore" in trained:
        values["ignore"] = tuple(trained["ignore"])
    same = real_paths(trained.get("root"), trained.get("masks")) == real_paths(data.root, data.masks)
    if same:
        values |= {name: trained[name] for name in ("val_fraction", "val_root", "val_masks")}
        seed = checkpoint.settings["seed"]
    if "size" in own:
        values["img_size"] = own["size"][0]
    if "interpolation" in own:
        values["interpolation"] = own["interpolation"]
    values |= trained_windows(trained, request.given)
    values = {name: value for name, value in values.items() if name not in request.given}
    if not same:
        values["val_fraction"] = 0.0  # another folder of one set is for evaluation as a whole
    model = replace(config.model, name=None, patch_size=None)
    config = replace(config, model=model, data=replace(data, **values), seed=seed)
    return resolve_with_head(config, checkpoint)[0], given_heads(model)


def find_evaluation_data(
    config: SegmentationConfig, model: Segmenter, request: EvaluationRequest
) -> tuple[SegmentationEvaluator, str]:
    """The evaluator, and which images it evaluates on.

    Raises:
        UserError: no images, or masks of classes that the model does not know.
    """
    data, checkpoint = config.data, request.checkpoint
    own, held_out = read_to_evaluate(**describe_sets(config), names=_names(config, checkpoint))
    images = match_classes(own, checkpoint.metadata.get("classes"), model.num_classes, "masks")
    which = f"{data.val_fraction:.0%} held out of " * held_out + (data.val_root or data.root)
    usual = checkpoint.preprocessing.get("image_side")
    return SegmentationEvaluator(config, images, own.left_out, usual), which


def _names(config: SegmentationConfig, checkpoint: Checkpoint) -> Names | None:
    """What labels mean to the checkpoint."""
    classes, colours = checkpoint.metadata.get("classes"), checkpoint.metadata.get("colours")
    if classes is None:
        return None
    known = colours and [(red, green, blue) for red, green, blue in colours]
    return name_labels(classes, known, config.data.reduce_zero_label, config.data.ignore)
