"""A network to be fine-tuned: from a checkpoint of any kind, or from scratch."""

import copy
import dataclasses
from typing import Any

from timm import create_model
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from itpn.checkpoints.architecture import (
    Architecture,
    build,
    complete,
    find_variant,
    read_architecture,
    read_detector,
    read_segmenter,
    same_sizes,
)
from itpn.checkpoints.diagnosis import CLASS_PREDICTORS, fit
from itpn.checkpoints.files import Checkpoint, named_tensors
from itpn.checkpoints.loading import check_sound
from itpn.config import (
    ClassificationConfig,
    ClassifierConfig,
    DetectionConfig,
    FineTuningRun,
    NetworkConfig,
    SegmentationConfig,
    image_size,
)
from itpn.errors import UserError
from itpn.models.detector import Detector
from itpn.models.hivit import HiViT
from itpn.models.segmenter import Segmenter
from itpn.models.variants import BACKBONES, PUBLISHED_PYRAMID, PYRAMIDS

CROP_PCT = 0.875  # of ImageNet since the first networks
NO_NETWORK = (
    "this recipe takes its network from a checkpoint: give one, as --model.checkpoint of `itpn train`, --checkpoint of "
    "`itpn info` or pretrained= of itpn.get_model"
)


def settle(config: FineTuningRun, found: Checkpoint | None) -> None:
    """Fill in what the settings leave to the checkpoint, in place: network, sizes, mean and deviation.

    Raises:
        UserError: the checkpoint is of another network than the settings name, or the images do not fit its patches.
    """
    model, data = config.model, config.data
    preprocessing: dict[str, Any] = {}
    own: dict[str, Any] = {}
    if found is not None:
        own = read_architecture(found, model.num_heads).backbone
        name = find_variant(own)
        if model.name is not None and not same_sizes(BACKBONES.get(model.name, {}), own):
            sizes = f"{own['embed_dim']} channels and {'+'.join(map(str, own['depths']))} blocks"
            hint = f": give --model.name {name}" if name else ", which no model of `itpn list` has: leave it out"
            raise UserError(f"checkpoint {found.source} holds a network of {sizes}, not {model.name}{hint}")
        if model.patch_size not in (None, own["patch_size"]):
            raise UserError(
                f"checkpoint {found.source} has patches of {own['patch_size']} px, not {model.patch_size}: leave out "
                "--model.patch-size"
            )
        model.name, model.patch_size = model.name or name, own["patch_size"]
        preprocessing = found.preprocessing
    elif model.name not in BACKBONES:
        raise UserError(f"no model {model.name!r}; models are {', '.join(BACKBONES)}")
    model.patch_size = model.patch_size or 16
    channels = model.in_chans if isinstance(model, ClassifierConfig) else 3
    for what, usual in {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}.items():
        if getattr(data, what) is None:
            values = tuple(preprocessing.get(what, ()))
            grey = (sum(usual) / 3,)
            setattr(data, what, values if len(values) in (1, channels) else usual if channels == 3 else grey)
    if isinstance(config, ClassificationConfig):
        if config.data.img_size is None:
            size = own.get("img_size", 224)
            height, width = size if isinstance(size, list | tuple) else (size, size)
            config.data.img_size = height if height == width else (height, width)
        config.data.crop_pct = config.data.crop_pct or preprocessing.get("crop_pct", CROP_PCT)
        config.check_sizes()


def build_recipe(
    config: FineTuningRun, num_classes: int | None = None, found: Checkpoint | None = None
) -> tuple[HiViT | Detector | Segmenter, list[str]]:
    """The network of a recipe, which stays as it is, with classes that have no names but those of the checkpoint.

    Args:
        num_classes: None for the checkpoint's own, or ImageNet's 1000, COCO's 80 or ADE20K's 150.

    Returns:
        As of :func:`make_classifier`, :func:`make_detector` and :func:`make_segmenter`.

    Raises:
        UserError: the recipe takes its network from a checkpoint and there is none, or the weights do not fit.
    """
    if config.model.name is None and found is None:
        raise UserError(NO_NETWORK)
    config = copy.deepcopy(config)
    settle(config, found)
    if isinstance(config, SegmentationConfig):
        segmenter = (None if found is None else read_segmenter(found.tensors)) or {"num_classes": 150}
        return make_segmenter(config, name_classes(found, num_classes or segmenter["num_classes"]), found)
    if isinstance(config, DetectionConfig):
        detector = (None if found is None else read_detector(found.tensors)) or {"num_classes": 81, "masks": True}
        masks = detector["masks"] if config.model.masks is None else config.model.masks
        return make_detector(config, name_classes(found, num_classes or detector["num_classes"] - 1), masks, found)
    return make_classifier(config, name_classes(found, num_classes or 1000), found)


