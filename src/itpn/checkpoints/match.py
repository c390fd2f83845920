"""What fits between a file and a network, and what becomes of the rest."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from itpn.checkpoints.adapters.ours import read_guesses
from itpn.checkpoints.channels import adapt_channels, adapt_predicted, check_map, show_map
from itpn.checkpoints.files import OTHER_HEADS, Checkpoint, named_tensors
from itpn.errors import UserError
from itpn.models.backbone import CLASSIFIER, Backbone, find_backbone
from itpn.models.heads import Head, heads
from itpn.models.position import Grid
from itpn.models.position_tables import fit_tables
from itpn.system.checks import ChannelMap

Tensors = Mapping[str, Tensor]

# parts of networks of several heads, by the beginning of their tensors' names
SHARED = {"pyramid.": "pyramid", "fpn.": "feature pyramid network", **dict.fromkeys(CLASSIFIER, "classifier")}

NORMALISES = "normalises tokens before their mean, which this classifier does not"
Kind = Literal["expected", "converted", "random", "harmful"]


@dataclass
class Finding:
    """Something about a file that is not simply loaded.

    Attributes:
        kind: ``expected``: not needed here, or made anew; ``converted``: loaded after a change; ``random``: a part of
            the network that the file says nothing about; ``harmful``: would be lost, or does not fit.
        names: the tensors, under our names (those that have none of ours: their own).
        text: a sentence without an end, to follow the file's name.
    """

    kind: Kind
    names: list[str]
    text: str


def name_parts(checkpoint: Checkpoint, head: Head | None) -> dict[str, str]:
    """Titles of the parts of a network and of a file by the beginning of their tensors' names; all or nothing each.

    Heads may have other parts under the same names: the network's own title comes first, then that of the file's head.

    Args:
        head: of the network.
    """
    known, theirs = heads(), checkpoint.contents.heads
    parts = [*([] if head is None else [head.parts]), *(known[name].parts for name in theirs if name in known), SHARED]
    unknown = next((name for name in theirs if name not in known), None)
    outside = {_top(name) for name in checkpoint.tensors} - {"backbone.", "pyramid."}
    if unknown is not None:
        parts.append(dict.fromkeys(sorted(outside), f"head of the task {unknown!r}"))
    elif not theirs:  # half a head may be there all the same
        parts += [{p: t for p, t in own.parts.items() if _top(p) in outside} for own in known.values()]
    titles: dict[str, str] = {}
    for own in parts:
        titles |= {prefix: title for prefix, title in own.items() if prefix not in titles}
    return titles


def _top(name: str) -> str:
    """A tensor's name up to its first point, or one without any."""
    return name[: name.find(".") + 1] or name


def find_part(name: str, parts: Mapping[str, str]) -> str | None:
    """Which part of a network a tensor belongs to, the first that fits; None for the backbone itself."""
    return next((title for prefix, title in parts.items() if name.startswith(prefix)), None)


def match(
    checkpoint: Checkpoint, model: nn.Module, given: Tensors | None = None, channel_map: ChannelMap | None = None
) -> tuple[dict[str, Tensor], list[Finding]]:
    """Make a file's tensors fit a network, as far as that can be done without harm.

    Position tables of another grid are resampled, the first layer is adapted to other channels as timm does, or by a
    map. A part that does not fit as a whole is left out as a whole: half a decoder is of no use.

    Args:
        model: any of our networks.
        given: tensors to take instead of the file's.
        channel_map: for each channel of the network that of the file, "-" for none; None for timm's way, and no change
            where there are as many.

    Returns:
        A state dict for the model without what has to stay random, and the findings.

    Raises:
        UserError: weights that are complex, boolean or whole numbers, position tables of an unknown image size, or a
            map of other channels.
    """
    backbone, own = find_backbone(model), named_tensors(model)
    spec = getattr(model, "spec", None)
    head = heads().get(spec.head) if spec is not None else None
    given = checkpoint.tensors if given is None else given
    tensors = {name: tensor for name, tensor in given.items() if "relative_position_index" not in name}
    check_numbers(tensors, own, f"checkpoint {checkpoint.source}")
    findings = _convert(tensors, own, () if head is None else head.pixels, channel_map)
    try:
        changed = fit_tables(tensors, own, backbone, checkpoint.grid)
    except ValueError as error:
        raise UserError(f"checkpoint {checkpoint.source} does not say its image size: {error}") from error

    parts = name_parts(checkpoint, head)
    differs = _differing_parts(checkpoint, model)
    wrong, unused = _match_parts(tensors, own, parts, differs)
    if head is not None and head.joined:
        wrong = _join_parts(wrong, parts, head, tensors)
    findings += wrong
    tensors = {name: tensor for name, tensor in tensors.items() if name not in unused}
    findings += _describe_tables([name for name in changed if name in tensors], backbone)
    findings += _match_trunk(checkpoint, backbone, tensors, own, parts)
    findings += judge_others(checkpoint, bool(backbone.num_classes))
    names = dict(zip(own, model.state_dict(), strict=True))
    return {names[n]: t for n, t in tensors.items() if n in own and own[n].shape == t.shape}, findings


