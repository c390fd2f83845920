"""`itpn evaluate` of detectors: a checkpoint and annotated images, in COCO's figures."""

import functools
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from itpn.checkpoints.architecture import read_detector
from itpn.checkpoints.files import read_checkpoint
from itpn.checkpoints.loading import check_sound, load_found
from itpn.config import DetectionConfig
from itpn.data.annotations import read_objects
from itpn.data.normalize import Normalize
from itpn.errors import UserError
from itpn.metrics.classification import gather_skipped, match_classes, nothing_readable, rank_classes, tell_asides
from itpn.metrics.detection import (
    DetectionScores,
    collect_detections,
    gather_detections,
    score_detections,
    write_detection_scores,
)
from itpn.models.detector import Detector
from itpn.system.console import Output, print_aside
from itpn.tasks.detection.module import detect
from itpn.tasks.detection.run import make_batches
from itpn.training.launch import quieten_libraries, read_launch, start_fabric
from itpn.training.run_folder import make_folder, writing_to
from itpn.training.summary import make_table


def evaluate_objects(
    config: DetectionConfig, recipe: str, checkpoint: str, out: Path, given: Collection[str] = ()
) -> DetectionScores:
    """Evaluate a detector on the images that the settings name, and write the figures.

    Args:
        out: folder of ``evaluation.json``, ``classes.csv`` and ``results.json``.
        given: settings of the data that were asked for, and are not the checkpoint's affair: img_size, max_size.

    Raises:
        UserError: no such checkpoint, one without a detector, objects of other classes than it knows.
    """
    found = read_checkpoint(checkpoint)
    check_sound(found)
    if read_detector(found.tensors) is None:
        raise UserError(f"checkpoint {checkpoint} has no detector: fine-tune it first (itpn train detector_small)")
    options: dict[str, Any] = {} if config.model.num_heads is None else {"num_heads": config.model.num_heads}
    if "img_size" in given:
        options |= {"min_size": config.data.img_size, "max_size": config.data.longest}
    elif "max_size" in given:
        options["max_size"] = config.data.longest
    model, notes = load_found(found, "detection", **options)
    assert isinstance(model, Detector)
    main = read_launch().main
    data = config.data
    tell = print_aside if main else lambda line: None
    where = data.val_root or data.root
    # a folder with one set alone: that
    images = read_objects(where, "val", data.mistakes, tell, True, data.max_pixels)
    if images is None:
        images = read_objects(where, "train", data.mistakes, tell, max_pixels=data.max_pixels)
        tell(f"no images to evaluate on in {where}: these are those to train on")
    assert images is not None
    if model.has_masks and images.has_outlines and images.outlined[1]:
        tell(f"{images.outlined[1]:,} objects without an outline are left out")
        images = images.with_outlines()
    images = match_classes(images, found.metadata.get("classes"), model.num_classes - 1)
    make_folder(out)
    quieten_libraries()
    with start_fabric(config.trainer) as fabric:
        model.to(fabric.device).eval()
        normalize = Normalize(3, (0.0,), (1.0,)).to(fabric.device)
        skipped: list[tuple[str, str]] = []
        with fabric.autocast():
            results, seen = collect_detections(
                functools.partial(detect, model, normalize),
                images,
                make_batches(images, config, fabric.global_rank, fabric.world_size),
                fabric.device,
                skipped,
            )
        results, seen = gather_detections(results, seen, fabric.world_size)
        unread = gather_skipped(skipped, fabric.world_size)
        if not seen:
            raise nothing_readable(unread)
        scores = score_detections(images, results, seen, model.has_masks and images.has_outlines)
        if fabric.is_global_zero:
            tell_asides(notes, unread)
            about = {"checkpoint": checkpoint, "recipe": recipe, "data": where, "images_skipped": len(unread)}
            with writing_to(out):
                write_detection_scores(scores, images.classes, results, out, about)
            report(scores, images.classes, out, checkpoint, len(unread))
    return scores


def report(scores: DetectionScores, classes: tuple[str, ...], out: Path, checkpoint: str, skipped: int) -> None:
    """Show the figures."""
    rows = {"images": f"{scores.images:,} with {scores.objects:,} objects of {len(classes)} classes, {skipped} skipped"}
    for kind, own in scores.figures.items():
        first, then = [
            "  ".join(f"{name.upper().replace('_', ' ')} {_percent(own[name])}" for name in names)
            for names in (list(own)[:6], list(own)[6:])
        ]
        rows |= {f"{kind}": first, f"{kind} recall": then}
    known = {name: v for name, v in zip(classes, scores.per_class["box"], strict=True) if not math.isnan(v)}
    rows |= rank_classes(known)
    rows["files"] = f"{out}/evaluation.json, classes.csv, results.json"
    Output().print(make_table(checkpoint, rows))


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"
