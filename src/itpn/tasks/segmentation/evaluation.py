"""`itpn evaluate` of segmenters: a checkpoint and images with masks, in figures over all pixels."""

import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from itpn.checkpoints.architecture import read_segmenter
from itpn.checkpoints.files import Checkpoint, read_checkpoint
from itpn.checkpoints.finetuning import settle
from itpn.checkpoints.loading import check_sound, load_found
from itpn.config import SegmentationConfig
from itpn.data.labelmaps import read_to_evaluate
from itpn.data.masks import Names, name_labels
from itpn.data.normalize import Normalize
from itpn.errors import UserError
from itpn.metrics.classification import gather_skipped, match_classes, nothing_readable, rank_classes, tell_asides
from itpn.metrics.segmentation import PixelScores, collect_confusion, gather_confusion, write_pixel_scores
from itpn.models.segmenter import Segmenter
from itpn.system.console import Output
from itpn.tasks.segmentation.run import describe_sets, make_batches, make_segmentation
from itpn.tasks.starting import real_paths
from itpn.training.launch import quieten_libraries, start_fabric
from itpn.training.run_folder import make_folder, writing_to
from itpn.training.summary import make_table


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
    own, held_out = read_to_evaluate(**describe_sets(config), names=_names(config, found))
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
            which = f"{data.val_share:.0%} held out of " * held_out + (data.val_root or data.root)
            about: dict[str, Any] = {"checkpoint": checkpoint, "recipe": recipe, "data": which}
            about |= {"images_skipped": len(unread) + own.left_out}
            about |= {"img_size": data.img_size, "short_side": data.short, "interpolation": data.interpolation}
            about |= {"mode": how.mode, "stride": how.stride, "scales": how.scales, "flip": how.flip}
            with writing_to(out):
                write_pixel_scores(scores, images.classes, out, about)
            report(scores, images.classes, out, about)
    return scores


def take_over(config: SegmentationConfig, found: Checkpoint, given: Collection[str] = ()) -> None:
    """Settings of the data that a checkpoint was trained with, where no others were asked for, in place.

    Among them what its labels mean, and, of the very folder that it was trained on, which images were held out.
    """
    own, data = found.preprocessing, config.data
    trained = found.metadata.get("settings", {}).get("data", {})
    if "reduce_zero_label" in trained and "reduce_zero_label" not in given:
        data.reduce_zero_label = trained["reduce_zero_label"]
    if "ignore" in trained and "ignore" not in given:
        data.ignore = tuple(trained["ignore"])
    if real_paths(trained.get("root"), trained.get("masks")) == real_paths(data.root, data.masks):
        for name in ("val_share", "val_root", "val_masks"):
            if name not in given:
                setattr(data, name, trained[name])
        config.seed = found.metadata["settings"]["seed"]
    else:
        data.val_share = 0.0  # another folder of one set is for evaluation as a whole
    config.model.name = config.model.patch_size = None
    for name in ("mean", "std"):
        if name not in given:
            setattr(data, name, None)
    if "img_size" not in given and "size" in own:
        data.img_size = own["size"][0]
    if "short_side" not in given:
        data.short_side = trained.get("short_side")
    if "interpolation" not in given and "interpolation" in own:
        data.interpolation = own["interpolation"]
    settle(config, found)


def _names(config: SegmentationConfig, found: Checkpoint) -> Names | None:
    """What labels mean to the checkpoint."""
    classes, colours = found.metadata.get("classes"), found.metadata.get("colours")
    if classes is None:
        return None
    known = colours and [(red, green, blue) for red, green, blue in colours]
    return name_labels(classes, known, config.data.reduce_zero_label, config.data.ignore)


def report(scores: PixelScores, classes: tuple[str, ...], out: Path, about: Mapping[str, Any]) -> None:
    """Show the figures."""
    figures = {name: f"{100 * value:.1f} %" for name, value in scores.figures.items()}
    pixels = int(scores.confusion.sum())
    rows = {
        "images": f"{scores.images:,} with {pixels:,} labelled pixels, {about['images_skipped']} skipped; of "
        f"{about['data']}",
        "mIoU": figures["miou"],
        "accuracy": f"{figures['pixel_accuracy']} of the pixels, {figures['mean_accuracy']} of the mean class's",
    }
    rows |= rank_classes({name: v for name, v in zip(classes, scores.iou.tolist(), strict=True) if v == v})
    rows["files"] = f"{out}/evaluation.json, classes.csv, confusion.csv, confusion.png"
    Output().print(make_table(about["checkpoint"], rows))
