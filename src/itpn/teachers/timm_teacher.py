"""Frozen teachers: networks of timm whose features the student predicts, one for each patch.

The teacher's image has the size for which the teacher returns exactly one feature for each patch of the student. For a
student with 14x14 patches in 224 px, a ViT of patch size 14 gets 196 px and a network of total stride 32 gets 448 px.
The features are

- of a CLIP tower: the patch tokens after the final norm and the projection to the space shared with text. CLIP ResNets
  pool by attention before the projection, and MobileCLIP's FastViTs have a convolution in between: of these, the last
  map without projection, as of any other hierarchical network;
- of other ViTs: the patch tokens after the final norm;
- of hierarchical networks: the last map after the final norm, if there is one.
"""

import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from itpn.checkpoints.hub import cached_file, check_hub, describe_mismatch
from itpn.checkpoints.io import check_stored, count_nonfinite, describe_error, describe_nonfinite
from itpn.errors import ACCIDENTS, FORBIDDEN, UserError, refusal
from itpn.models.position import Grid
from itpn.teachers.feature_teacher import TEACHERS, FeatureTeacher
from itpn.teachers.files import FILE_FORMS, quiet_timm, sha256_of
from itpn.teachers.folders import weight_files
from itpn.teachers.licences import licence_of
from itpn.teachers.plan import TeacherPlan, classifiers_of, follow_authors, make_plan

T = TypeVar("T")
# names of the patch embedding and of the position table in the forms of files
PATCH_WEIGHTS = (
    "patch_embed.proj.weight",
    "visual.trunk.patch_embed.proj.weight",
    "visual.conv1.weight",
    "conv1.weight",
)
POSITIONS = ("pos_embed", "visual.trunk.pos_embed", "visual.positional_embedding", "positional_embedding")


class FeatureTower(nn.Module):
    """A timm model without pooling and classifier: normalized images [B, 3, h, w] -> features [B, rows, cols, D].

    Args:
        model: the whole timm model; unused modules are removed from it.
        projected: apply the linear layers of the head too, unless they follow a pooling by attention.
    """

    def __init__(self, model: Any, projected: bool) -> None:
        super().__init__()
        head = getattr(model, "head", None)
        # some models have the final norm after the pooling; where it comes before, forward_intermediates applies it
        channels = model.feature_info[-1]["num_chs"]
        after_pooling = [getattr(model, "fc_norm", None), getattr(head, "norm", None)]
        self.norm = next((norm for norm in after_pooling if _is_norm(norm, channels)), None) or nn.Identity()
        self.projection = _projection(model) if projected else nn.Identity()
        self.norm_in_model = True  # False for models whose forward_intermediates refuses norm=True
        # without the classifier: it would take memory and be counted
        unused = {"fc_norm", "attn_pool"} | {name.split(".")[0] for name in classifiers_of(model.pretrained_cfg)}
        for name in unused & dict(model.named_children()).keys():
            setattr(model, name, nn.Identity())
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        maps = self.model.forward_intermediates(images, indices=1, norm=self.norm_in_model, intermediates_only=True)
        x = maps[-1]  # [B, C, rows, cols]
        on_maps = type(self.norm).__name__.endswith("2d")  # timm's naming for norms of [B, C, rows, cols]
        x = self.norm(x).permute(0, 2, 3, 1) if on_maps else self.norm(x.permute(0, 2, 3, 1))  # [B, rows, cols, C]
        return self.projection(x)


