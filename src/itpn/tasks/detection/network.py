"""The network of a detector: its head, and how settings and a checkpoint make one."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from itpn.checkpoints.files import Checkpoint
from itpn.errors import UserError
from itpn.models.build import build_pyramid, make_backbone
from itpn.models.detector import DETECTIONS, Detector, FPNBackbone, MaskDetector
from itpn.models.spec import NetworkSpec, Options
from itpn.models.variants import PUBLISHED_PYRAMID, PYRAMIDS
from itpn.system.text import one_line
from itpn.tasks.detection.config import DetectionConfig
from itpn.tasks.detection.data import DetectionData
from itpn.tasks.finetuning.network import (
    ClassesHead,
    backbone_options,
    build_network,
    find_square_network,
    keep_predictor,
    name_classes,
    resolve_with_head,
    scale_epochs,
)
from itpn.tasks.info import Rows, describe_headed


class DetectorHead(ClassesHead):
    """torchvision's Mask R-CNN, or Faster R-CNN.

    Options are arguments of :class:`itpn.models.detector.Detector`; "masks", whether it predicts them; and "fpn_width"
    of one with a feature pyramid network of so many channels in the pyramid's place.
    """

    parts: Mapping[str, str] = {
        "roi_heads.box_predictor.": "predictor of boxes and classes",
        "roi_heads.mask_predictor.mask_fcn_logits.": "predictor of masks",
        "roi_heads.mask_": "mask head",
        "rpn.": "set of detection heads",
        "roi_heads.": "set of detection heads",
    }
    joined = True
    classes = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")
    arguments = (*inspect.signature(Detector).parameters, "masks")
    levels = "pooled"
    purpose = "boxes and masks"
    recipe = "detector_small"

    def build(self, spec: NetworkSpec) -> Detector:
        options: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in spec.options.items()}
        if "num_classes" not in options:
            raise UserError(
                "there is no detector to build: itpn.load with task='detection', num_classes=N and strict=False makes "
                "a random one; N counts the background"
            )
        width = options.pop("fpn_width", None)
        kind = MaskDetector if options.pop("masks", True) else Detector
        backbone = (
            build_pyramid(replace(spec, pyramid=spec.pyramid or {}), self.levels)
            if width is None
            else FPNBackbone(make_backbone(num_classes=0, **spec.backbone), width)
        )
        return kind(backbone, **options)

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        predictor = tensors.get("roi_heads.box_predictor.cls_score.weight")
        if predictor is None:
            return None
        found: dict[str, Any] = {"num_classes": len(predictor), "head_width": predictor.shape[1] // 4}
        found["masks"] = "roi_heads.mask_predictor.mask_fcn_logits.weight" in tensors
        neck = tensors.get("fpn.layer_blocks.0.0.weight")
        return found if neck is None else found | {"fpn_width": len(neck)}

    def complete(self, spec: NetworkSpec) -> NetworkSpec:
        return spec.with_options(num_classes=91)

    def summarize(self, spec: NetworkSpec) -> str:
        return f"a detector of {spec.options['num_classes'] - 1} kinds of objects"

    def adopt(self, preprocessing: Options) -> dict[str, Any]:
        values = {name: tuple(preprocessing.get(name, ())) for name in ("mean", "std")}
        return {f"image_{name}": own * (3 if len(own) == 1 else 1) for name, own in values.items() if own}

    def from_architecture(self, stored: dict[str, Any]) -> dict[str, Any] | None:
        return stored.get("detector")


def resolve(
    config: DetectionConfig, checkpoint: Checkpoint | None, data: DetectionData
) -> tuple[DetectionConfig, Sequence[str]]:
    config, notes = resolve_with_head(config, checkpoint, data.train)
    config, more = resolve_detections(config, data)
    return scale_epochs(config, len(data.train)), [*notes, *more]


def resolve_detections(config: DetectionConfig, data: DetectionData) -> tuple[DetectionConfig, list[str]]:
    """Settings with the objects that the network finds in an image at most, where they leave it to the images; and
    what is remarkable, a sentence each."""
    if config.evaluation.max_detections is not None:
        return config, []
    most, example = data.train.most_objects()
    limit, notes = max(DETECTIONS, most), []
    if limit > DETECTIONS:
        notes.append(
            f"{limit:,} objects are found in an image at most, as many as {one_line(example)} has: "
            "--evaluation.max-detections gives another limit"
        )
    return replace(config, evaluation=replace(config.evaluation, max_detections=limit)), notes


def build_model(
    config: DetectionConfig, data: DetectionData, checkpoint: Checkpoint | None
) -> tuple[Detector, list[str]]:
    return build_detector(config, data.train.classes, data.masks, checkpoint)


def build_detector(
    config: DetectionConfig, classes: tuple[str, ...], masks: bool, checkpoint: Checkpoint | None
) -> tuple[Detector, list[str]]:
    """Build a detector, with a checkpoint's weights where there is one.

    Args:
        config: as :func:`resolve_with_head` returns it.
        masks: predict masks as well.

    Returns:
        The network, and what is not as in the checkpoint, a sentence each.

    Raises:
        UserError: the weights do not fit.
    """
    model, data = config.model, config.data
    options: dict[str, Any] = {
        "num_classes": 1 + len(classes),
        "masks": masks,
        "min_size": data.img_size,
        "max_size": data.longest,
        "image_mean": data.mean,
        "image_std": data.std,
        "interpolation": data.interpolation,
        "head_width": model.head_width,
        "rpn_post_nms_top_n_train": model.rpn_post_nms_top_n_train,
        "rpn_post_nms_top_n_test": max(1, model.rpn_post_nms_top_n_train // 2),
        "box_batch_size_per_image": model.box_batch_size_per_image,
        "box_detections_per_img": config.evaluation.max_detections or DETECTIONS,
    }
    contents = find_square_network(config, checkpoint)
    theirs = contents.heads.get(config.task)
    width = (contents.pyramid or PYRAMIDS.get(model.name or "", PUBLISHED_PYRAMID))["width"]
    if model.neck == "fpn":
        options["fpn_width"] = (theirs or {}).get("fpn_width", width)
    spec = replace(contents.complete(config.task), options=options)
    if model.neck == "fpn":
        spec = replace(spec, pyramid=None)
    spec = spec.with_backbone(**backbone_options(model))
    kept, notes = keep_predictor(checkpoint, classes, None if theirs is None else theirs["num_classes"] - 1)
    unwanted = (*(() if kept else DetectorHead.classes), "fpn." if model.neck == "pyramid" else "pyramid.")
    network, more = build_network(spec, model, contents, checkpoint, unwanted)
    assert isinstance(network, Detector)
    return network, notes + more


def build_recipe(
    config: DetectionConfig, num_classes: int | None = None, checkpoint: Checkpoint | None = None
) -> tuple[nn.Module, list[str]]:
    """The network of a recipe, with classes that have no names but those of the checkpoint.

    Args:
        num_classes: None for the checkpoint's own, or COCO's 80.
    """
    config, _ = resolve_with_head(config, checkpoint)
    theirs = find_square_network(config, checkpoint).heads.get(config.task) or {"num_classes": 81, "masks": True}
    masks = theirs["masks"] if config.model.masks is None else config.model.masks
    limit = config.evaluation.max_detections or theirs.get("box_detections_per_img")
    config = replace(config, evaluation=replace(config.evaluation, max_detections=limit))
    return build_detector(config, name_classes(checkpoint, num_classes or theirs["num_classes"] - 1), masks, checkpoint)


def describe(config: DetectionConfig, checkpoint: Checkpoint | None) -> Rows:
    model = build_recipe(config, None, checkpoint)[0]
    assert isinstance(model, Detector)
    step = model.transform.size_divisible  # as torchvision pads an image whose sides are 3:5
    height, width = (-(-side // step) * step for side in (model.transform.min_size[-1], model.transform.max_size))
    return describe_headed(model, model.num_classes - 1, (height, width))
