"""The network that tensors belong to, read from their names and shapes."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_type_hints

from timm import create_model
from torch import Tensor, nn

from itpn.checkpoints.files import Checkpoint, named_tensors
from itpn.config import check_type
from itpn.errors import UserError
from itpn.masked.decoder import AuxiliaryHead, Decoder
from itpn.masked.masked_model import MaskedImageModel, Objective
from itpn.models.detector import Detector, FPNBackbone, MaskDetector
from itpn.models.hivit import HiViT
from itpn.models.naming import read_depths
from itpn.models.position import Grid, square
from itpn.models.pyramid import FeaturePyramid, PyramidBackbone
from itpn.models.segmenter import Segmenter
from itpn.models.variants import BACKBONES, PUBLISHED_PYRAMID, PYRAMIDS, WITH_PYRAMID

Task = Literal["pretraining", "segmentation", "detection", "classification", "pyramid", "backbone"]
TASKS: tuple[Task, ...] = ("pretraining", "segmentation", "detection", "classification", "pyramid", "backbone")
# arguments of the networks that are heads on a backbone
HEADS: dict[Task, tuple[str, ...]] = {
    "detection": (*inspect.signature(Detector).parameters, "masks"),
    "segmentation": tuple(inspect.signature(Segmenter).parameters),
}
# what a backbone computes with and no tensor shows
UNSHOWN = ("num_heads", "norm_eps", "migrate_ratio", "migrate_from", "gather_window", "gather_side", "global_pool")


@dataclass
class Architecture:
    """What builds a network.

    Attributes:
        backbone: arguments of :class:`itpn.models.hivit.HiViT`, ``num_classes`` among them where there is a classifier.
        pyramid: arguments of :class:`itpn.models.pyramid.FeaturePyramid`; None where there is none.
        decoder: arguments of :class:`itpn.masked.decoder.Decoder`; None where there is none.
        auxiliary: arguments of :class:`itpn.masked.decoder.AuxiliaryHead`.
        objective: arguments of :class:`itpn.masked.masked_model.Objective`.
        detector: arguments of :class:`itpn.models.detector.Detector`, and whether it has ``masks``; None where there is
            none. One with ``fpn_width`` has a feature pyramid network of so many channels in the pyramid's place.
        segmenter: arguments of :class:`itpn.models.segmenter.Segmenter`; None where there is none.
        levels: the maps that a pyramid gives, see :class:`itpn.models.pyramid.PyramidBackbone`.
        guessed: what the tensors do not say.
    """

    backbone: dict[str, Any]
    pyramid: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None
    auxiliary: dict[str, Any] | None = None
    objective: dict[str, Any] = field(default_factory=dict)
    detector: dict[str, Any] | None = None
    segmenter: dict[str, Any] | None = None
    levels: str = "pyramid"
    guessed: list[str] = field(default_factory=list)

    @property
    def name(self) -> str | None:
        """The registered model with these sizes."""
        return find_variant(self.backbone)

    @property
    def tasks(self) -> list[Task]:
        """What can be built whole, the richest first."""
        whole = {
            "pretraining": self.decoder is not None,
            "segmentation": self.segmenter is not None,
            "detection": self.detector is not None,
            "classification": bool(self.backbone.get("num_classes")),
            "pyramid": self.pyramid is not None,
            "backbone": True,
        }
        return [task for task in TASKS if whole[task]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# names of arguments in older files of ours -> today's names
OLD_KEYS = {
    "fill_hidden": "add_mask_tokens",
    "hidden_units": "masked_patches",
    "hidden_laterals": "masked_laterals",
    "feature_units": "feature_patches",
}


def _rename_old_keys(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture in a file's metadata, with today's names of arguments."""
    renamed = {**stored}
    for part in ("decoder", "auxiliary", "objective"):
        if isinstance(arguments := renamed.get(part), dict):
            renamed[part] = {OLD_KEYS.get(key, key): value for key, value in arguments.items()}
            if renamed[part].get("feature_patches") == "hidden":
                renamed[part]["feature_patches"] = "masked"
    return renamed