def name_classes(found: Checkpoint | None, count: int) -> tuple[str, ...]:
    """The names that a checkpoint has for so many classes, or else numbers."""
    names = [] if found is None else found.metadata.get("classes") or []
    return tuple(names if len(names) == count else map(str, range(count)))


def make_classifier(
    config: ClassificationConfig, classes: tuple[str, ...], found: Checkpoint | None
) -> tuple[HiViT, list[str]]:
    """Build a classifier, with a checkpoint's weights where there is one.

    A classifier of the checkpoint is kept if it names the same classes, or none and as many.

    Args:
        config: as :func:`settle` leaves it.

    Returns:
        The network, and what is not as in the checkpoint, a sentence each.

    Raises:
        UserError: the weights do not fit.
    """
    model = config.model
    options: dict[str, Any] = {
        "img_size": image_size(config.data),
        "in_chans": model.in_chans,
        "num_classes": len(classes),
        "pos_embed": model.pos_embed,
        "drop_path_rate": model.drop_path_rate,
        "drop_rate": model.drop_rate,
    }
    for name in ("rel_pos_bias", "migrate_ratio", "gather_window"):
        if getattr(model, name) is not None:
            options[name] = getattr(model, name)
    if found is None:
        assert model.name is not None
        settings = {**options, "patch_size": model.patch_size, "init_values": model.init_values}
        try:
            network = create_model(model.name, **settings)
        except ValueError as error:
            raise UserError(f"no network can be built with these settings: {error}") from error
        assert isinstance(network, HiViT)
        return network, []
    architecture = read_architecture(found, model.num_heads)
    tensors = dict(found.tensors)
    kept, replaced = replace_names(found, classes, architecture.backbone.get("num_classes"))
    backbone = architecture.backbone if kept else {**architecture.backbone, "fc_norm": True}
    network = build(Architecture(backbone), "classification", **options)
    assert isinstance(network, HiViT)
    if not kept:
        tensors = {
            name: t for name, t in tensors.items() if not name.startswith(("backbone.head.", "backbone.fc_norm."))
        }
    notes = start_from(network, found, tensors, bool(model.rel_pos_bias and not architecture.backbone["rel_pos_bias"]))
    return network, replaced + notes


def start_from(network: nn.Module, found: Checkpoint, tensors: dict[str, Tensor], fresh_tables: bool) -> list[str]:
    """Give a network the tensors of a checkpoint.

    Args:
        tensors: those of the file that are wanted.
        fresh_tables: the network has relative positions, which the file has not: they begin at zero.

    Returns:
        What is not as in the checkpoint, a sentence each.

    Raises:
        UserError: they do not fit.
    """
    if fresh_tables:
        # tables of zeros change nothing, and are then learned
        own = named_tensors(network)
        tensors = tensors | {n: t for n, t in own.items() if n.endswith("relative_position_bias_table")}
    state, findings = fit(dataclasses.replace(found, tensors=tensors), network)
    if problems := [finding.text for finding in findings if finding.kind == "harmful"]:
        raise UserError(f"checkpoint {found.source} cannot be fine-tuned: it {'; it '.join(problems)}")
    check_sound(found)
    network.load_state_dict(state, strict=False)
    unwanted = set(found.tensors) - set(tensors)  # which has been spoken of already
    missing = [f for f in findings if f.kind == "random" and not set(f.names) & unwanted]
    notes = [f"{found.source} {f.text}: it starts fresh" for f in missing]
    return notes + [f"{found.source} {f.text}" for f in findings if f.kind == "converted"]


def replace_names(found: Checkpoint, ours: tuple[str, ...], theirs: int | None) -> tuple[bool, list[str]]:
    """Whether a checkpoint's own predictor can go on, and what to say if not.

    It can if it names the same classes, or none and as many.

    Args:
        theirs: number of its classes; None for a file without a predictor.
    """
    if theirs is None:
        return False, []
    names = found.metadata.get("classes")
    if theirs == len(ours) and (names is None or tuple(names) == ours):
        return True, []
    some = "" if names is None else f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    kinds = f"{theirs} class{'es' * (theirs != 1)}{some}"
    return False, [f"{found.source} names {kinds}, and the images have others: what names them starts fresh"]


