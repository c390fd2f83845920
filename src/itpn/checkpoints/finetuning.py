"""A classifier to be trained: from a checkpoint of any kind, or from scratch."""

import copy
import dataclasses
from typing import Any

from timm import create_model
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from itpn.checkpoints.architecture import Architecture, build, find_variant, read_architecture, same_sizes
from itpn.checkpoints.diagnosis import fit
from itpn.checkpoints.files import Checkpoint
from itpn.checkpoints.loading import describe_broken
from itpn.config import ClassificationConfig, image_size
from itpn.errors import UserError
from itpn.models.hivit import HiViT
from itpn.models.variants import BACKBONES

CROP_PCT = 0.875  # of ImageNet since the first networks


def settle(config: ClassificationConfig, found: Checkpoint | None) -> None:
    """Fill in what the settings leave to the checkpoint, in place: sizes, mean and deviation.

    Raises:
        UserError: the checkpoint is of another network than the settings name, or the images do not fit its patches.
    """
    model, data = config.model, config.data
    preprocessing: dict[str, Any] = {}
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
        height, width = own["img_size"] if isinstance(own["img_size"], list | tuple) else 2 * (own["img_size"],)
        if data.img_size is None:
            data.img_size = height if height == width else (height, width)
        preprocessing = found.preprocessing
    elif model.name not in BACKBONES:
        raise UserError(f"no model {model.name!r}; models are {', '.join(BACKBONES)}")
    model.patch_size = model.patch_size or 16
    data.img_size = data.img_size or 224
    colour = model.in_chans == 3
    for what, usual in {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}.items():
        if getattr(data, what) is None:
            values = tuple(preprocessing.get(what, ()))
            grey = (sum(usual) / 3,)
            setattr(data, what, values if len(values) in (1, model.in_chans) else usual if colour else grey)
    data.crop_pct = data.crop_pct or preprocessing.get("crop_pct", CROP_PCT)
    config.check_sizes()


def build_classifier(
    config: ClassificationConfig, num_classes: int = 1000, found: Checkpoint | None = None
) -> tuple[HiViT, list[str]]:
    """:func:`make_classifier` of a recipe, which stays as it is, with classes that have no names.

    Raises:
        UserError: the recipe takes its network from a checkpoint and there is none, or the weights do not fit.
    """
    if config.model.name is None and found is None:
        raise UserError("this recipe takes its network from --model.checkpoint: see `itpn inspect CHECKPOINT`")
    config = copy.deepcopy(config)
    settle(config, found)
    classes = [] if found is None else found.metadata.get("classes") or []
    if len(classes) != num_classes:
        classes = [str(number) for number in range(num_classes)]
    return make_classifier(config, tuple(classes), found)


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
    names = found.metadata.get("classes")
    kept = architecture.backbone.get("num_classes") == len(classes) and (names is None or tuple(names) == classes)
    backbone = architecture.backbone if kept else {**architecture.backbone, "fc_norm": True}
    network = build(Architecture(backbone), "classification", **options)
    assert isinstance(network, HiViT)
    if not kept:
        tensors = {
            name: t for name, t in tensors.items() if not name.startswith(("backbone.head.", "backbone.fc_norm."))
        }
    if model.rel_pos_bias and not architecture.backbone.get("rel_pos_bias"):
        # tables of zeros change nothing, and are then learned
        own = network.state_dict()
        tensors |= {f"backbone.{n}": own[n] for n in own if n.endswith("relative_position_bias_table")}
    state, findings = fit(dataclasses.replace(found, tensors=tensors), network)
    if problems := [finding.text for finding in findings if finding.kind == "harmful"]:
        raise UserError(f"checkpoint {found.source} cannot be fine-tuned: it {'; it '.join(problems)}")
    if found.broken:
        raise UserError(f"checkpoint {found.source} has {describe_broken(found.broken)}")
    network.load_state_dict(state, strict=False)
    notes = [f"{found.source} {f.text}: it starts fresh" for f in findings if f.kind == "random"]
    return network, notes + [f"{found.source} {f.text}" for f in findings if f.kind == "converted"]
