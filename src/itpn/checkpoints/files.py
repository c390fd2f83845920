"""A checkpoint of any kind under our tensor names: io -> adapter."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from timm.layers import to_2tuple
from torch import Tensor, nn

from itpn.checkpoints.adapters import ADAPTERS, Layout, detect_layout, ours, timm
from itpn.checkpoints.contents import Contents, describe_contents, read_contents
from itpn.checkpoints.hub import fetch
from itpn.checkpoints.io import count_nonfinite, read_state, unwrap
from itpn.checkpoints.paths import HUB, check_file
from itpn.errors import UserError
from itpn.models.backbone import Backbone, find_backbone
from itpn.models.position import Grid
from itpn.models.spec import NetworkSpec

WANTED = "a checkpoint of iTPN, Fast-iTPN or HiViT: of itpn, the authors' code, mmpretrain or timm"
WRAPPERS = ("model", "module", "state_dict", "net")  # of the authors, DeepSpeed, mmpretrain and Lightning, trackers
EMA_WEIGHTS = ("model_ema", "state_dict_ema")
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, LightningModules
# the authors' networks inside a detector, segmenter or tracker, by names that mmpretrain does not have
PUBLIC_INSIDE = re.compile(r"(backbone\.|encoder\.|encoder\.body\.)(absolute_pos_embed$|blocks\.\d+\.attn\.q_proj\.)")
# networks that others have put on top of a backbone
DETECTOR_HEADS = ("rpn_head.", "roi_head.", "bbox_head.", "mask_head.")
SEGMENTER_HEADS = ("decode_head.", "auxiliary_head.")
OTHER_HEADS = (*DETECTOR_HEADS, *SEGMENTER_HEADS)


@dataclass
class Checkpoint:
    """A file's tensors under our names, and what the file says about itself.

    Attributes:
        layout: whose names the file has.
        tensors: those that our networks have.
        others: the rest, under their own names.
        metadata: of our own files: task, recipe, settings, network, preprocessing.
        key: what the tensors were found under in the file, if anything.
    """

    source: str
    layout: Layout
    tensors: dict[str, Tensor]
    others: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    key: str = ""

    @cached_property
    def spec(self) -> NetworkSpec | None:
        """The network that the file describes; None where its tensors have to tell.

        Raises:
            UserError: the description is corrupt, or of a newer version.
        """
        return ours.read_network(self.metadata, self.source)

    @cached_property
    def contents(self) -> Contents:
        """The networks that the file has the tensors of, read from what it says, or from names and shapes.

        Raises:
            UserError: tensors without which the network cannot be told are missing, or metadata is corrupt.
        """
        spec, arguments = self.spec, self.metadata.get("model_args") or {}
        try:
            if spec is not None:
                return describe_contents(spec, ours.read_guesses(self.metadata))
            return read_contents(self.tensors, self.layout, self.grid, self._levels, arguments)
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"checkpoint {self.source} is not complete: its architecture cannot be read ({error})"
            ) from error

    @property
    def _levels(self) -> str:
        """The maps that other code bases' heads, which are beside a backbone, take from its pyramid."""
        if any(name.startswith(SEGMENTER_HEADS) for name in self.others):
            return "joined"
        return "pooled" if any(name.startswith(DETECTOR_HEADS) for name in self.others) else "pyramid"

    @property
    def settings(self) -> dict[str, Any]:
        """Of the run that wrote it; empty for files of others."""
        return self.metadata.get("settings") or {}

    @property
    def preprocessing(self) -> dict[str, Any]:
        """``mean``, ``std``, ``size`` and the like, as far as the file says so."""
        if own := self.metadata.get("preprocessing"):
            return own
        data = self.settings.get("data", {})
        if not all(name in data for name in ("mean", "std", "img_size")):
            return {}
        return {"mean": tuple(data["mean"]), "std": tuple(data["std"]), "size": to_2tuple(data["img_size"])}

    @cached_property
    def nonfinite(self) -> dict[str, int]:
        """Tensors with infinite values or NaN, and how many values."""
        return count_nonfinite(self.tensors)

    @property
    def grid(self) -> Grid | None:
        """Rows and columns of the position table where the file says so; elsewhere it is square."""
        arguments = self.metadata.get("model_args") or (self.spec.backbone if self.spec is not None else {})
        if "img_size" not in arguments:
            return None
        (height, width), patch = to_2tuple(arguments["img_size"]), arguments.get("patch_size", 16)
        return height // patch, width // patch


