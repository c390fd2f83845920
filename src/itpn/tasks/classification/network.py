"""The network of a classifier: its head, and how settings and a checkpoint make one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from itpn.checkpoints.files import Checkpoint
from itpn.errors import UserError
from itpn.models.backbone import CLASSIFIER, Backbone, find_backbone
from itpn.models.build import build_backbone
from itpn.models.spec import NetworkSpec
from itpn.tasks.augmentation import replace_colours
from itpn.tasks.classification.config import ClassificationConfig
from itpn.tasks.classification.data import make_transform
from itpn.tasks.data import RunData
from itpn.tasks.finetuning.network import (
    ClassesHead,
    backbone_options,
    build_network,
    find_network,
    keep_predictor,
    name_classes,
    resolve_network,
    scale_epochs,
)
from itpn.tasks.info import Rows, describe_classifier
from itpn.tasks.pixels import resolve_pixels
from itpn.training.config import image_size

CROP_PCT = 0.875  # of ImageNet since the first networks


class ClassifierHead(ClassesHead):
    """A linear layer on the mean of the last stage."""

    parts: Mapping[str, str] = dict.fromkeys(CLASSIFIER, "classifier")
    classes = CLASSIFIER
    arguments = ("num_classes", "fc_norm")
    pyramid = False
    purpose = "classification"
    recipe = "classifier_small"

    def build(self, spec: NetworkSpec) -> Backbone:
        if not spec.options.get("num_classes"):
            raise UserError(
                "a classifier needs num_classes above 0; task='backbone' gives the network without one"
                if "num_classes" in spec.options
                else "there is no classifier to build: itpn.load with num_classes=N and strict=False makes a random one"
            )
        return build_backbone(spec, **spec.options)

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        head = tensors.get("backbone.head.weight")
        return None if head is None else {"num_classes": len(head), "fc_norm": "backbone.fc_norm.weight" in tensors}

    def complete(self, spec: NetworkSpec) -> NetworkSpec:
        return spec.with_options(num_classes=1000)

    def summarize(self, spec: NetworkSpec) -> str:
        return f"a classifier of {spec.options['num_classes']} classes"

    def from_architecture(self, stored: dict[str, Any]) -> dict[str, Any] | None:
        backbone = stored["backbone"]
        own = {name: backbone[name] for name in self.arguments if name in backbone}
        return own if own.get("num_classes") else None


def resolve(
    config: ClassificationConfig, checkpoint: Checkpoint | None, data: RunData | None = None
) -> tuple[ClassificationConfig, Sequence[str]]:
    """Settings with what they leave to the checkpoint (network, sizes, mean and std) and to the number of images.

    Raises:
        UserError: the checkpoint is of another network than the settings name, or images do not fit its patches.
    """
    notes: list[str] = []
    if data is not None:
        config, notes = resolve_pixels(config, data.train, None if checkpoint is None else checkpoint.preprocessing)
    config = resolve_network(config, checkpoint)
    own = config.data
    if own.img_size is None:
        size: Any = (
            224 if checkpoint is None else find_network(config.model, checkpoint, (224, 224)).backbone["img_size"]
        )
        height, width = size if isinstance(size, list | tuple) else (size, size)
        own = replace(own, img_size=height if height == width else (height, width))
    stored = {} if checkpoint is None else checkpoint.preprocessing
    config = replace(config, data=replace(own, crop_pct=own.crop_pct or stored.get("crop_pct", CROP_PCT)))
    config.check_sizes()
    if data is None:
        return config, notes
    make_transform(replace_colours(config)[0])  # a wrong name of an augmentation is found before a folder is made
    return scale_epochs(config, len(data.train)), notes


def build_model(
    config: ClassificationConfig, data: RunData, checkpoint: Checkpoint | None
) -> tuple[Backbone, list[str]]:
    return build_classifier(config, data.train.classes, checkpoint)


def build_classifier(
    config: ClassificationConfig, classes: tuple[str, ...], checkpoint: Checkpoint | None
) -> tuple[Backbone, list[str]]:
    """Build a classifier, with a checkpoint's weights where there is one; its classifier if it has the same classes.

    Args:
        config: as :func:`resolve` returns it.

    Returns:
        The network, and what is not as in the checkpoint, a sentence each.

    Raises:
        UserError: the weights do not fit.
    """
    model = config.model
    contents = find_network(model, checkpoint, image_size(config.data))
    theirs = contents.heads.get(config.task)
    kept, notes = keep_predictor(checkpoint, classes, None if theirs is None else theirs["num_classes"])
    options = {"num_classes": len(classes), "fc_norm": theirs.get("fc_norm", True) if kept and theirs else True}
    arguments = {"img_size": image_size(config.data), "in_chans": model.in_chans, "drop_rate": model.drop_rate}
    for name in ("migrate_ratio", "gather_window"):
        if getattr(model, name) is not None:
            arguments[name] = getattr(model, name)
    arguments |= backbone_options(model)
    if checkpoint is not None and {**contents.backbone, **arguments}.get("rel_pos_bias"):
        arguments["rel_pos_size"] = None  # the tables follow the images
    spec = NetworkSpec({**contents.backbone, **arguments}, head=config.task, options=options)
    network, more = build_network(spec, model, contents, checkpoint, () if kept else ClassifierHead.classes)
    assert isinstance(network, Backbone)
    return network, notes + more


def build_recipe(
    config: ClassificationConfig, num_classes: int | None = None, checkpoint: Checkpoint | None = None
) -> tuple[nn.Module, list[str]]:
    """The network of a recipe, with classes that have no names but those of the checkpoint.

    Args:
        num_classes: None for the checkpoint's own, or ImageNet's 1000.
    """
    config, _ = resolve(config, checkpoint)
    theirs = find_network(config.model, checkpoint, image_size(config.data)).heads.get(config.task) or {
        "num_classes": 1000
    }
    return build_classifier(config, name_classes(checkpoint, num_classes or theirs["num_classes"]), checkpoint)


def describe(config: ClassificationConfig, checkpoint: Checkpoint | None) -> Rows:
    backbone = find_backbone(build_recipe(config, None, checkpoint)[0])
    return describe_classifier(backbone, f"a classifier of {backbone.num_classes} classes")
