"""Which model of timm a teacher is: from its name and the tensors of its file."""

import contextlib
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models import get_pretrained_cfg
from torch import Tensor

from itpn.errors import UserError
from itpn.models.position import Grid
from itpn.models.variants import WITH_PYRAMID
from itpn.teachers import AUTO
from itpn.teachers.files import FILE_FORMS, read_tensors
from itpn.teachers.folders import FolderModel, is_of_folder, read_folder

CLIP_BASE = "vit_base_patch16_clip_quickgelu_224.openai"  # the timm model that the name `clip` changes the sizes of
# names of the projection's last linear layer in files of CLIP models; the first dimension is the output width
CLIP_PROJECTIONS = (
    "visual.head.proj.weight",
    "visual.head.mlp.fc2.weight",
    "visual.head.weight",
    "visual.trunk.head.weight",
    "visual.trunk.head.fc.weight",
)


@dataclass
class TeacherPlan:
    """Arguments for building the teacher by timm."""

    name: str  # as the user gave it
    architecture: str  # timm's name, with the tag of the weights where it was given
    projected: bool
    options: dict[str, Any] = field(default_factory=dict)
    overlay: dict[str, Any] = field(default_factory=dict)  # of the model's pretrained_cfg
    checkpoint: str | None = None
    state: dict[str, Tensor] = field(default_factory=dict)  # the file's tensors; {} if weights are fetched
    resampling: tuple[str, bool] | None = None  # of its position table, mode and antialias; None leaves it to timm


def make_plan(name: str, checkpoint: str | None) -> TeacherPlan:
    """How timm builds a teacher, by its name or by what its file or folder holds.

    Raises:
        UserError: timm knows no such model, or the file or folder is none of a teacher.
    """
    if checkpoint is None and name in (AUTO, "clip"):
        raise UserError(f"teacher {name} is read from a file: give --teacher.checkpoint FILE, {FILE_FORMS}")
    if checkpoint is not None and Path(checkpoint).is_dir():
        return _folder_plan(name, checkpoint, read_folder(checkpoint))
    if checkpoint is not None and name == AUTO and is_of_folder(Path(checkpoint)):
        folder = str(Path(checkpoint).parent)
        return _folder_plan(name, folder, read_folder(folder))
    if checkpoint is not None and name in (AUTO, "clip"):
        return _clip_plan(checkpoint, read_tensors(checkpoint))
    _check_name(name)
    if checkpoint is None:
        return TeacherPlan(name, name, projected=_is_clip(name) and not _is_fine_tuned(name))
    if checkpoint.endswith(".npz"):  # which timm reads into a model that it has built
        return TeacherPlan(name, name, False, {"num_classes": 0}, checkpoint=checkpoint)
    return _file_plan(name, checkpoint, read_tensors(checkpoint), {})


def _folder_plan(name: str, checkpoint: str, model: FolderModel) -> TeacherPlan:
    """The model that a folder says it holds, unless the given name is of another."""
    own = {AUTO, model.kind, model.kind.removesuffix("_vision_model"), model.kind.partition(".")[0]}
    if name not in own:
        raise UserError(
            f"teacher checkpoint {checkpoint} holds {model.kind}, as its config.json says, not {name}: give "
            f"--teacher.name {AUTO}, which takes the name from there"
        )
    if model.kind == model.architecture:  # of timm
        _check_name(model.kind)
        return _file_plan(model.kind, checkpoint, model.state, model.overlay)
    return TeacherPlan(
        model.kind,
        model.architecture,
        model.projected,
        model.options,
        model.overlay,
        checkpoint,
        model.state,
        model.resampling,
    )