def build_teacher(name: str, checkpoint: str | None, grid: Grid) -> FeatureTeacher:
    """Build a teacher with its weights.

    Args:
        name: a timm model, with or without the tag of its weights; or ``clip``, a CLIP ViT of OpenAI's kind (heads of
            64 channels, quick-GELU) whose sizes are read from ``checkpoint``; or ``auto``, that or the model of a
            folder of transformers or timm.
        checkpoint: its weights, a file or a folder; None fetches them from timm's hub.
        grid: rows and columns of the student's patches.

    Raises:
        UserError: no such model or file; the file is of another model; nothing to fetch; or no image size for which
            the model returns exactly one feature per patch.
    """
    if name in TEACHERS:
        teacher = TEACHERS[name](checkpoint, grid)
        teacher.sha256 = teacher.sha256 or hash_weights(checkpoint)
        return teacher
    plan = make_plan(name, checkpoint)
    stride = _apply_to_tower(plan, None, lambda tower, _: int(tower.model.feature_info[-1]["reduction"]))
    img_size = (grid[0] * stride, grid[1] * stride)
    follow_authors(plan, grid)
    features = _apply_to_tower(plan, img_size, _features)
    if (features.rows, features.cols) != grid:
        raise UserError(
            f"teacher {plan.name} returns {features.rows}x{features.cols} features of an image of "
            f"{img_size[0]}x{img_size[1]} px, not one for each of the {grid[0]}x{grid[1]} patches: choose another "
            "--teacher.name or --data.img-size"
        )
    if checkpoint is not None and not plan.state:
        plan.state = _read_arrays(plan, checkpoint, stride)
    model = _load(plan, img_size) if plan.state else _fetch(plan, img_size)
    cfg = model.pretrained_cfg
    if any("QuickGELU" in note for note in cfg.get("notes") or ()) and "quickgelu" not in plan.architecture:
        native = plan.architecture.replace("_clip_", "_clip_quickgelu_")
        warnings.warn(f"{name} was trained with QuickGELU: {native} gives the features it learned", stacklevel=2)
    tower = FeatureTower(model, plan.projected)
    tower.norm_in_model = features.norm_in_model
    teacher = FeatureTeacher(plan.name, tower, grid, img_size, features.width, tuple(cfg["mean"]), tuple(cfg["std"]))
    teacher.sha256 = hash_weights(checkpoint, get_pretrained_cfg(plan.architecture))
    teacher.licence = licence_of(plan)
    return teacher


def teacher_width(name: str, checkpoint: str | None) -> int:
    """Size D of this teacher's feature vectors, without building it (of timm's). Fetches nothing; reads a given file.

    Raises:
        UserError: no such model or file, or the file is no checkpoint.
    """
    if name in TEACHERS:
        return TEACHERS[name](checkpoint, (1, 1)).width
    return _apply_to_tower(make_plan(name, checkpoint), None, _features).width


def count_teacher_parameters(name: str, checkpoint: str | None) -> int:
    """Number of parameters of the image tower with its projection, without building it (of timm's). Fetches
    nothing.

    Raises:
        UserError: no such model or file, or the file is no checkpoint.
    """
    if name in TEACHERS:
        return sum(p.numel() for p in TEACHERS[name](checkpoint, (1, 1)).parameters())
    return _apply_to_tower(
        make_plan(name, checkpoint), None, lambda tower, images: sum(p.numel() for p in tower.parameters())
    )


def _is_norm(module: Any, channels: int) -> bool:
    """Whether this is a norm of so many channels; a hidden layer of the head may have a norm of another width."""
    weight = getattr(module, "weight", None)
    is_module = isinstance(module, nn.Module) and not isinstance(module, nn.Identity)
    return is_module and (weight is None or len(weight) == channels)


def _projection(model: Any) -> nn.Module:
    """The linear layers of a CLIP head; an identity if their input is not the last map."""
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


def _apply_to_tower(
    plan: TeacherPlan, img_size: tuple[int, int] | None, function: Callable[[FeatureTower, Tensor], T]
) -> T:
    """Build a tower without weights, on the meta device, and apply a function to it.

    Args:
        img_size: height and width of its images; None for the model's default.
        function: called with the tower and an image [1, 3, h, w].

    Returns:
        What the function returns.

    Raises:
        UserError: the model cannot be built for this size, or the function raised.
    """
    for device in ("meta", "cpu"):  # cpu: some models, many in timm 1.0.15, read numbers off tensors
        try:
            with torch.device(device):
                model = _create(plan, img_size).eval()
                image = torch.zeros(1, 3, *(img_size or model.pretrained_cfg["input_size"][-2:]))
                return function(FeatureTower(model, plan.projected), image)
        except Exception as error:  # models raise all kinds of errors for a size that they do not support
            reason = describe_error(error)
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
    """Rows, columns and width of the tower's features of the image."""
    try:
        x = tower(image)
    except (AssertionError, ValueError):
        tower.norm_in_model = False
        x = tower(image)
    rows, cols, width = x.shape[1:]
    return _Features(rows, cols, width, tower.norm_in_model)


