"""The images of a detector's run: finding, augmenting, loading."""

from dataclasses import dataclass

from itpn.data.annotations import find_objects
from itpn.data.object_windows import cut_objects
from itpn.data.objects import DetectionImages, DetectionTransform
from itpn.data.readers import draw_images
from itpn.data.samples import NO_LIMIT
from itpn.errors import UserError
from itpn.tasks.data import RunData, find_windows, print_once
from itpn.tasks.detection.config import DetectionConfig
from itpn.tasks.pixels import augmentation


@dataclass(frozen=True)
class DetectionData(RunData):
    """Images with objects.

    Attributes:
        masks: whether masks are learned.
    """

    train: DetectionImages
    val: DetectionImages | None = None
    masks: bool = True


def find_data(config: DetectionConfig) -> DetectionData:
    """The images of a run.

    Raises:
        UserError: none, or masks are wanted of objects that have none.
    """
    data = config.data
    limit = data.max_pixels if data.window_size is None else NO_LIMIT  # windows of larger images are read
    how = data.invalid_annotations, print_once, limit, data.bands, data.axes
    train, val = find_objects(data.root, data.val_root, *how)
    train = train if data.empty_images else train.with_objects()
    if data.label_fraction < 1:
        train = train.take(draw_images(train, data.label_fraction, config.seed))
    masked, others = train.mask_counts
    masks = masked > others if config.model.masks is None else config.model.masks
    if masks and not masked:
        raise UserError(f"the annotations in {data.root} have no masks: give --model.masks False")
    notes = []
    if config.model.masks is None and 0 < masked <= others:
        notes.append(f"masks are not learned, for {others:,} of {masked + others:,} objects have none")
    if masks and others:
        words = f"{others:,} objects without a mask"
        if data.invalid_annotations == "error":
            raise UserError(f"{words} in {data.root}: --model.masks False learns boxes alone")
        notes.append(f"{words} are left out: --model.masks False learns all boxes")
        train, val = train.with_masks(), None if val is None else val.with_masks()
        train = train if data.empty_images else train.with_objects()
    train, more = cut_into_windows(train, config)
    notes += more
    notes += note_lost(train, config, masks)
    if val is None or not len(val.with_objects()):
        what = "images" if val is None else "objects"
        notes.append(f"there are no {what} to evaluate on: give --data.val-root")
        val = None
    return DetectionData(train, val, tuple(notes), masks)


def cut_into_windows(images: DetectionImages, config: DetectionConfig) -> tuple[DetectionImages, list[str]]:
    """The windows that images are cut into where the settings say so, with their objects, and what is remarkable.

    Raises:
        UserError: none has an object.
    """
    data = config.data
    windows, notes = find_windows(config, images.files, images.sizes)
    if windows is None:
        return images, []
    cut = cut_objects(images, windows, data.window_min_visible)
    full = cut.with_objects()
    if not len(full):
        raise UserError(
            f"no window of {data.window_size} px has {data.window_min_visible:.0%} of an object in {data.root}: give "
            "--data.window-size above the size of objects, or a lower --data.window-min-visible"
        )
    if data.empty_images or len(full) == len(cut):
        return cut, list(notes)
    return full, [*notes, f"{len(cut) - len(full):,} windows without objects are left out (--data.empty-images)"]


def note_lost(train: DetectionImages, config: DetectionConfig, masks: bool) -> list[str]:
    """Name the objects that are too small to be trained on at the size of the run.

    Raises:
        UserError: all are.
    """
    lost = make_transform(config, masks).count_lost(train)
    if not lost:
        return []
    total = sum(not known["iscrowd"] for index in range(len(train)) for known in train.objects_of(index))
    words = (
        f"{lost:,} of {total:,} objects in {config.data.root} are under 1 pixel at --data.img-size "
        f"{config.data.img_size}, and are not learned: raise it, or cut the images by a smaller --data.window-size"
    )
    if lost == total:
        raise UserError(words)
    return [words]


def make_transform(config: DetectionConfig, masks: bool) -> DetectionTransform:
    data = config.data
    return DetectionTransform(
        data.img_size,
        data.longest,
        scales=data.scales,
        crop_prob=data.crop_prob,
        large_scale_jitter=data.large_scale_jitter,
        hflip=data.hflip,
        interpolation=data.interpolation,
        masks=masks,
        **augmentation(config),
    )


def describe_data(config: DetectionConfig, data: DetectionData) -> dict[str, str]:
    return {"data": f"{len(data.train.classes)} classes", "size": f"short side up to {config.data.img_size} px"}