def follow_authors(plan: TeacherPlan, grid: Grid) -> None:
    """Have models of timm compute what their authors' code and transformers do, where timm does something else.

    DINOv2 without registers resamples its table without antialiasing. Of Perception Encoders the positions of patches
    count from 1 on, whatever the size; timm would stretch them to the published size, and cannot resample the table of
    the authors' files. SigLIP has the tanh approximation of GELU, timm in some of its models only.
    """
    if re.match("vit_.*_siglip_", plan.architecture) and not _is_fine_tuned(plan.architecture):
        plan.options.setdefault("act_layer", "gelu_tanh")
    if "_dinov2" in plan.architecture:
        plan.resampling = plan.resampling or ("bicubic", "_reg4_" in plan.architecture)
    if plan.architecture.startswith("vit_pe_"):
        plan.options["ref_feat_shape"] = grid
        plan.resampling = ("bilinear", False)


def _file_plan(name: str, checkpoint: str, state: dict[str, Tensor], overlay: dict[str, Any]) -> TeacherPlan:
    """A model of timm with weights by timm's names, or by others that timm converts."""
    cfg = get_pretrained_cfg(name)
    classifiers = classifiers_of(cfg.to_dict() if cfg else {})
    tagged = "." in name
    outputs = [state[key].shape[0] for key in CLIP_PROJECTIONS if key in state]
    if "visual.proj" in state:
        outputs = [state["visual.proj"].shape[1]]
    projected = bool(outputs)
    by_attention = any("attn_pool" in key for key in state)
    if projected and not by_attention and not tagged and (_is_fine_tuned(name) or not _is_clip(name)):
        # timm's default weights of that name are a classifier's; most CLIP models have OpenAI's preprocessing
        overlay = {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD}
    if not outputs:  # timm's names, or others that timm converts
        heads = [head for head in (*classifiers, "head", "head.fc", "fc") if f"{head}.weight" in state]
        outputs = [state[f"{head}.weight"].shape[0] for head in heads[:1]]
        # timm gives a CLIP projection a bias of zeros; a bias that is not zero belongs to a classifier
        biases = [state[f"{head}.bias"] for head in heads[:1] if f"{head}.bias" in state]
        zeros = not any(bias.any() for bias in biases)
        projected = bool(heads) and _is_clip(name) and (not _is_fine_tuned(name) if tagged else zeros)
    options = {"num_classes": outputs[0] if outputs else 0}
    return TeacherPlan(name, name, projected, options, overlay, checkpoint, state)


def _clip_plan(checkpoint: str, state: dict[str, Tensor]) -> TeacherPlan:
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
    mlp_width = state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
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
        "mlp_ratio": (mlp_width + 0.5) / width,  # timm multiplies and rounds down
        "num_classes": state["visual.proj"].shape[1],
    }
    return TeacherPlan("clip", CLIP_BASE, True, options, {"input_size": (3, side, side)}, checkpoint, state)


def _check_name(name: str) -> None:
    models = [*timm.list_models(), *WITH_PYRAMID.values()]  # ours that timm creates and does not list
    architecture = name.partition(".")[0]
    if architecture in models:
        with contextlib.suppress(RuntimeError):  # which timm raises for an unknown tag
            get_pretrained_cfg(name)
            return
    known = timm.list_pretrained(f"{architecture}.*") if architecture in models else models + timm.list_pretrained()
    # names on the hub start with their owner: hf-hub:timm/NAME
    nearest = difflib.get_close_matches(re.split("[:/]", name)[-1], known, n=3)
    if architecture in models:  # only its tag is unknown
        nearest = nearest or known[:3]
    near = f"near it are {', '.join(nearest)}; " if nearest else ""
    raise UserError(
        f"timm has no model {name}; {near}`ema` is the EMA of the network itself, `clip` reads any CLIP ViT from a "
        "file, `auto` a folder of transformers"
    )


def _is_clip(name: str) -> bool:
    return "clip" in f"{name}.{_tag(name)}"


def _is_fine_tuned(name: str) -> bool:
    """Whether fine-tuning replaced the projection by a classifier: yes in laion2b_ft_in1k, not in laion2b_ft_320."""
    return "_ft_in" in _tag(name)


def _tag(name: str) -> str:
    cfg = get_pretrained_cfg(name)
    return cfg.tag or "" if cfg else ""


def classifiers_of(cfg: dict[str, Any]) -> tuple[str, ...]:
    names = cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)
