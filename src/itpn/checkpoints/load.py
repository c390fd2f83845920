"""From a file to a network: io -> adapter -> spec -> build -> match -> report."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from itpn.checkpoints.adapters.ours import name_levels
from itpn.checkpoints.adapters.timm import PIXELS, STORED
from itpn.checkpoints.contents import HEADLESS, all_names
from itpn.checkpoints.files import Checkpoint, read_checkpoint
from itpn.checkpoints.io import describe_nonfinite
from itpn.checkpoints.match import Finding, match
from itpn.errors import UserError
from itpn.models.backbone import Backbone, find_backbone
from itpn.models.build import backbone_arguments, build, make_pyramid
from itpn.models.heads import find_head
from itpn.models.pyramid import PyramidBackbone
from itpn.models.spec import NetworkSpec
from itpn.system.checks import ChannelMap, check_type


def load(
    checkpoint: str | Path, task: str | None = None, strict: bool = True, ema: bool = False, **overrides: Any
) -> nn.Module:
    """Build the network that a checkpoint of iTPN, Fast-iTPN or HiViT holds, with its weights, in eval mode.

    Reads files of itpn, timm, the authors' code and mmpretrain; the architecture is read from names and shapes.

    Args:
        checkpoint: a file, or ``hf-hub:OWNER/NAME``.
        task: the task whose head is wanted: ``"pretraining"`` gives a
            :class:`~itpn.masked.masked_model.MaskedImageModel`, ``"classification"`` a
            :class:`~itpn.models.hivit.HiViT` with its classifier, ``"detection"`` a
            :class:`~itpn.models.detector.Detector`, ``"segmentation"`` a :class:`~itpn.models.segmenter.Segmenter`.
            ``"pyramid"`` gives a :class:`~itpn.models.pyramid.PyramidBackbone`, ``"backbone"`` a HiViT without a
            classifier. By default the first that the file has everything for.
        strict: refuse a network of which a part would keep its random initialization, or a file of which a part would
            be lost; otherwise these are warnings.
        ema: take the EMA of the weights (``model_ema``) where the file has one beside them.
        overrides: settings that differ from the file's: arguments of HiViT (``img_size``, ``in_chans``,
            ``num_classes``, ``drop_path_rate``, ...), of the head, ``levels`` of a pyramid; ``num_heads`` and
            ``decoder_num_heads`` where the file cannot tell them; for pre-training files of ours the model settings of
            their recipe. With other ``in_chans``, ``channel_map`` says for each of them which channel of the file it
            is, ``"-"`` for none: ``in_chans=5, channel_map=(2, 1, 0, "-", "-")``.

    Raises:
        UserError: no such file, corrupt, with code in it, of another network; or ``strict`` and something is missing.
    """
    model, notes = load_found(read_checkpoint(checkpoint, ema), task, strict, **overrides)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return model


def load_found(
    checkpoint: Checkpoint, task: str | None = None, strict: bool = True, **overrides: Any
) -> tuple[nn.Module, list[str]]:
    """:func:`load` for a file that was read.

    Returns:
        The network in eval mode, and what is not as in the file, a sentence each.

    Raises:
        UserError: as :func:`load`; there is no such task, or the package that has it is not there.
    """
    if task is not None and task not in all_names():
        raise UserError(f"no task {task!r}; there are {', '.join(all_names())}")
    channel_map = overrides.pop("channel_map", None)
    channel_map = tuple(channel_map) if isinstance(channel_map, list) else channel_map
    check_type(channel_map, ChannelMap | None, "channel_map")
    model = build_checked(find_spec(checkpoint, task, overrides))
    source = checkpoint.source

    def check(findings: list[Finding]) -> None:
        problems = [finding for finding in findings if finding.kind in ("random", "harmful")]
        if problems and strict:
            reasons = "; it ".join(finding.text for finding in problems)
            if any(finding.kind == "harmful" for finding in problems):
                hint = "strict=False loads what fits, but this is another network than the file's"
            else:
                hint = "Pass strict=False to load it all the same: that part is randomly initialized"
            raise UserError(f"checkpoint {source} {reasons}. {hint}")

    findings = load_matching(model, checkpoint, check, channel_map=channel_map)
    describe_weights(model, checkpoint)
    notes = [f"{source} {finding.text}" for finding in findings if finding.kind != "expected"]
    if checkpoint.nonfinite:
        notes.append(f"{source} has {describe_nonfinite(checkpoint.nonfinite)}")
    return model.eval(), notes


def load_matching(
    network: nn.Module,
    checkpoint: Checkpoint,
    check: Callable[[list[Finding]], None],
    tensors: Mapping[str, Tensor] | None = None,
    channel_map: ChannelMap | None = None,
) -> list[Finding]:
    """Copy into a network what fits of a file.

    Args:
        check: raises :class:`UserError` for findings with which nothing is to be loaded.
        tensors: to load instead of the file's.
        channel_map: see :func:`itpn.checkpoints.match.match`.
    """
    state, findings = match(checkpoint, network, tensors, channel_map)
    check(findings)
    network.load_state_dict(state, strict=False)
    return findings


def start_from(
    network: nn.Module,
    checkpoint: Checkpoint,
    check: Callable[[list[Finding]], None],
    tensors: Mapping[str, Tensor] | None = None,
    channel_map: ChannelMap | None = None,
) -> list[str]:
    """:func:`load_matching` for a run: what it then trains is finite.

    Args:
        tensors: to start from instead of the file's. A part that these leave out on purpose is not mentioned.
        channel_map: see :func:`itpn.checkpoints.match.match`.

    Returns:
        What is not as in the file, a sentence each.

    Raises:
        UserError: of ``check``, or values that are not finite.
    """
    findings = load_matching(network, checkpoint, check, tensors, channel_map)
    check_finite(checkpoint)
    left_out = set() if tensors is None else checkpoint.tensors.keys() - tensors.keys()
    random = [f for f in findings if f.kind == "random" and not left_out & set(f.names)]
    notes = [f"{checkpoint.source} {f.text}: it is randomly initialized" for f in random]
    return notes + [f"{checkpoint.source} {f.text}" for f in findings if f.kind == "converted"]


def find_spec(checkpoint: Checkpoint, task: str | None, overrides: Mapping[str, Any]) -> NetworkSpec:
    """The network of a file for a task, with other arguments by name."""
    stored = checkpoint.spec
    # settings name what a network is made of in words of their own; the first files have nothing else
    by_settings = bool(overrides) or "network" not in checkpoint.metadata
    if by_settings and stored is not None and stored.head and task in (None, stored.head) and checkpoint.settings:
        spec = find_head(stored.head).from_settings(checkpoint.settings, dict(overrides))
        if spec is not None:
            return spec
    rest, contents = dict(overrides), checkpoint.contents
    name = task or contents.names[0]
    head = None if name in HEADLESS else find_head(name)
    spec = contents.with_num_heads(rest.pop("num_heads", None)).spec(name)
    if head is not None and name not in contents.heads:
        spec = replace(spec, options=head.adopt(checkpoint.preprocessing))
    return override(spec, rest)


def override(spec: NetworkSpec, arguments: Mapping[str, Any]) -> NetworkSpec:
    """A network with other arguments: of the head, the pyramid (``levels``, ``pyramid_width``, ...) or the backbone.

    Raises:
        UserError: a value of another type.
    """
    known = {**signature(make_pyramid).parameters, **backbone_arguments(spec.backbone.get("kind", "hivit"))}
    head, rest = None if spec.head is None else find_head(spec.head), dict(arguments)
    own = ("num_classes",) if head is None else head.arguments
    given = {name: rest.pop(name) for name in own if name in rest}
    for name, value in (arguments if head is None else rest).items():
        if name in known:
            check_type(tuple(value) if isinstance(value, list) else value, known[name].annotation, name)
    options = {} if head is None else head.override(spec.options, given)
    sizes = {
        name.removeprefix("pyramid_"): rest.pop(name) for name in ("pyramid_width", "pyramid_depth") if name in rest
    }
    if "img_size" in rest and "rel_pos_size" not in rest and {**spec.backbone, **rest}.get("rel_pos_bias"):
        rest["rel_pos_size"] = None  # the tables follow
    return replace(
        spec,
        levels=name_levels(rest.pop("levels", spec.levels)),
        pyramid=spec.pyramid if not sizes else {**(spec.pyramid or {}), **sizes},
        options=options,
        backbone={**spec.backbone, **rest},
    )


def build_checked(spec: NetworkSpec) -> nn.Module:
    """:func:`itpn.models.build.build` with arguments from outside.

    Raises:
        UserError: there is no such argument, or sizes do not fit one another.
    """
    try:
        return build(spec)
    except (TypeError, ValueError, RuntimeError) as error:
        what = spec.head or ("backbone" if spec.pyramid is None else "pyramid")
        reason = str(error).rpartition("__init__() ")[2]
        raise UserError(f"no {what} network can be built with these settings: {reason}") from error


def describe_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put what a file says of its images and classes where timm's users look for it, ``model.pretrained_cfg``."""
    if not isinstance(model, Backbone | PyramidBackbone) or not hasattr(model, "pretrained_cfg"):
        return
    own = checkpoint.preprocessing
    cfg: dict[str, Any] = {name: own[name] for name in ("mean", "std", "crop_pct", "interpolation") if name in own}
    for name in ("mean", "std"):  # one number for all channels
        if name in cfg:
            cfg[name] = tuple(cfg[name]) * (model.in_chans if len(cfg[name]) == 1 else 1)
    if own.get("channels") == model.in_chans:  # of images that are no photographs
        cfg[PIXELS] = {name: own[name] for name in STORED if name in own}
    names = checkpoint.metadata.get("classes")
    cfg |= {"label_names": names} if names and len(names) == model.num_classes else {}
    shape = {"input_size": find_backbone(model).image_shape, "num_classes": model.num_classes}
    model.pretrained_cfg = {**model.pretrained_cfg, **shape, **cfg}


def check_finite(checkpoint: Checkpoint) -> None:
    """Raise :class:`UserError` where a file has infinite values or NaN."""
    if checkpoint.nonfinite:
        raise UserError(f"checkpoint {checkpoint.source} has {describe_nonfinite(checkpoint.nonfinite)}")
