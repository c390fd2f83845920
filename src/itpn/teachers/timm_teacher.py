"""Frozen teachers: networks of timm whose feature of each unit is predicted.

A teacher sees an image of such a size that it makes just one feature a unit: a ViT of patch size 14 gets 196 px for the
14x14 units that the student sees in 224 px, a network of total stride 32 gets 448 px. Its features are

- of a CLIP tower: final norm and projection to the space shared with text, of all patch tokens (CLIP ResNets pool by
  attention before they project, MobileCLIP's FastViTs have a convolution between: theirs is the unprojected last map,
  as of any other hierarchical network);
- of other ViTs: the patch tokens after the final norm;
- of hierarchical networks: the last map after the final norm, where there is one.
"""

import contextlib
import difflib
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import timm
import torch
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from itpn.checkpoints.io import FILE_FORMS, check_hub, describe_mismatch, one_line, quiet_timm, read_tensors
from itpn.errors import UserError
from itpn.models.position import Grid
from itpn.models.variants import WITH_PYRAMID

T = TypeVar("T")

CLIP_BASE = "vit_base_patch16_clip_quickgelu_224.openai"  # what the name `clip` builds on
# where the files of CLIP models keep the last linear layer of the projection, output width first but for OpenAI's
CLIP_PROJECTIONS = (
    "visual.head.proj.weight",
    "visual.head.mlp.fc2.weight",
    "visual.head.weight",
    "visual.trunk.head.weight",
    "visual.trunk.head.fc.weight",
)


class FeatureTower(nn.Module):
    """A timm model without pooling and classifier: normalised images [B, 3, h, w] -> features [B, rows, cols, D].

    Args:
        model: the whole timm model; what is of no use is taken out of it.
        projected: apply the linear layers of the head too, where they do not follow a pooling by attention.
    """

    def __init__(self, model: Any, projected: bool) -> None:
        super().__init__()
        head = getattr(model, "head", None)
        # a final norm that timm has behind the pooling; where it is in front, forward_intermediates applies it
        channels = model.feature_info[-1]["num_chs"]
        behind = [getattr(model, "fc_norm", None), getattr(head, "norm", None)]
        self.norm = next((norm for norm in behind if _is_norm(norm, channels)), None) or nn.Identity()
        self.projection = _projection(model) if projected else nn.Identity()
        self.norm_in_model = True  # False for models that refuse to
        # the classifier goes, so that it takes no memory and does not count
        unused = {"fc_norm", "attn_pool"} | {name.split(".")[0] for name in _classifiers(model.pretrained_cfg)}
        for name in unused & dict(model.named_children()).keys():
            setattr(model, name, nn.Identity())
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        maps = self.model.forward_intermediates(images, indices=1, norm=self.norm_in_model, intermediates_only=True)
        x = maps[-1]  # [B, C, rows, cols]
        on_maps = type(self.norm).__name__.endswith("2d")  # as timm names norms of [B, C, rows, cols]
        x = self.norm(x).permute(0, 2, 3, 1) if on_maps else self.norm(x.permute(0, 2, 3, 1))
        return self.projection(x)