def _create(plan: TeacherPlan, img_size: tuple[int, int] | None, **options: Any) -> Any:
    options = {**plan.options, "pretrained_cfg_overlay": plan.overlay, **options}
    if img_size is not None:
        try:
            return timm.create_model(plan.architecture, img_size=img_size, **options)
        except TypeError as error:  # a network for any size
            if "img_size" not in str(error):
                raise
    return timm.create_model(plan.architecture, **options)


# --- its weights


def _load(plan: TeacherPlan, img_size: tuple[int, int]) -> Any:
    """Build the model with the weights of the file, which timm converts to its own form and to the image size."""
    if nonfinite := count_nonfinite(plan.state):
        raise UserError(f"teacher checkpoint {plan.checkpoint} has {describe_nonfinite(nonfinite)}")
    # float32 before tables are resampled
    state = {k: t.float() if t.is_floating_point() else t for k, t in plan.state.items()}
    overlay = dict(plan.overlay)
    if plan.resampling is not None:
        _resample_positions(plan, state, img_size)
        overlay["input_size"] = (3, *img_size)  # or else timm would resample it once more
    overlay |= {
        "state_dict": state,
        "custom_load": False,
        # without these, timm would load with strict=False where the head is not as published; ours is as in the file
        "classifier": None,
        "label_offset": None,
    }
    try:
        with quiet_timm() as said:
            model = _create(plan, img_size, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # timm's converters raise all kinds of errors for the wrong file
        raise UserError(
            f"teacher checkpoint {plan.checkpoint} is not of {plan.name}: {describe_mismatch(error)}; {_hint(plan)}"
        ) from error
    weight = getattr(getattr(getattr(model, "patch_embed", None), "proj", None), "weight", torch.empty(0))
    for key in PATCH_WEIGHTS:
        held = plan.state.get(key, weight).shape
        # timm would resample weights of another patch size, and the features would be useless
        if len(held) == weight.ndim == 4 and held[-2:] != weight.shape[-2:]:
            raise UserError(
                f"teacher checkpoint {plan.checkpoint} is not of {plan.name}: its patches have {held[-2]}x{held[-1]} "
                f"px, the model's {weight.shape[-2]}x{weight.shape[-1]}; {_hint(plan)}"
            )
    _check_biases(plan, model)
    # timm loads some models leniently all the same
    for record in said:
        found = re.match(r"Missing keys \((.*?)\)", record.getMessage())
        missing = [key for key in found[1].split(", ") if not key.startswith(("head.", "attn_pool."))] if found else []
        if missing:
            raise UserError(
                f"teacher checkpoint {plan.checkpoint} is not of {plan.name}: it has no {missing[0]}; {_hint(plan)}"
            )
    model.pretrained_cfg.pop("state_dict")  # frees its memory
    cfg = get_pretrained_cfg(plan.architecture)
    model.pretrained_cfg["classifier"] = cfg.classifier if cfg else None
    return model


def _read_arrays(plan: TeacherPlan, path: str, patch: int) -> dict[str, Tensor]:
    """Weights of an .npz file of big_vision, as SigLIP's authors publish them, by timm's names."""
    try:
        with zipfile.ZipFile(path) as archive:
            check_stored(archive)
        with np.load(path) as arrays:
            table, scales = (
                f"params/img/{key}" for key in ("pos_embedding", "Transformer/encoderblock/LayerNorm_0/scale")
            )
            side = round(arrays[table].shape[1] ** 0.5) * patch
            depth = (
                len(arrays[scales]) if scales in arrays else sum(key.endswith("LayerNorm_1/scale") for key in arrays)
            )
        model = _create(plan, (side, side))
        if len(model.blocks) != depth:
            raise ValueError(f"it has {depth} blocks, the model {len(model.blocks)}")
        model.load_pretrained(path)
    except Exception as error:  # whatever is wrong with it
        if isinstance(error, OSError) and error.errno in ACCIDENTS | FORBIDDEN:
            raise refusal(f"teacher checkpoint {path} cannot be read", error) from error
        raise UserError(
            f"teacher checkpoint {path} is not of {plan.name} in big_vision's form: {describe_error(error)}"
        ) from error
    return model.state_dict()


def _fetch(plan: TeacherPlan, img_size: tuple[int, int]) -> Any:
    """Build the model with the weights of timm's hub."""
    cfg = get_pretrained_cfg(plan.architecture)
    instead = f"give --teacher.checkpoint FILE, {FILE_FORMS}"
    if cfg is None or not cfg.has_weights:
        raise UserError(f"timm publishes no weights of teacher {plan.name}: {instead}")
    try:
        if cfg.hf_hub_id:
            check_hub(cfg.hf_hub_id.partition("@")[0], cfg.hf_hub_filename)
        if plan.resampling is None:
            return _create(plan, img_size, pretrained=True)
        published = _create(plan, None, pretrained=True).state_dict()
    except Exception as error:  # the hub's client raises all kinds of errors
        raise UserError(
            f"the weights of teacher {plan.name} could not be fetched ({describe_error(error)}): {instead}"
        ) from error
    outputs = {"num_classes": len(published["head.weight"]) if "head.weight" in published else 0}
    return _load(replace(plan, state=published, options={**plan.options, **outputs}), img_size)


def _resample_positions(plan: TeacherPlan, state: dict[str, Tensor], img_size: tuple[int, int]) -> None:
    """Resample the table of positions as the library does whose form it has."""
    assert plan.resampling is not None
    mode, antialias = plan.resampling
    key = next((key for key in POSITIONS if key in state), None)
    weight = next((state[key] for key in PATCH_WEIGHTS if key in state), None)
    if key is None or weight is None or weight.ndim != 4:
        return
    table = state[key]
    places = table.shape[-2]
    side = round(places**0.5)
    prefix = places - side**2  # 1 of a class token
    if prefix in (0, 1):
        grid = [length // patch for length, patch in zip(img_size, weight.shape[-2:], strict=True)]
        whole = table.reshape(1, places, -1)
        whole = resample_abs_pos_embed(whole, grid, [side, side], prefix, interpolation=mode, antialias=antialias)
        state[key] = whole.reshape(*table.shape[:-2], -1, table.shape[-1])


def _check_biases(plan: TeacherPlan, model: Any) -> None:
    """timm's DINOv3 exists with and without biases of queries and values, and timm drops what a file has of them."""
    for key, bias in plan.state.items():
        if key.endswith("attn.qkv.bias") and "storage_tokens" in plan.state:
            queries, _, values = bias.chunk(3)
            block = model.get_submodule(key.removesuffix(".qkv.bias"))
            if block.q_bias is None and (queries.any() or values.any()):
                name = plan.architecture.partition(".")[0]
                raise UserError(
                    f"teacher checkpoint {plan.checkpoint} has biases of queries and values ({key}), which timm's "
                    f"{name} leaves out: give --teacher.name {name}_qkvb"
                )


def hash_weights(checkpoint: str | None, cfg: Any = None) -> str | None:
    """SHA-256 of a checkpoint, or of the file that timm has fetched; None if there is no such file."""
    if checkpoint is not None:
        path = Path(checkpoint)
        return sha256_of(weight_files(checkpoint) if path.is_dir() else [path])
    found = cached_file(cfg.hf_hub_id.partition("@")[0], cfg.hf_hub_filename) if cfg and cfg.hf_hub_id else None
    return None if found is None else sha256_of([Path(found)])


def _hint(plan: TeacherPlan) -> str:
    if plan.name != "clip" and "visual.class_embedding" in plan.state:
        return "--teacher.name clip takes the sizes from the file"
    return "give the name of the model in the file to --teacher.name"
