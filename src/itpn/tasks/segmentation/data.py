"""The images of a segmenter's run: finding, augmenting, loading."""

from typing import Any

import numpy as np

from itpn.data.formats.reader import REMEDY
from itpn.data.labelmaps import find_label_maps
from itpn.data.mask_checks import LabelMaps, MaskRules
from itpn.data.mask_files import find_undivided
from itpn.data.masks import LabelTable
from itpn.data.readers import draw_images
from itpn.data.segmentation_transform import SegmentationTransform
from itpn.data.windows import is_large
from itpn.system.text import one_line
from itpn.tasks.data import NO_IMAGES, RunData, find_windows, print_once
from itpn.tasks.pixels import augmentation
from itpn.tasks.segmentation.config import SegmentationConfig
from itpn.training.config import describe_crops


def make_rules(config: SegmentationConfig) -> MaskRules:
    data = config.data
    return MaskRules(
        data.classes,
        data.reduce_zero_label,
        data.ignore,
        data.invalid_annotations,
        print_once,
        data.max_pixels,
        data.bands,
        data.axes,
        data.window_size is not None,
    )


def find_data(config: SegmentationConfig) -> RunData:
    """The images to train on, and those to evaluate on."""
    train, val = find_label_maps(**describe_sets(config))
    if config.data.label_fraction < 1:
        train = train.take(draw_images(train, config.data.label_fraction, config.seed))
    windows, notes = find_windows(config, train.files)
    if windows is not None:
        notes += note_decoded(train, windows.sizes, config.data.window_size or 0)
        train = train.cut(windows)
    return RunData(train, val, notes if val is not None else (*notes, NO_IMAGES))


def note_decoded(images: LabelMaps, sizes: np.ndarray, side: int) -> tuple[str, ...]:
    """Name a mask of a large image that is decoded as a whole for a window.

    Args:
        sizes: heights and widths of the images.
        side: of windows.
    """
    large = [
        images.masks[number] for number, (height, width) in enumerate(sizes.tolist()) if is_large(height, width, side)
    ]
    if not (whole := find_undivided(large)):
        return ()
    count = f"{len(whole):,} masks of large images are each" if len(whole) > 1 else "1 mask of a large image is"
    return (f"{count} decoded as a whole, and kept for its next windows; the first is {one_line(whole[0])}: {REMEDY}",)


def describe_data(config: SegmentationConfig, data: RunData) -> dict[str, str]:
    size = (config.data.img_size, config.data.img_size)
    return {"data": f"{len(data.train.classes)} classes of pixels", "size": describe_crops(size)}


def describe_sets(config: SegmentationConfig) -> dict[str, Any]:
    """Arguments of :func:`find_label_maps` and :func:`itpn.data.labelmaps.read_to_evaluate`."""
    data = config.data
    places = {"root": data.root, "masks": data.masks, "val_root": data.val_root, "val_masks": data.val_masks}
    return {**places, "rules": make_rules(config), "val_fraction": data.val_fraction, "seed": config.seed}


def make_transform(config: SegmentationConfig, table: LabelTable) -> SegmentationTransform:
    data = config.data
    return SegmentationTransform(
        table,
        data.img_size,
        data.short,
        scales=data.scales,
        max_fraction=data.max_class_fraction,
        hflip=data.hflip,
        photometric=data.photometric,
        interpolation=data.interpolation,
        max_pixels=data.max_pixels,
        **augmentation(config),
    )