def check_numbers(tensors: Tensors, own: Tensors, what: str) -> None:
    """Raise :class:`UserError` for weights that are complex, boolean or whole numbers.

    Cast, they would become weights that nobody trained: half of a complex number would go.
    """
    for name, tensor in tensors.items():
        if name in own and own[name].is_floating_point() and not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{what} has numbers of another kind than weights are: {name} is {kind}, not float")


def _match_parts(
    tensors: Tensors, own: Tensors, parts: Mapping[str, str], differs: Mapping[str, str]
) -> tuple[list[Finding], set[str]]:
    """Findings about the parts of heads and the pyramid, and the names of tensors that are not to be loaded.

    Args:
        differs: of :func:`_differing_parts`.
    """
    findings: list[Finding] = []
    unused: set[str] = set()
    for part in dict.fromkeys(parts.values()):
        ours = {name for name in own if find_part(name, parts) == part}
        theirs = {name for name in tensors if find_part(name, parts) == part}
        if theirs and not ours:
            findings.append(Finding("expected", sorted(theirs), f"has a {part} that is not needed here"))
        elif ours and not theirs:
            findings.append(Finding("random", sorted(ours), f"has no {part}"))
        elif different := sorted(name for name in ours | theirs if _shape(own, name) != _shape(tensors, name)):
            what = _describe(different[0], tensors, own)
            findings.append(Finding("random", sorted(ours), f"has no {part} that fits ({what})"))
        elif ours and (what := differs.get(part, "")):
            findings.append(Finding("random", sorted(ours), f"has no {part} that fits ({what})"))
        else:
            continue
        unused |= theirs
    return findings, unused


def _match_trunk(
    checkpoint: Checkpoint, backbone: Backbone, tensors: Tensors, own: Tensors, parts: Mapping[str, str]
) -> list[Finding]:
    """Findings about the backbone itself: whatever does not fit makes it another network."""
    trunk = [name for name in {**own, **tensors} if find_part(name, parts) is None]
    missing = [name for name in trunk if name not in tensors]
    lost = [name for name in trunk if name not in own]
    other = [name for name in trunk if name in own and name in tensors and own[name].shape != tensors[name].shape]
    findings = []
    num_heads = _known_heads(checkpoint)
    if num_heads and num_heads != backbone.num_heads:
        findings.append(Finding("harmful", [], f"has {num_heads} attention heads, the model {backbone.num_heads}"))
    if lost:
        findings.append(Finding("harmful", lost, f"has tensors that the model has no place for: {_count(lost)}"))
    if missing:
        findings.append(Finding("harmful", missing, f"lacks {_count(missing)}, which would stay random"))
    if other:
        text = f"has another shape: {_describe(other[0], tensors, own)}"
        findings.append(Finding("harmful", other, text + (f", and {len(other) - 1} more" if len(other) > 1 else "")))
    return findings


def _known_heads(checkpoint: Checkpoint) -> int | None:
    """Attention heads of stage 3 where a file says so; None where shapes alone are there."""
    if checkpoint.spec is not None:
        return None if read_guesses(checkpoint.metadata) else checkpoint.spec.backbone["num_heads"]
    table = checkpoint.tensors.get("backbone.stages.2.0.attn.relative_position_bias_table")
    return None if table is None else table.shape[1]


