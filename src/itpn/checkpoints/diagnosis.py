"""What fits between a file and a network, and what becomes of the rest."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from timm.models._manipulate import adapt_input_conv
from torch import Tensor, nn

from itpn.checkpoints.architecture import known_heads
from itpn.checkpoints.files import OTHER_HEADS, Checkpoint, named_tensors
from itpn.errors import UserError
from itpn.models.hivit import HiViT, find_backbone
from itpn.models.position import Grid
from itpn.models.weights import fit_tables

# the layers of a detector and of a segmenter that know its classes
CLASS_PREDICTORS = (
    *("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits."),
    *("classifier.", "aux_classifier.4."),
)

# parts of our networks by the beginning of their tensors' names, as a message names them; all or nothing each
PARTS = {
    "decoder.": "decoder",
    "auxiliary.": "auxiliary head",
    "pyramid_heads.": "set of heads for pyramid levels",
    "mask_token": "mask token",
    "pyramid.": "pyramid",
    "backbone.head.": "classifier",
    "backbone.fc_norm.": "classifier",
    "fpn.": "feature pyramid network",
    CLASS_PREDICTORS[0]: "predictor of boxes and classes",
    CLASS_PREDICTORS[1]: "predictor of masks",
    "roi_heads.mask_": "mask head",
    "rpn.": "set of detection heads",
    "roi_heads.": "set of detection heads",
    CLASS_PREDICTORS[2]: "predictor of pixels' classes",
    CLASS_PREDICTORS[3]: "auxiliary predictor of pixels' classes",
    "aux_classifier.": "auxiliary segmentation head",
    "upernet.": "segmentation head",
}
# parts that are one to who starts from a file without any of them; the last names them all
DETECTION = ("predictor of boxes and classes", "predictor of masks", "mask head", "set of detection heads")
SEGMENTATION = (
    *("predictor of pixels' classes", "auxiliary predictor of pixels' classes"),
    *("auxiliary segmentation head", "segmentation head"),
)
PRETRAINING = ("decoder", "auxiliary head", "set of heads for pyramid levels", "mask token")


@dataclass
class Finding:
    """Something about a file that is not simply loaded.

    Attributes:
        kind: ``expected``: not needed here, or made anew; ``converted``: loaded after a change; ``random``: a part of
            the network that the file says nothing about; ``harmful``: would be lost, or does not fit.
        names: the tensors, under our names (those that have none of ours: their own).
        text: a sentence without an end, to follow the file's name.
    """

    kind: Literal["expected", "converted", "random", "harmful"]
    names: list[str]
    text: str


def find_part(name: str) -> str | None:
    """Which part of a network a tensor belongs to; None for the backbone itself."""
    return next((title for prefix, title in PARTS.items() if name.startswith(prefix)), None)


def fit(checkpoint: Checkpoint, model: nn.Module) -> tuple[dict[str, Tensor], list[Finding]]:
    """Make a file's tensors fit a network, as far as that can be done without harm.

    Position tables of another grid are resampled, the first layer is adapted to other channels as timm does. A part
    that does not fit as a whole is left out as a whole: half a decoder is of no use.

    Args:
        model: any of our networks.

    Returns:
        A state dict for the model without what has to stay random, and the findings.

    Raises:
        UserError: weights that are complex, boolean or whole numbers, or position tables of an unknown image size.
    """
    backbone = find_backbone(model)
    own = named_tensors(model)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if "relative_position_index" not in name}
    for name, tensor in tensors.items():
        # cast, they would become weights that nobody trained: half of a complex number would go
        if name in own and own[name].is_floating_point() and not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"checkpoint {checkpoint.source} has numbers of another kind than weights are: {name} is {kind}, "
                "not float"
            )
    findings = _convert(tensors, own)
    try:
        changed = fit_tables(tensors, own, backbone, checkpoint.grid)
    except ValueError as error:
        raise UserError(f"checkpoint {checkpoint.source} does not say its image size: {error}") from error

    for part in dict.fromkeys(PARTS.values()):
        ours = {name for name in own if find_part(name) == part}
        theirs = {name for name in tensors if find_part(name) == part}
        if theirs and not ours:
            needed = "needed here" if part != "classifier" else "asked for"
            findings.append(Finding("expected", sorted(theirs), f"has a {part} that is not {needed}"))
        elif ours and not theirs:
            findings.append(Finding("random", sorted(ours), f"has no {part}"))
        elif different := sorted(name for name in ours | theirs if _shape(own, name) != _shape(tensors, name)):
            what = _describe(different[0], tensors, own)
            findings.append(Finding("random", sorted(ours), f"has no {part} that fits ({what})"))
        elif part == "decoder" and (what := _compare_decoder_heads(checkpoint, model)):
            findings.append(Finding("random", sorted(ours), f"has no decoder that fits ({what})"))
        else:
            continue
        tensors = {name: tensor for name, tensor in tensors.items() if name not in theirs}

    for parts in (DETECTION, SEGMENTATION):
        if not any(find_part(name) in parts for name in checkpoint.tensors):
            findings = _join_heads(findings, parts)
    findings += _describe_tables([name for name in changed if name in tensors], backbone)
    trunk = [name for name in {**own, **tensors} if find_part(name) is None]
    missing = [name for name in trunk if name not in tensors]
    lost = [name for name in trunk if name not in own]
    other = [name for name in trunk if name in own and name in tensors and own[name].shape != tensors[name].shape]
    heads = known_heads(checkpoint)
    if heads and heads != backbone.num_heads:
        findings.append(Finding("harmful", [], f"has {heads} attention heads, the model {backbone.num_heads}"))
    if lost:
        findings.append(Finding("harmful", lost, f"has tensors that the model has no place for: {_count(lost)}"))
    if missing:
        findings.append(Finding("harmful", missing, f"lacks {_count(missing)}, which would stay random"))
    if other:
        text = f"has another shape: {_describe(other[0], tensors, own)}"
        findings.append(Finding("harmful", other, text + (f", and {len(other) - 1} more" if len(other) > 1 else "")))
    findings += judge_others(checkpoint, bool(backbone.num_classes))
    names = dict(zip(own, model.state_dict(), strict=True))
    return {names[n]: t for n, t in tensors.items() if n in own and own[n].shape == t.shape}, findings


def _convert(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> list[Finding]:
    """Change in place what can be made to fit, tables aside."""
    findings = []
    if "backbone.pos_embed" not in tensors:
        # the sum with a table of zeros is the network without one
        tensors["backbone.pos_embed"] = torch.zeros_like(own["backbone.pos_embed"], device="cpu")
        findings.append(Finding("converted", ["backbone.pos_embed"], "has no position table: it is zero here"))
    name = "backbone.patch_embed.proj.weight"
    there, here = tensors[name], own[name]
    if there.shape[1] != here.shape[1] and there.shape[2:] == here.shape[2:] and len(there) == len(here):
        tensors[name] = adapt_channels(there, here.shape[1])
        text = f"has {there.shape[1]} channels: its first layer was adapted to {here.shape[1]}"
        changed = [name]
        for name in ("decoder.heads.pixel.weight", "decoder.heads.pixel.bias"):
            if name in tensors and name in own:
                # a unit's numbers are (row, col, channel): each channel is predicted as their mean was
                mean = tensors[name].unflatten(0, (-1, there.shape[1])).mean(dim=1, keepdim=True)
                tensors[name] = mean.expand(-1, here.shape[1], *mean.shape[2:]).flatten(0, 1)
                changed.append(name)
        text += ", and so was its prediction of pixels" if len(changed) > 1 else ""
        findings.append(Finding("converted", changed, text))
    return findings


def _join_heads(findings: list[Finding], parts: tuple[str, ...]) -> list[Finding]:
    """One finding for a network whose heads are all missing."""
    heads = [finding for finding in findings if finding.text in {f"has no {part}" for part in parts}]
    if not heads:
        return findings
    names = sorted(name for finding in heads for name in finding.names)
    return [f for f in findings if f not in heads] + [Finding("random", names, f"has no {parts[-1]}")]


def _describe_tables(changed: list[str], backbone: HiViT) -> list[Finding]:
    """Position tables that were resampled, in one sentence."""
    tables = sorted(name for name in changed if name.endswith("pos_embed"))
    relative = len(changed) - len(tables)
    parts = [f"{_join(tables)} resampled to {_units(backbone.grid_size)} units"] if tables else []
    if relative and backbone.rel_pos_grid is not None:
        parts.append(f"{relative} relative position tables to {_units(backbone.rel_pos_grid)}")
    text = f"is made for another image size: {', '.join(parts)}"
    return [Finding("converted", sorted(changed), text)] if parts else []


def _units(grid: Grid) -> str:
    return f"{grid[0]}x{grid[1]}"


def _compare_decoder_heads(checkpoint: Checkpoint, model: nn.Module) -> str:
    """What differs, in words: shapes are the same with any number of heads."""
    config, decoder = checkpoint.config, getattr(model, "decoder", None)
    if config is None or decoder is None or not len(decoder.blocks):
        return ""
    theirs, ours = config.model.decoder_heads, decoder.num_heads
    return f"it has {theirs} attention heads there and {ours} here" if theirs != ours else ""


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """A convolution of images to another number of channels, as timm does it: colours summed, or repeated."""
    if weight.shape[1] != 3:  # which timm starts from: the same answer to a grey image
        weight = weight.sum(dim=1, keepdim=True).repeat(1, 3, 1, 1) / 3
    return adapt_input_conv(channels, weight)


def judge_others(checkpoint: Checkpoint, classifier: bool) -> list[Finding]:
    """Sort what has no place in our networks at all."""
    groups: dict[str, list[str]] = {}
    for name in checkpoint.others:
        groups.setdefault(_judge(checkpoint, name, classifier), []).append(name)
    titles = {
        "index": ("expected", "has indices of relative positions, which are computed here"),
        "copy": ("expected", "has a second copy of the weights, or a teacher, that is not needed"),
        "heads": ("expected", "has heads of a detector or segmenter, which are not read"),
        "decoder": ("expected", "has a decoder of another kind of pre-training, which is not read"),
        "pyramid": (
            "expected",
            "has a pyramid and decoder in the convolutional form of Fast-iTPN's unpublished pre-training, which are "
            "not read",
        ),
        "norm": ("harmful", "normalises tokens before their mean, which this classifier does not"),
    }
    findings = []
    for group, names in groups.items():
        kind, text = titles.get(group, ("harmful", f"has tensors of no known kind: {_join(names)}"))
        findings.append(Finding(kind, names, text))  # type: ignore[arg-type]
    return findings


def _judge(checkpoint: Checkpoint, name: str, classifier: bool) -> str:
    if name.endswith("relative_position_index"):
        return "index"
    if name.startswith(OTHER_HEADS):
        return "heads"
    if checkpoint.key and name.startswith(("teacher.", "average.", "ema.", "ema_", "model.", "module.")):
        return "copy"
    if "align_dim_16tofpn.weight" in checkpoint.others:
        return "pyramid"
    if name.startswith("norm."):
        return "norm" if classifier and "backbone.fc_norm.weight" not in checkpoint.tensors else "decoder"
    if name.startswith(("decoder_", "neck.", "lm_head", "mask_token")):
        return "decoder"
    return ""


def _shape(tensors: dict[str, Tensor], name: str) -> str:
    return "x".join(map(str, tensors[name].shape)) if name in tensors else "missing"


def _describe(name: str, theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> str:
    return f"{name} is {_shape(theirs, name)} there and {_shape(ours, name)} here"


def _kind(name: str) -> str:
    """A tensor without its place in a list: what layer scale, say, is called in every block."""
    if ".ls" in name:
        return "layer scale"
    if "relative_position_bias_table" in name or "rel_pos_" in name:
        return "relative position table"
    return ".".join(part for part in name.removeprefix("backbone.").split(".") if not part.isdigit())


def _count(names: list[str]) -> str:
    """How many of each kind."""
    return _join([f"{count} x {kind}" for kind, count in Counter(map(_kind, names)).items()])


def _join(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