class FeatureTeacher(nn.Module):
    """A frozen timm model: images to one feature vector a unit.

    Args:
        name: as the user gave it.
        tower: its network.
        grid: rows and columns of units.
        img_size: height and width in pixels of the images it wants.
        width: numbers D of a feature.
        mean, std: normalisation of its images in [0, 1], three numbers each.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        tower: FeatureTower,
        grid: Grid,
        img_size: tuple[int, int],
        width: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.name = name
        self.tower = tower
        self.grid = grid
        self.img_size = img_size
        self.width = width
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "FeatureTeacher":
        """Stay in eval mode, whatever the module around says."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features of all units, row-major.

        Args:
            images: uint8 [B, 3, h, w], or float in [0, 1], of ``img_size``.

        Returns:
            float32 [B, N, D].

        Raises:
            ValueError: the images are of another size.
        """
        if tuple(images.shape[-2:]) != self.img_size:
            raise ValueError(f"the teacher wants images of {self.img_size} px, not {tuple(images.shape[-2:])}")
        x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return self.tower((x - self.mean) / self.std).flatten(1, 2).float()


def build_teacher(name: str, checkpoint: str | None, grid: Grid) -> FeatureTeacher:
    """Build a teacher with its weights.

    Args:
        name: a timm model, with or without the tag of its weights; or ``clip``, a CLIP ViT of OpenAI's kind (heads of
            64 channels, quick-GELU) whose sizes are read from ``checkpoint``.
        checkpoint: its weights; None fetches them from timm's hub.
        grid: rows and columns of units that the student sees.

    Raises:
        UserError: no such model or file; the file is of another model; nothing to fetch; or no image size for which
            the model makes just one feature a unit.
    """
    plan = _plan(name, checkpoint)
    img_size, features = _ask(plan, None, lambda tower, image: _fit(tower, image, grid))
    if features is None:
        features = _ask(plan, img_size, _features)
    if (features.rows, features.cols) != grid:
        raise UserError(
            f"teacher {name} makes {features.rows}x{features.cols} features of an image of {img_size[0]}x{img_size[1]} "
            f"px, so it cannot give one to each of the {grid[0]}x{grid[1]} units: choose another --teacher.name or "
            "--data.img-size"
        )
    model = _load(plan, img_size) if plan.state else _fetch(plan, img_size)
    cfg = model.pretrained_cfg
    if any("QuickGELU" in note for note in cfg.get("notes") or ()) and "quickgelu" not in plan.architecture:
        native = plan.architecture.replace("_clip_", "_clip_quickgelu_")
        warnings.warn(f"{name} was trained with QuickGELU: {native} gives the features it learned", stacklevel=2)
    tower = FeatureTower(model, plan.projected)
    tower.norm_in_model = features.norm_in_model
    return FeatureTeacher(name, tower, grid, img_size, features.width, tuple(cfg["mean"]), tuple(cfg["std"]))


def teacher_width(name: str, checkpoint: str | None) -> int:
    """Numbers D of a feature of this teacher, without building it; nothing is fetched, a given file is read.

    Raises:
        UserError: no such model or file, or the file is no checkpoint.
    """
    return _ask(_plan(name, checkpoint), None, _features).width


def count_teacher_parameters(name: str, checkpoint: str | None) -> int:
    """Parameters of the image tower with its projection, without building it; nothing is fetched.

    Raises:
        UserError: no such model or file, or the file is no checkpoint.
    """
    return _ask(_plan(name, checkpoint), None, lambda tower, images: sum(p.numel() for p in tower.parameters()))


# --- which model


@dataclass
class _Plan:
    """What to ask of timm."""

    name: str  # as the user gave it
    architecture: str  # timm's name, with the tag of the weights where it was given
    projected: bool
    options: dict[str, Any] = field(default_factory=dict)
    overlay: dict[str, Any] = field(default_factory=dict)  # of the model's pretrained_cfg
    checkpoint: str | None = None
    state: dict[str, Tensor] = field(default_factory=dict)  # of the file, {} where weights are fetched


def _plan(name: str, checkpoint: str | None) -> _Plan:
    if name == "clip" and checkpoint is None:
        raise UserError(f"teacher clip is read from a file: give --teacher.checkpoint FILE, {FILE_FORMS}")
    if name != "clip":
        _check_name(name)
    if checkpoint is None:
        return _Plan(name, name, projected=_is_clip(name) and not _is_fine_tuned(name))
    state = read_tensors(checkpoint)
    if name == "clip":
        return _clip_plan(checkpoint, state)

    cfg = get_pretrained_cfg(name)
    classifiers = _classifiers(cfg.to_dict() if cfg else {})
    tagged = "." in name
    overlay: dict[str, Any] = {}
    outputs = [state[key].shape[0] for key in CLIP_PROJECTIONS if key in state]
    if "visual.proj" in state:
        outputs = [state["visual.proj"].shape[1]]
    projected = bool(outputs)
    by_attention = any("attn_pool" in key for key in state)
    if projected and not by_attention and not tagged and (_is_fine_tuned(name) or not _is_clip(name)):
        # timm's default weights of that name are classifiers; of CLIP models most have OpenAI's preprocessing
        overlay = {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD}
    if not outputs:  # timm form, or another that timm converts
        heads = [head for head in (*classifiers, "head", "head.fc", "fc") if f"{head}.weight" in state]
        outputs = [state[f"{head}.weight"].shape[0] for head in heads[:1]]
        # timm gives a CLIP projection a bias of zeros; a classifier, which a name without tag may mean, has another
        biases = [state[f"{head}.bias"] for head in heads[:1] if f"{head}.bias" in state]
        zeros = not any(bias.any() for bias in biases)
        projected = bool(heads) and _is_clip(name) and (not _is_fine_tuned(name) if tagged else zeros)
    return _Plan(name, name, projected, {"num_classes": outputs[0] if outputs else 0}, overlay, checkpoint, state)


def _clip_plan(checkpoint: str, state: dict[str, Tensor]) -> _Plan:
    """Read the sizes of a CLIP ViT from the shapes of a file in OpenAI's form."""
    dims = {
        "visual.class_embedding": 1,
        "visual.conv1.weight": 4,
        "visual.positional_embedding": 2,
        "visual.proj": 2,
        "visual.transformer.resblocks.0.mlp.c_fc.weight": 2,
    }
    for key, ndim in dims.items():
        if key not in state or state[key].ndim != ndim:
            raise UserError(
                f"teacher checkpoint {checkpoint} is no CLIP ViT in OpenAI's form (no {key} of {ndim} dimensions in "
                "it): give the timm name of the model in the file to --teacher.name"
            )
    width, _, patch, _ = state["visual.conv1.weight"].shape
    positions = state["visual.positional_embedding"].shape[0]
    hidden = state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    if width > 1024:
        raise UserError(
            f"teacher checkpoint {checkpoint} is a CLIP ViT of width {width}, wider than OpenAI's: its number of heads "
            "is not in the file, so give its timm name, such as vit_huge_patch14_clip_224, to --teacher.name"
        )
    blocks = {key.split(".")[3] for key in state if key.startswith("visual.transformer.resblocks.")}
    side = round((positions - 1) ** 0.5) * patch
    options = {
        "embed_dim": width,
        "depth": len(blocks),
        "num_heads": max(1, width // 64),
        "patch_size": patch,
        "mlp_ratio": (hidden + 0.5) / width,  # timm multiplies and rounds down
        "num_classes": state["visual.proj"].shape[1],
    }
    return _Plan("clip", CLIP_BASE, True, options, {"input_size": (3, side, side)}, checkpoint, state)


def _check_name(name: str) -> None:
    models = [*timm.list_models(), *WITH_PYRAMID.values()]  # ours that timm creates and does not list
    architecture = name.partition(".")[0]
    if architecture in models:
        with contextlib.suppress(RuntimeError):  # timm's word for a tag that it does not know
            get_pretrained_cfg(name)
            return
    known = timm.list_pretrained(f"{architecture}.*") if architecture in models else models + timm.list_pretrained()
    # names of the hub have owners in front: hf-hub:timm/NAME
    nearest = difflib.get_close_matches(re.split("[:/]", name)[-1], known, n=3) or known[:3]
    raise UserError(
        f"timm has no model {name}; near it are {', '.join(nearest)}; `clip` reads any CLIP ViT from a file"
    )


def _is_clip(name: str) -> bool:
    return "clip" in f"{name}.{_tag(name)}"


def _is_fine_tuned(name: str) -> bool:
    """Did a classifier take the place of the projection: laion2b_ft_in1k; but laion2b_ft_320 is CLIP still."""
    return "_ft_in" in _tag(name)


def _tag(name: str) -> str:
    cfg = get_pretrained_cfg(name)
    return cfg.tag or "" if cfg else ""


def _classifiers(cfg: dict[str, Any]) -> tuple[str, ...]:
    names = cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _is_norm(module: Any, channels: int) -> bool:
    """Is this a norm of so many channels; a hidden layer of the head may have one of its own width."""
    weight = getattr(module, "weight", None)
    is_module = isinstance(module, nn.Module) and not isinstance(module, nn.Identity)
    return is_module and (weight is None or len(weight) == channels)


def _projection(model: Any) -> nn.Module:
    """The linear layers of a CLIP head, or an identity where they do not take the features of the last map."""
    head = getattr(model, "head", None)
    layers = [head] if isinstance(head, nn.Linear) else [getattr(head, "pre_logits", None), getattr(head, "fc", None)]
    projection = nn.Sequential(*(layer for layer in layers if isinstance(layer, nn.Module)))
    linear = [layer for layer in projection.modules() if isinstance(layer, nn.Linear)]
    # after a pooling by attention (CLIP ResNets, SigLIP), or after one more convolution (MobileCLIP's FastViT)
    elsewhere = isinstance(getattr(model, "attn_pool", None), nn.Module) or (
        bool(linear) and linear[0].in_features != model.feature_info[-1]["num_chs"]
    )
    return projection if linear and not elsewhere else nn.Identity()


# --- its sizes


def _ask(plan: _Plan, img_size: tuple[int, int] | None, question: Callable[[FeatureTower, Tensor], T]) -> T:
    """Build a tower without weights nor memory, for images of its own size or another one, and ask it something.

    Args:
        question: is given the tower and an image [1, 3, h, w].
    """
    for device in ("meta", "cpu"):  # cpu: some models, many in timm 1.0.15, read numbers off tensors
        try:
            with torch.device(device):
                model = _create(plan, img_size).eval()
                image = torch.zeros(1, 3, *(img_size or model.pretrained_cfg["input_size"][-2:]))
                return question(FeatureTower(model, plan.projected), image)
        except Exception as error:  # a network may do anything with a size that does not suit it
            reason = one_line(error)
    what = f"an image of {img_size[0]}x{img_size[1]} px" if img_size else "an image"
    raise UserError(f"teacher {plan.name} cannot make a map of {what} ({reason}): choose another --teacher.name")


@dataclass
class _Features:
    rows: int
    cols: int
    width: int
    norm_in_model: bool


@torch.no_grad()
def _features(tower: FeatureTower, image: Tensor) -> _Features:
    """What the tower makes of the image."""
    try:
        x = tower(image)
    except (AssertionError, ValueError):
        tower.norm_in_model = False
        x = tower(image)
    rows, cols, width = x.shape[1:]
    return _Features(rows, cols, width, tower.norm_in_model)


def _fit(tower: FeatureTower, image: Tensor, grid: Grid) -> tuple[tuple[int, int], _Features | None]:
    """The image size for this grid of features; and the features, where it is the size of this image."""
    stride = int(tower.model.feature_info[-1]["reduction"])
    img_size = (grid[0] * stride, grid[1] * stride)
    return img_size, _features(tower, image) if image.shape[-2:] == img_size else None


def _create(plan: _Plan, img_size: tuple[int, int] | None, **options: Any) -> Any:
    options = {**plan.options, "pretrained_cfg_overlay": plan.overlay, **options}
    if img_size is not None:
        try:
            return timm.create_model(plan.architecture, img_size=img_size, **options)
        except TypeError as error:  # a network for any size
            if "img_size" not in str(error):
                raise
    return timm.create_model(plan.architecture, **options)


# --- its weights


def _load(plan: _Plan, img_size: tuple[int, int]) -> Any:
    """Build the model with the weights of the file, which timm converts to its own form and to the image size."""
    overlay = {
        **plan.overlay,
        # float32 before timm resamples tables
        "state_dict": {k: t.float() if t.is_floating_point() else t for k, t in plan.state.items()},
        "custom_load": False,
        # timm is lenient about everything once the classifier is not as published; this one is as in the file
        "classifier": None,
        "label_offset": None,
    }
    try:
        with quiet_timm() as said:
            model = _create(plan, img_size, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # the converters of a wrong file raise all kinds
        raise UserError(
            f"teacher checkpoint {plan.checkpoint} is not of {plan.name}: {describe_mismatch(error)}; {_hint(plan)}"
        ) from error
    weight = getattr(getattr(getattr(model, "patch_embed", None), "proj", None), "weight", torch.empty(0))
    for key in ("patch_embed.proj.weight", "visual.trunk.patch_embed.proj.weight", "visual.conv1.weight"):
        held = plan.state.get(key, weight).shape
        # timm resamples the weights of other patches, and the features would be of no use
        if len(held) == weight.ndim == 4 and held[-2:] != weight.shape[-2:]:
            raise UserError(
                f"teacher checkpoint {plan.checkpoint} is not of {plan.name}: its patches have {held[-2]}x{held[-1]} "
                f"px, the model's {weight.shape[-2]}x{weight.shape[-1]}; {_hint(plan)}"
            )
    # some models timm loads leniently all the same
    for message in said:
        found = re.match(r"Missing keys \((.*?)\)", message)
        missing = [key for key in found[1].split(", ") if not key.startswith(("head.", "attn_pool."))] if found else []
        if missing:
            raise UserError(
                f"teacher checkpoint {plan.checkpoint} is not of {plan.name}: it has no {missing[0]}; {_hint(plan)}"
            )
    model.pretrained_cfg.pop("state_dict")  # or it would stay in memory
    cfg = get_pretrained_cfg(plan.architecture)
    model.pretrained_cfg["classifier"] = cfg.classifier if cfg else None
    return model


def _fetch(plan: _Plan, img_size: tuple[int, int]) -> Any:
    """Build the model with the weights of timm's hub."""
    cfg = get_pretrained_cfg(plan.architecture)
    instead = f"give --teacher.checkpoint FILE, {FILE_FORMS}"
    if cfg is None or not cfg.has_weights:
        raise UserError(f"timm publishes no weights of teacher {plan.name}: {instead}")
    try:
        if cfg.hf_hub_id:
            check_hub(cfg.hf_hub_id.partition("@")[0], cfg.hf_hub_filename)
        return _create(plan, img_size, pretrained=True)
    except Exception as error:  # whatever the hub's client raises
        raise UserError(
            f"the weights of teacher {plan.name} could not be fetched ({one_line(error)}): {instead}"
        ) from error


def _hint(plan: _Plan) -> str:
    if plan.name != "clip" and "visual.class_embedding" in plan.state:
        return "--teacher.name clip takes the sizes from the file"
    return "give the name of the model in the file to --teacher.name"