def make_detector(
    config: DetectionConfig, classes: tuple[str, ...], masks: bool, found: Checkpoint | None
) -> tuple[Detector, list[str]]:
    """Build a detector, with a checkpoint's weights where there is one.

    Args:
        config: as :func:`settle` leaves it; a width of heads that the checkpoint has is filled in.
        masks: predict masks as well.

    Returns:
        The network, and what is not as in the checkpoint, a sentence each.

    Raises:
        UserError: the weights do not fit.
    """
    model, data = config.model, config.data
    detector: dict[str, Any] = {
        "num_classes": 1 + len(classes),
        "masks": masks,
        "min_size": data.img_size,
        "max_size": data.longest,
        "image_mean": data.mean,
        "image_std": data.std,
        "interpolation": data.interpolation,
        "head_width": model.head_width,
        "rpn_post_nms_top_n_train": model.proposals,
        "rpn_post_nms_top_n_test": max(1, model.proposals // 2),
        "box_batch_size_per_image": model.samples,
    }
    architecture = _find_architecture(config, found)
    theirs = architecture.detector
    notes = []
    if found is not None and theirs is not None and theirs["head_width"] != model.head_width:
        detector["head_width"] = model.head_width = theirs["head_width"]
        notes.append(f"the heads are of {theirs['head_width']} channels, as in {found.source}")
    width = (architecture.pyramid or PYRAMIDS.get(model.name or "", PUBLISHED_PYRAMID))["width"]
    detector |= {"fpn_width": (theirs or {}).get("fpn_width", width)} if model.neck == "fpn" else {}
    whole = complete(dataclasses.replace(architecture, detector=detector), "detection")
    network = build(whole, "detection", **_options(model))
    assert isinstance(network, Detector)
    if found is None:
        return network, []
    kept, replaced = replace_names(found, classes, None if theirs is None else theirs["num_classes"] - 1)
    unwanted = (*(() if kept else CLASS_PREDICTORS), "fpn." if model.neck == "pyramid" else "pyramid.")
    tensors = {name: tensor for name, tensor in found.tensors.items() if not name.startswith(unwanted)}
    fresh_tables = bool(model.rel_pos_bias and not architecture.backbone["rel_pos_bias"])
    return network, notes + replaced + start_from(network, found, tensors, fresh_tables)


def make_segmenter(
    config: SegmentationConfig, classes: tuple[str, ...], found: Checkpoint | None
) -> tuple[Segmenter, list[str]]:
    """Build a segmenter, with a checkpoint's weights where there is one.

    Args:
        config: as :func:`settle` leaves it; a width of heads that the checkpoint has is filled in.

    Returns:
        The network, and what is not as in the checkpoint, a sentence each.

    Raises:
        UserError: the weights do not fit.
    """
    model = config.model
    architecture = _find_architecture(config, found)
    theirs = architecture.segmenter
    segmenter: dict[str, Any] = {
        "num_classes": len(classes),
        "head_width": model.head_width,
        "auxiliary": model.auxiliary_weight > 0,
        "drop_rate": model.head_drop_rate,
    }
    notes = []
    if found is not None and theirs is not None and theirs["head_width"] != model.head_width:
        if model.head_width is not None:
            notes.append(f"the head is of {theirs['head_width']} channels, as in {found.source}")
        segmenter["head_width"] = model.head_width = theirs["head_width"]
    whole = complete(dataclasses.replace(architecture, segmenter=segmenter), "segmentation")
    network = build(whole, "segmentation", **_options(model))
    assert isinstance(network, Segmenter)
    if found is None:
        return network, []
    kept, replaced = replace_names(found, classes, None if theirs is None else theirs["num_classes"])
    unwanted = (*(() if kept else CLASS_PREDICTORS), *(("pyramid.",) if model.neck == "fresh" else ()))
    tensors = {name: tensor for name, tensor in found.tensors.items() if not name.startswith(unwanted)}
    fresh_tables = bool(model.rel_pos_bias and not architecture.backbone["rel_pos_bias"])
    return network, notes + replaced + start_from(network, found, tensors, fresh_tables)


def _find_architecture(config: DetectionConfig | SegmentationConfig, found: Checkpoint | None) -> Architecture:
    """The checkpoint's, or that of the model that the settings name, for images of their size."""
    model = config.model
    if found is not None:
        return read_architecture(found, model.num_heads)
    assert model.name is not None
    assert model.patch_size is not None
    side = max(1, round(config.data.img_size / model.patch_size)) * model.patch_size
    own = {**BACKBONES[model.name], "img_size": side, "patch_size": model.patch_size}
    return Architecture({**own, "init_values": model.init_values})


def _options(model: NetworkConfig) -> dict[str, Any]:
    """Arguments of a backbone that settings ask for."""
    options: dict[str, Any] = {"pos_embed": model.pos_embed, "drop_path_rate": model.drop_path_rate}
    return options | ({} if model.rel_pos_bias is None else {"rel_pos_bias": model.rel_pos_bias})