def _convert(
    tensors: dict[str, Tensor], own: dict[str, Tensor], pixels: tuple[str, ...], channel_map: ChannelMap | None
) -> list[Finding]:
    """Change in place what can be made to fit, tables aside.

    Args:
        pixels: beginnings of names of the tensors that predict a patch's pixels.
    """
    findings = []
    if "backbone.pos_embed" in own and "backbone.pos_embed" not in tensors:
        # the sum with a table of zeros is the network without one
        tensors["backbone.pos_embed"] = torch.zeros_like(own["backbone.pos_embed"], device="cpu")
        findings.append(Finding("converted", ["backbone.pos_embed"], "has no position table: it is zero here"))
    name = "backbone.patch_embed.proj.weight"
    there, here = tensors.get(name), own.get(name)
    if there is None or here is None:
        return findings
    old, new = there.shape[1], here.shape[1]
    if channel_map is not None:
        check_map(channel_map, old, new)
    if (old != new or channel_map is not None) and there.shape[2:] == here.shape[2:] and len(there) == len(here):
        tensors[name] = adapt_channels(there, new, channel_map)
        heads = [name for name in own if name.startswith(pixels) and name in tensors]
        for head in heads:
            tensors[head] = adapt_predicted(tensors[head], old, new, channel_map)
        how = f"adapted to {new}" if channel_map is None else f"mapped to {show_map(channel_map)}"
        text = f"has {old} channel{'s' * (old != 1)}: its first layer was {how}"
        findings.append(
            Finding("converted", [name, *heads], text + (", and so was its prediction of pixels" if heads else ""))
        )
    return findings


def _join_parts(findings: list[Finding], parts: Mapping[str, str], head: Head, theirs: Tensors) -> list[Finding]:
    """One finding for a head whose parts are all missing."""
    titles = list(head.parts.values())
    if any(find_part(name, parts) in titles for name in theirs):
        return findings
    missing = [finding for finding in findings if finding.text in {f"has no {title}" for title in titles}]
    if not missing:
        return findings
    names = sorted(name for finding in missing for name in finding.names)
    return [f for f in findings if f not in missing] + [Finding("random", names, f"has no {titles[-1]}")]


def _differing_parts(checkpoint: Checkpoint, model: nn.Module) -> dict[str, str]:
    """What differs although shapes agree, by the title of the part."""
    spec, own = checkpoint.spec, getattr(model, "spec", None)
    if spec is None or own is None or spec.head != own.head or read_guesses(checkpoint.metadata):
        return {}
    head = heads().get(spec.head or "")
    return {} if head is None else head.differ(spec.options, model)


def _describe_tables(changed: list[str], backbone: Backbone) -> list[Finding]:
    """Position tables that were resampled, in one sentence."""
    tables = sorted(name for name in changed if name.endswith("pos_embed"))
    relative = len(changed) - len(tables)
    parts = [f"{_join(tables)} resampled to {_sides(backbone.grid_size)} patches"] if tables else []
    if relative and backbone.rel_pos_grid is not None:
        parts.append(f"{relative} relative position tables to {_sides(backbone.rel_pos_grid)}")
    text = f"is made for another image size: {', '.join(parts)}"
    return [Finding("converted", sorted(changed), text)] if parts else []


def _sides(grid: Grid) -> str:
    return f"{grid[0]}x{grid[1]}"


def judge_others(checkpoint: Checkpoint, classifier: bool) -> list[Finding]:
    """Sort what has no place in our networks at all."""
    groups: dict[str, list[str]] = {}
    for name in checkpoint.others:
        groups.setdefault(_judge(checkpoint, name, classifier), []).append(name)
    findings = []
    for text, names in groups.items():
        kind: Kind = "harmful" if text in ("", NORMALISES) else "expected"
        findings.append(Finding(kind, names, text or f"has tensors of no known kind: {_join(names)}"))
    return findings


def _judge(checkpoint: Checkpoint, name: str, classifier: bool) -> str:
    """What a tensor without a place is; nothing where that is not known."""
    if name.endswith("relative_position_index"):
        return "has indices of relative positions, which are computed here"
    if name.startswith(OTHER_HEADS):
        return "has heads of a detector or segmenter, which are not read"
    if checkpoint.key and name.startswith(("teacher.", "average.", "ema.", "ema_", "model.", "module.")):
        return "has a second copy of the weights, or a teacher, that is not needed"
    if "align_dim_16tofpn.weight" in checkpoint.others:
        return (
            "has a pyramid and decoder in the convolutional form of Fast-iTPN's unpublished pre-training, which are "
            "not read"
        )
    if name.startswith("norm.") and classifier and "backbone.fc_norm.weight" not in checkpoint.tensors:
        return NORMALISES
    if name.startswith(("norm.", "decoder_", "neck.", "lm_head", "mask_token")):
        return "has a decoder of another kind of pre-training, which is not read"
    return ""


def _shape(tensors: Tensors, name: str) -> str:
    return "x".join(map(str, tensors[name].shape)) if name in tensors else "missing"


def _describe(name: str, theirs: Tensors, ours: Tensors) -> str:
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
