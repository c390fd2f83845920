"""The network of a segmenter: its head, and how settings and a checkpoint make one."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from itpn.checkpoints.files import Checkpoint
from itpn.errors import UserError
from itpn.models.build import build_pyramid
from itpn.models.segmenter import Segmenter
from itpn.models.spec import NetworkSpec
from itpn.tasks.data import RunData
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
from itpn.tasks.segmentation.config import SegmentationConfig
from itpn.training.launch import choose_devices, read_launch


class SegmenterHead(ClassesHead):
    """UPerNet; options are arguments of :class:`itpn.models.segmenter.Segmenter`."""

    parts: Mapping[str, str] = {
        "classifier.": "predictor of pixels' classes",
        "aux_classifier.4.": "auxiliary predictor of pixels' classes",
        "aux_classifier.": "auxiliary segmentation head",
        "upernet.": "segmentation head",
    }
    joined = True
    classes = ("classifier.", "aux_classifier.4.")
    arguments = tuple(inspect.signature(Segmenter).parameters)
    levels = "joined"
    purpose = "classes of pixels"
    recipe = "segmenter_small"

    def build(self, spec: NetworkSpec) -> Segmenter:
        if "num_classes" not in spec.options:
            raise UserError(
                "there is no segmenter to build: itpn.load with task='segmentation', num_classes=N and strict=False "
                "makes a random one"
            )
        return Segmenter(build_pyramid(replace(spec, pyramid=spec.pyramid or {}), self.levels), **spec.options)

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        predictor = tensors.get("classifier.weight")
        if predictor is None or not any(name.startswith("upernet.") for name in tensors):
            return None
        auxiliary = any(name.startswith("aux_classifier.") for name in tensors)
        return {"num_classes": len(predictor), "head_width": predictor.shape[1], "auxiliary": auxiliary}

    def complete(self, spec: NetworkSpec) -> NetworkSpec:
        return spec.with_options(num_classes=150)

    def summarize(self, spec: NetworkSpec) -> str:
        return f"a segmenter of {spec.options['num_classes']} classes of pixels"

    def from_architecture(self, stored: dict[str, Any]) -> dict[str, Any] | None:
        return stored.get("segmenter")


def resolve(
    config: SegmentationConfig, checkpoint: Checkpoint | None, data: RunData
) -> tuple[SegmentationConfig, Sequence[str]]:
    processes = choose_devices(config.trainer, read_launch()).processes
    if min(config.data.batch_size * processes, len(data.train)) == 1:
        raise UserError(
            "batch norm needs two images at a time: give "
            + ("--data.batch-size 2 or more" if len(data.train) > 1 else f"more images than one in {config.data.root}")
        )
    config, notes = resolve_with_head(config, checkpoint, data.train)
    return scale_epochs(config, len(data.train), processes), notes


def build_model(
    config: SegmentationConfig, data: RunData, checkpoint: Checkpoint | None
) -> tuple[Segmenter, list[str]]:
    return build_segmenter(config, data.train.classes, checkpoint)


def build_segmenter(
    config: SegmentationConfig, classes: tuple[str, ...], checkpoint: Checkpoint | None
) -> tuple[Segmenter, list[str]]:
    """Build a segmenter, with a checkpoint's weights where there is one.

    Args:
        config: as :func:`resolve_with_head` returns it.

    Returns:
        The network, and what is not as in the checkpoint, a sentence each.

    Raises:
        UserError: the weights do not fit.
    """
    model = config.model
    contents = find_square_network(config, checkpoint)
    theirs = contents.heads.get(config.task)
    options: dict[str, Any] = {
        "num_classes": len(classes),
        "head_width": model.head_width,
        "auxiliary": model.auxiliary_weight > 0,
        "drop_rate": model.head_drop_rate,
    }
    spec = replace(contents.complete(config.task), options=options).with_backbone(**backbone_options(model))
    kept, notes = keep_predictor(checkpoint, classes, None if theirs is None else theirs["num_classes"])
    unwanted = (*(() if kept else SegmenterHead.classes), *(("pyramid.",) if model.neck == "random" else ()))
    network, more = build_network(spec, model, contents, checkpoint, unwanted)
    assert isinstance(network, Segmenter)
    return network, notes + more


def build_recipe(
    config: SegmentationConfig, num_classes: int | None = None, checkpoint: Checkpoint | None = None
) -> tuple[nn.Module, list[str]]:
    """The network of a recipe, with classes that have no names but those of the checkpoint.

    Args:
        num_classes: None for the checkpoint's own, or ADE20K's 150.
    """
    config, _ = resolve_with_head(config, checkpoint)
    theirs = find_square_network(config, checkpoint).heads.get(config.task) or {"num_classes": 150}
    return build_segmenter(config, name_classes(checkpoint, num_classes or theirs["num_classes"]), checkpoint)


def describe(config: SegmentationConfig, checkpoint: Checkpoint | None) -> Rows:
    model = build_recipe(config, None, checkpoint)[0]
    assert isinstance(model, Segmenter)
    step = model.backbone.backbone.patch_size
    side = -(-config.data.img_size // step) * step
    return describe_headed(model, model.num_classes, (side, side))