def read_checkpoint(path: str | Path, ema: bool = False) -> Checkpoint:
    """Read any checkpoint of iTPN, Fast-iTPN or HiViT; only tensors and plain data are ever read.

    Args:
        path: a file, a folder with a ``model.safetensors``, or ``hf-hub:OWNER/NAME`` for that of a hub repository.
        ema: of a file with an EMA of the weights beside them (``model_ema``), take the EMA.

    Raises:
        UserError: not there, corrupt, with code in it, or of another network.
    """
    source = str(path)
    check_file(source)
    file = fetch(source) if source.startswith(HUB) else Path(source)
    if file.is_dir():  # a run's folder, or one in timm's layout for the hub
        file /= "model.safetensors"
        if not file.is_file():
            raise UserError(f"checkpoint {source} is a folder without a model.safetensors; give {WANTED}")
    what = f"checkpoint {source}"
    state, header = read_state(file, what, WANTED)
    metadata = _read_metadata(file, state, header, what)
    inner, key = unwrap(state, (*EMA_WEIGHTS, *WRAPPERS) if ema else (*WRAPPERS, *EMA_WEIGHTS))
    if ema and key not in EMA_WEIGHTS:
        raise UserError(f"{what} has no EMA of the weights beside them ({', '.join(EMA_WEIGHTS)})")
    tensors, others = _take_tensors(inner, run=bool(metadata and key))
    if not tensors:
        raise UserError(f"{what} has no weights in it; give {WANTED}")
    layout = detect_layout(tensors) or ("itpn" if "network" in metadata else None)
    if layout is None:
        some = ", ".join(list(tensors)[:3])
        raise UserError(f"{what} is of another network (it has {some}, ...); give {WANTED}")
    try:
        named, left = ADAPTERS[layout].to_ours(tensors)
    except ValueError as error:
        raise UserError(f"{what} is not complete: {error}") from error
    return Checkpoint(source, layout, named, {**left, **others}, metadata, key)


def _take_tensors(inner: dict[str, Any], run: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a network by bare names, and what is beside it: heads of others, a second copy, a teacher.

    Args:
        run: the file is a run's checkpoint, in which the network's tensors begin with "model.".
    """
    tensors: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in inner.items():
        if not isinstance(tensor, Tensor) or not isinstance(name, str):
            continue
        bare = _strip(name)
        # mmcv keeps an EMA among the weights
        second = (run and not name.startswith("model.")) or re.match(r"ema_(backbone|neck|head)", bare)
        if second or bare in tensors:
            others[name] = tensor
        else:
            tensors[bare] = tensor
    heads = {name: t for name, t in tensors.items() if name.startswith(OTHER_HEADS)}
    tensors = {name: t for name, t in tensors.items() if name not in heads}
    if found := next((m for name in tensors if (m := PUBLIC_INSIDE.match(name))), None):
        tensors = {name.removeprefix(found[1]): t for name, t in tensors.items()}
    if any(name.startswith("backbone.backbone.") for name in tensors):  # a detector's own names
        tensors = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    return tensors, {**heads, **others}


def _strip(name: str) -> str:
    name = name.replace("_orig_mod.", "")
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name


def _read_metadata(file: Path, state: dict[str, Any], header: dict[str, str] | None, what: str) -> dict[str, Any]:
    """What one of our own files says about itself; nothing for others."""
    if header is None:
        own = state.get("itpn")
        return ours.check_metadata(dict(own), what) if isinstance(own, dict) else {}
    if header.get("format") == "itpn":
        return ours.read_metadata(header, what)
    return timm.read_metadata(file.parent / "config.json")


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A network's tensors as files name them: backbone and pyramid alike in all networks."""
    state = model.state_dict()
    if isinstance(model, Backbone):
        return {f"backbone.{name}": tensor for name, tensor in state.items()}
    if find_backbone(model) is not model.backbone:  # a head's network has backbone and pyramid as its backbone
        return {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    return state