def find_variant(backbone: Mapping[str, Any]) -> str | None:
    """The registered model of these widths and depths; of several, one with the same relative positions."""

    found = [name for name, settings in BACKBONES.items() if same_sizes(settings, backbone)]
    biased = bool(backbone.get("rel_pos_bias"))
    return min(found, key=lambda name: BACKBONES[name].get("rel_pos_bias", False) != biased, default=None)


def same_sizes(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether networks have the same widths, depths and kind of blocks."""
    keys = ("embed_dim", "depths", "swiglu", "sub_norm")
    return all(_plain(one.get(key, False)) == _plain(other.get(key, False)) for key in keys)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def read_architecture(
    checkpoint: Checkpoint, num_heads: int | None = None, decoder_heads: int | None = None
) -> Architecture:
    """Read widths, depths, heads and options from a file's tensors, or from the metadata that we wrote.

    Args:
        num_heads: of stage 3; by default those of the relative position table, of the registered model with these
            sizes, or one for each 64 channels.
        decoder_heads: of the decoder; by default one for each 32 channels, as in the published ones.

    Raises:
        UserError: tensors without which the network cannot be told.
    """
    for name, heads in {"num_heads": num_heads, "decoder_heads": decoder_heads}.items():
        check_type(heads, int | None, name)
        if heads is not None and heads < 1:
            raise UserError(f"{name} must be above 0, not {heads}")
    stored = checkpoint.metadata.get("architecture")
    if stored is not None:
        try:
            architecture = Architecture(**_rename_old_keys(stored))
            if num_heads is not None:
                architecture.backbone = {**architecture.backbone, "num_heads": num_heads}
            if decoder_heads is not None and architecture.decoder is not None:
                architecture.decoder = {**architecture.decoder, "num_heads": decoder_heads}
            return architecture
        except TypeError as error:
            raise UserError(
                f"checkpoint {checkpoint.source} has damaged metadata; it may be of a newer itpn"
            ) from error
    try:
        return _read(checkpoint, num_heads, decoder_heads)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"checkpoint {checkpoint.source} is not complete: its architecture cannot be read ({error})"
        ) from error


def _read(checkpoint: Checkpoint, num_heads: int | None, decoder_heads: int | None) -> Architecture:
    tensors = checkpoint.tensors
    config = checkpoint.config
    backbone = read_backbone(tensors, num_heads, checkpoint.grid)
    if config is not None:
        decoder_heads = config.model.decoder_heads if decoder_heads is None else decoder_heads
        names = ("pos_embed", "migrate_ratio", "migrate_from", "gather_window", "gather_side")
        backbone |= {name: getattr(config.model, name) for name in names}
    own = checkpoint.layout == "itpn"
    pyramid = read_pyramid(tensors)
    heads = _heads(tensors)
    whole = bool(heads) and pyramid is not None and "decoder.embeds.0.weight" in tensors
    decoder = _read_decoder(tensors, heads, decoder_heads) if whole else None
    guessed = []
    told = any("rel_pos" in name or "relative_position" in name for name in tensors)
    if num_heads is None and not told and find_variant(backbone) is None:
        guessed.append(f"num_heads={backbone['num_heads']} (64 channels each)")
    if decoder is not None and decoder["depth"] and decoder_heads is None:
        guessed.append(f"decoder_heads={decoder['num_heads']} (32 channels each)")

    if not own and checkpoint.layout != "official_fast":
        backbone["pos_resample"] = "legacy"  # as the public code does
    mmpretrain = checkpoint.layout == "mmpretrain"
    if mmpretrain and pyramid is None:
        backbone["norm_eps"] = 1e-5  # the plain HiViT there
    if checkpoint.layout == "official" and pyramid is not None and decoder is None:
        backbone["norm_eps"] = 1e-5
        guessed.append("norm_eps=1e-5 (as the authors' detectors and segmenters have)")
    auxiliary = None
    if whole and "auxiliary.head.weight" in tensors:
        depth = count_blocks(tensors, r"auxiliary\.blocks\.(\d+)\.")
        auxiliary = {
            "out_dim": len(tensors["auxiliary.head.weight"]),
            "depth": depth,
            "init_values": 0.1 if "auxiliary.blocks.0.ls1.gamma" in tensors else None,
            "block_norm_eps": 1e-6 if own else 1e-5,
        }
    objective: dict[str, Any] = {}
    if decoder is not None:
        if mmpretrain:
            decoder["embed_norm_eps"] = 1e-5
            backbone["pos_embed"] = "fixed"  # never trained there
        weights = dict.fromkeys(heads, 1.0) | ({"auxiliary": 1.0} if auxiliary else {})
        objective = {"weights": weights}
        if not decoder["add_mask_tokens"]:
            objective |= {"mask": "block", "mask_ratio": 75 / 196, "masked_patches": "mask_token"}
            objective |= {"masked_laterals": "pixel" not in heads}
            objective |= {"feature_loss": "cosine"} if mmpretrain else {"feature_patches": "all"}
    levels = _read_levels(checkpoint)
    if arguments := checkpoint.metadata.get("model_args"):
        levels = arguments.get("levels", levels)
        backbone |= {name: arguments[name] for name in inspect.signature(HiViT).parameters if name in arguments}
        guessed = []
    detector, segmenter = read_detector(tensors), read_segmenter(tensors)
    return Architecture(backbone, pyramid, decoder, auxiliary, objective, detector, segmenter, levels, guessed)


def read_backbone(
    tensors: Mapping[str, Tensor], num_heads: int | None = None, grid: Grid | None = None
) -> dict[str, Any]:
    """Arguments of :class:`itpn.models.hivit.HiViT`, from tensors under our names.

    Args:
        grid: rows and columns of all position tables; None for square ones, whose sizes tell.
    """
    patch = tensors["backbone.patch_embed.proj.weight"]
    width = 4 * len(patch)
    depths = read_depths(tensors, "itpn")
    blocks = [f"backbone.stages.{stage}.0" for stage in range(3)]
    products = [tensors[f"{block}.mlp.fc2.weight"] for block in blocks]
    attention = f"{blocks[2]}.attn"
    settings: dict[str, Any] = {
        "patch_size": 4 * patch.shape[-1],
        "in_chans": patch.shape[1],
        "embed_dim": width,
        "depths": depths,
        "mlp_ratios": tuple(product.shape[1] / product.shape[0] for product in products),
        "qkv_bias": "qv" if f"{attention}.q_bias" in tensors else f"{attention}.qkv.bias" in tensors,
        "patch_norm": "backbone.patch_embed.norm.weight" in tensors,
        "merge": "conv" if "backbone.merges.0.reduction.bias" in tensors else "linear",
        "sub_norm": f"{blocks[2]}.mlp.norm.weight" in tensors,
        "swiglu": len(tensors[f"{blocks[2]}.mlp.fc1.weight"]) == 2 * products[2].shape[1],
    }
    unit = settings["patch_size"]
    heads = None
    settings["rel_pos_bias"] = False
    if (table := tensors.get(f"{attention}.relative_position_bias_table")) is not None:
        rows, cols = (2 * grid[0] - 1, 2 * grid[1] - 1) if grid else square(len(table))
        heads = table.shape[1]
        settings |= {"rel_pos_bias": True, "rel_pos_size": ((rows + 1) // 2 * unit, (cols + 1) // 2 * unit)}
    elif (table := tensors.get(f"{attention}.rel_pos_h")) is not None:
        rows, cols = len(table), len(tensors[f"{attention}.rel_pos_w"])
        heads = width // table.shape[1]
        settings |= {"rel_pos_bias": "decomposed", "rel_pos_size": ((rows + 1) // 2 * unit, (cols + 1) // 2 * unit)}
    if grid is None and "backbone.pos_embed" in tensors:
        grid = square(tensors["backbone.pos_embed"].shape[1])
    # a network without a table of positions is one whose table is zero
    settings["img_size"] = (grid[0] * unit, grid[1] * unit) if grid else settings.get("rel_pos_size", (14 * unit,) * 2)
    scaled = tuple(stage + 1 for stage, block in enumerate(blocks) if f"{block}.ls2.gamma" in tensors)
    if scaled:
        settings |= {"init_values": 0.1, "layer_scale_stages": scaled}
    if (head := tensors.get("backbone.head.weight")) is not None:
        settings |= {"num_classes": len(head), "fc_norm": "backbone.fc_norm.weight" in tensors}
    variant = find_variant(settings)
    known = BACKBONES[variant]["num_heads"] if variant else max(width // 64, 1)
    return {**settings, "num_heads": heads or known if num_heads is None else num_heads}


def read_pyramid(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Arguments of :class:`itpn.models.pyramid.FeaturePyramid`; None where there is none."""
    product = tensors.get("pyramid.outputs.0.mlp.fc2.weight")
    if product is None:
        return None
    return {
        "width": product.shape[0],
        "depth": count_blocks(tensors, r"pyramid\.blocks\.0\.(\d+)\."),
        "mlp_ratio": product.shape[1] / product.shape[0],
    }


def read_detector(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Arguments of :class:`itpn.models.detector.Detector`; None where there is none."""
    predictor = tensors.get("roi_heads.box_predictor.cls_score.weight")
    if predictor is None:
        return None
    found: dict[str, Any] = {"num_classes": len(predictor), "head_width": predictor.shape[1] // 4}
    found["masks"] = "roi_heads.mask_predictor.mask_fcn_logits.weight" in tensors
    neck = tensors.get("fpn.layer_blocks.0.0.weight")
    return found if neck is None else found | {"fpn_width": len(neck)}


def read_segmenter(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Arguments of :class:`itpn.models.segmenter.Segmenter`; None where there is none."""
    predictor = tensors.get("classifier.weight")
    if predictor is None or not any(name.startswith("upernet.") for name in tensors):
        return None
    auxiliary = any(name.startswith("aux_classifier.") for name in tensors)
    return {"num_classes": len(predictor), "head_width": predictor.shape[1], "auxiliary": auxiliary}


def _heads(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """What the decoder predicts, and how many numbers a unit."""
    names = [m[1] for name in tensors if (m := re.match(r"decoder\.heads\.(\w+)\.weight", name))]
    return {name: len(tensors[f"decoder.heads.{name}.weight"]) for name in names}


def _read_decoder(tensors: Mapping[str, Tensor], heads: dict[str, int], num_heads: int | None) -> dict[str, Any]:
    width = len(tensors["decoder.norm.weight"])
    return {
        "heads": heads,
        "pyramid_width": len(tensors["decoder.embed_norms.0.weight"]),
        "width": width,
        "depth": count_blocks(tensors, r"decoder\.blocks\.(\d+)\."),
        "num_heads": max(width // 32, 1) if num_heads is None else num_heads,
        "add_mask_tokens": "decoder.mask_token" in tensors,
    }


def known_heads(checkpoint: Checkpoint) -> int | None:
    """Attention heads of stage 3 where a file says so; None where shapes alone are there."""
    config = checkpoint.config
    if config is not None and config.model.name in BACKBONES:
        return BACKBONES[config.model.name]["num_heads"]
    if "architecture" in checkpoint.metadata:
        architecture = read_architecture(checkpoint)
        return None if architecture.guessed else architecture.backbone["num_heads"]
    table = checkpoint.tensors.get("backbone.stages.2.0.attn.relative_position_bias_table")
    return None if table is None else table.shape[1]


def count_blocks(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """Blocks of a list."""
    return len({m[1] for name in tensors if (m := re.match(pattern, name))})


def _read_levels(checkpoint: Checkpoint) -> str:
    """A detector or segmenter is known by the heads beside the backbone."""
    others = checkpoint.others
    if any(name.startswith(("decode_head.", "auxiliary_head.")) for name in others):
        return "segmentation"
    if any(name.startswith(("rpn_head.", "roi_head.", "bbox_head.", "mask_head.")) for name in others):
        return "detection"
    return "pyramid"


def describe_classifier(model: HiViT) -> Architecture:
    """What builds a network that is at hand."""
    tensors = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    unshown = {name: getattr(model, name) for name in (*UNSHOWN, "pos_resample")}
    return Architecture(read_backbone(tensors, model.num_heads, model.grid_size) | unshown)


def describe_detector(model: Detector) -> Architecture:
    """What builds a detector that is at hand, and what it was given."""
    tensors = named_tensors(model)
    backbone = model.backbone
    resize, heads, rpn = model.transform, model.roi_heads, model.rpn
    detector = read_detector(tensors)
    assert detector is not None
    detector |= {
        "min_size": list(resize.min_size),
        "max_size": resize.max_size,
        "image_mean": list(resize.image_mean),
        "image_std": list(resize.image_std),
        "interpolation": resize.interpolation,
        "box_loss_weight": heads.box_loss_weight,
        "rpn_post_nms_top_n_train": rpn._post_nms_top_n["training"],
        "rpn_post_nms_top_n_test": rpn._post_nms_top_n["testing"],
        "box_batch_size_per_image": heads.fg_bg_sampler.batch_size_per_image,
        "box_score_thresh": heads.score_thresh,
        "box_nms_thresh": heads.nms_thresh,
        "box_detections_per_img": heads.detections_per_img,
    }
    trunk = describe_classifier(backbone.backbone).backbone
    return Architecture(trunk, read_pyramid(tensors), detector=detector, levels="detection")


def describe_segmenter(model: Segmenter) -> Architecture:
    """What builds a segmenter that is at hand."""
    tensors = named_tensors(model)
    trunk = describe_classifier(model.backbone.backbone).backbone
    segmenter = {**(read_segmenter(tensors) or {}), "drop_rate": model.dropout.p}
    return Architecture(trunk, read_pyramid(tensors), segmenter=segmenter, levels="segmentation")


def complete(architecture: Architecture, task: Task) -> Architecture:
    """The network of a task with what the file lacks as published: what it would have to start fresh."""
    backbone, pyramid, decoder = architecture.backbone, architecture.pyramid, architecture.decoder
    if task == "classification" and not backbone.get("num_classes"):
        backbone = {**backbone, "num_classes": 1000}
    detector = architecture.detector
    if task == "detection" and detector is None:
        detector = {"num_classes": 91}
    segmenter = architecture.segmenter
    if task == "segmentation" and segmenter is None:
        segmenter = {"num_classes": 150}
    fpn = "fpn_width" in (detector or {})
    if (
        task in ("pretraining", "pyramid", "detection", "segmentation")
        and pyramid is None
        and not (task == "detection" and fpn)
    ):
        pyramid = dict(PYRAMIDS.get(architecture.name or "", PUBLISHED_PYRAMID))
    objective = architecture.objective
    if task == "pretraining" and decoder is None:
        assert pyramid is not None
        decoder, objective = {"heads": {"pixel": 0}, "pyramid_width": pyramid["width"]}, {}
    return replace(
        architecture,
        backbone=backbone,
        pyramid=pyramid,
        decoder=decoder,
        objective=objective,
        detector=detector,
        segmenter=segmenter,
    )


def build(architecture: Architecture, task: Task, **overrides: Any) -> nn.Module:
    """Build a network for a task, freshly initialised.

    Args:
        overrides: arguments of the backbone that are to differ, and ``levels``, ``pyramid_width``, ``pyramid_depth``.

    Raises:
        UserError: the architecture lacks what the task needs, or the overrides do not fit.
    """
    hints = {**get_type_hints(PyramidBackbone.__init__), **get_type_hints(HiViT.__init__)}
    for name, value in overrides.items():
        if name in hints:
            check_type(tuple(value) if isinstance(value, list) else value, hints[name], name)
    own = HEADS.get(task, ())
    heads = {name: overrides.pop(name) for name in own if name in overrides}
    heads = {**((architecture.segmenter if task == "segmentation" else architecture.detector) or {}), **heads}
    kwargs = {**architecture.backbone, **overrides}
    for size in ("img_size", "rel_pos_size"):
        if isinstance(kwargs.get(size), list):  # of JSON
            kwargs[size] = tuple(kwargs[size])
    if "img_size" in overrides and "rel_pos_size" not in overrides and kwargs.get("rel_pos_bias"):
        kwargs["rel_pos_size"] = None  # the tables follow
    classes = kwargs.pop("num_classes", 0)
    if task not in ("classification", "backbone") and "global_pool" not in overrides:
        kwargs.pop("global_pool", None)  # of the file's classifier
    try:
        if task == "pretraining":
            return _build_masked(architecture, kwargs)
        if task == "pyramid":
            return _build_pyramid(architecture, {"levels": architecture.levels, **kwargs})
        if task == "detection":
            return _build_detector(architecture, heads, kwargs)
        if task == "segmentation":
            return _build_segmenter(architecture, heads, kwargs)
        if task == "classification" and not classes:
            raise UserError(
                "a classifier needs num_classes above 0; task='backbone' gives the network without one"
                if "num_classes" in overrides
                else "there is no classifier to build: itpn.load with num_classes=N and strict=False starts a fresh one"
            )
        kwargs["num_classes"] = classes if task == "classification" else 0
        return _make(HiViT, {name: name for name in BACKBONES}, kwargs)
    # an argument of no such name, or sizes that do not fit one another
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).rpartition("__init__() ")[2]
        raise UserError(f"no {task} network can be built with these settings: {reason}") from error


def _build_pyramid(architecture: Architecture, kwargs: dict[str, Any]) -> nn.Module:
    own = architecture.pyramid or {}
    settings = {f"pyramid_{name}" if name != "mlp_ratio" else name: value for name, value in own.items()}
    return _make(PyramidBackbone, WITH_PYRAMID, {**settings, **kwargs})


def _build_detector(architecture: Architecture, settings: dict[str, Any], kwargs: dict[str, Any]) -> Detector:
    if "num_classes" not in settings:
        raise UserError(
            "there is no detector to build: itpn.load with task='detection', num_classes=N and strict=False starts a "
            "fresh one; N counts the background"
        )
    width = settings.pop("fpn_width", None)
    backbone = (
        _build_pyramid(architecture, {**kwargs, "levels": "detection"})
        if width is None
        else FPNBackbone(width, **kwargs)
    )
    kind = MaskDetector if settings.pop("masks", True) else Detector
    return kind(backbone, **settings)  # type: ignore[arg-type]  # timm builds Modules


def _build_segmenter(architecture: Architecture, settings: dict[str, Any], kwargs: dict[str, Any]) -> Segmenter:
    if "num_classes" not in settings:
        raise UserError(
            "there is no segmenter to build: itpn.load with task='segmentation', num_classes=N and strict=False starts "
            "a fresh one"
        )
    backbone = _build_pyramid(architecture, {**kwargs, "levels": "segmentation"})
    assert isinstance(backbone, PyramidBackbone)
    return Segmenter(backbone, **settings)


def _make(kind: type[nn.Module], names: Mapping[str, str], kwargs: dict[str, Any]) -> nn.Module:
    """Through timm where it knows the network, whose settings it then carries."""
    variant = find_variant(kwargs)
    return create_model(names[variant], **kwargs) if variant is not None and variant in names else kind(**kwargs)


def _build_masked(architecture: Architecture, kwargs: dict[str, Any]) -> MaskedImageModel:
    if architecture.pyramid is None or architecture.decoder is None:
        raise UserError(
            "no pre-training network can be built: there is no decoder; `itpn train RECIPE --model.checkpoint FILE` "
            "starts from the weights with a fresh one"
        )
    backbone = HiViT(num_classes=0, **kwargs)
    dims = tuple(info["num_chs"] for info in backbone.feature_info)
    heads = dict(architecture.decoder["heads"])
    if "pixel" in heads:
        heads["pixel"] = backbone.patch_embed.proj.in_channels * backbone.patch_size**2
    return MaskedImageModel(
        backbone,
        FeaturePyramid(dims, norm_eps=backbone.norm_eps, **architecture.pyramid),
        Decoder(backbone.grid_size, **{**architecture.decoder, "heads": heads}),
        Objective(**architecture.objective),
        AuxiliaryHead(backbone, **architecture.auxiliary) if architecture.auxiliary else None,
    )
