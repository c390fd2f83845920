"""`itpn evaluate` of segmenters: a checkpoint and images with masks, in figures over all pixels."""

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rich.console import Console

from itpn.checkpoints.architecture import read_segmenter
from itpn.checkpoints.files import Checkpoint, read_checkpoint
from itpn.checkpoints.finetuning import settle
from itpn.checkpoints.loading import check_sound, load_found
from itpn.config import SegmentationConfig
from itpn.data.labelmaps import read_to_evaluate
from itpn.data.normalize import Normalize
from itpn.engine.confusion import PixelScores, collect_confusion, gather_confusion, write_pixel_scores
from itpn.engine.fitting import make_table
from itpn.engine.folder import make_folder, writing_to
from itpn.engine.launch import quieten_libraries, start_fabric
from itpn.engine.scores import gather_skipped, match_classes, nothing_readable, rank_classes, tell_asides
from itpn.engine.segmentation import make_batches, make_rules, make_segmentation
from itpn.errors import UserError
from itpn.models.segmenter import Segmenter


def evaluate_pixels(
    config: SegmentationConfig, recipe: str, checkpoint: str, out: Path, given: Collection[str] = ()
) -> PixelScores:
    """Evaluate a segmenter on the images that the settings name, and write the figures.

    Args:
        out: folder of ``evaluation.json``, ``classes.csv``, ``confusion.csv`` and ``confusion.png``.
        given: settings of the data that were asked for, and are not the checkpoint's affair.

    Raises:
        UserError: no such checkpoint, one without a segmenter, masks of other classes than it knows.
    """
    found = read_checkpoint(checkpoint)
    check_sound(found)
    if read_segmenter(found.tensors) is None:
        raise UserError(f"checkpoint {checkpoint} has no segmenter: fine-tune it first (itpn train segmenter_small)")
    take_over(config, found, given)
    options: dict[str, Any] = {} if config.model.num_heads is None else {"num_heads": config.model.num_heads}
    model, notes = load_found(found, "segmentation", **options)
    assert isinstance(model, Segmenter)
    data = config.data
    own = read_to_evaluate(data.root, data.masks, data.val_root, data.val_masks, make_rules(config))
    images = match_classes(own, found.metadata.get("classes"), model.num_classes, "masks")
    make_folder(out)
    quieten_libraries()
    with start_fabric(config.trainer) as fabric:
        model.to(fabric.device).eval()
        assert config.data.mean is not None
        assert config.data.std is not None
        normalize = Normalize(3, config.data.mean, config.data.std).to(fabric.device)
        skipped: list[tuple[str, str]] = []
        with fabric.autocast():
            scores = collect_confusion(
                functools.partial(make_segmentation(config), model, normalize),
                len(images.classes),
                make_batches(images, config, fabric.global_rank, fabric.world_size),
                fabric.device,
                skipped,
            )
        scores = gather_confusion(scores, fabric.world_size)
        unread = gather_skipped(skipped, fabric.world_size)
        if not scores.images:
            raise nothing_readable(unread)
        if fabric.is_global_zero:
            tell_asides(notes, unread)
            how = config.evaluation
            about: dict[str, Any] = {"checkpoint": checkpoint, "recipe": recipe, "data": data.val_root or data.root}
            about |= {"images_skipped": len(unread)}
            about |= {"mode": how.mode, "scales": how.scales, "flip": how.flip}
            with writing_to(out):
                write_pixel_scores(scores, images.classes, out, about)
            report(scores, images.classes, out, checkpoint, len(unread))
    return scores


def take_over(config: SegmentationConfig, found: Checkpoint, given: Collection[str] = ()) -> None:
    """Settings of the data that a checkpoint was trained with, where no others were asked for, in place."""
    own, data = found.preprocessing, config.data
    config.model.name = config.model.patch_size = None
    for name in ("mean", "std"):
        if name not in given:
            setattr(data, name, None)
    if "img_size" not in given and "size" in own:
        data.img_size = own["size"][0]
    for name in ("short_side", "interpolation"):
        if name not in given and name in own:
            setattr(data, name, own[name])
    settle(config, found)


def report(scores: PixelScores, classes: tuple[str, ...], out: Path, checkpoint: str, skipped: int) -> None:
    """Show the figures."""
    figures = {name: f"{100 * value:.1f} %" for name, value in scores.figures.items()}
    rows = {
        "images": f"{scores.images:,} with {int(scores.confusion.sum()):,} labelled pixels, {skipped} skipped",
        "mIoU": figures["miou"],
        "accuracy": f"{figures['pixel_accuracy']} of the pixels, {figures['mean_accuracy']} of the mean class's",
    }
    rows |= rank_classes({name: v for name, v in zip(classes, scores.iou.tolist(), strict=True) if v == v})
    rows["files"] = f"{out}/evaluation.json, classes.csv, confusion.csv, confusion.png"
    Console().print(make_table(checkpoint, rows))
