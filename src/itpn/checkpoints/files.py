"""Checkpoint files of any kind: reading them into our tensor names, and writing ours."""

import contextlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from itpn.checkpoints.io import check_hub, one_line, read_state, unwrap
from itpn.config import HUB, Config, check_file, from_dict, image_size, to_dict
from itpn.errors import UserError
from itpn.masked.masked_model import MaskedImageModel
from itpn.models.detector import Detector
from itpn.models.hivit import HiViT
from itpn.models.naming import Layout, detect_layout, to_ours
from itpn.models.position import Grid
from itpn.models.segmenter import Segmenter
from itpn.system.text import read_text
from itpn.system.writing import write_whole

WANTED = "a checkpoint of iTPN, Fast-iTPN or HiViT: of itpn, the authors' code, mmpretrain or timm"
WRAPPERS = ("model", "module", "state_dict", "net")  # of the authors, DeepSpeed, mmpretrain and Lightning, trackers
AVERAGES = ("model_ema", "state_dict_ema")
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, LightningModules
# the authors' networks inside a detector, segmenter or tracker, by names that mmpretrain does not have
PUBLIC_INSIDE = re.compile(r"(backbone\.|encoder\.|encoder\.body\.)(absolute_pos_embed$|blocks\.\d+\.attn\.q_proj\.)")
# networks that others have put on top of a backbone
OTHER_HEADS = ("rpn_head.", "roi_head.", "bbox_head.", "mask_head.", "decode_head.", "auxiliary_head.")
# of what a file of ours says of itself
KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("config", "settings", "architecture", "preprocessing"), dict),
    **dict.fromkeys(("classes", "colours"), (list, tuple)),
}


@dataclass
class Checkpoint:
    """A file's tensors under our names, and what the file says about itself.

    Attributes:
        layout: whose names the file has.
        tensors: what has a place in our networks.
        others: what has none, under its own name.
        metadata: of our own files: task, recipe, config or architecture, preprocessing.
        key: what the tensors were found under in the file, if anything.
    """

    source: str
    layout: Layout
    tensors: dict[str, Tensor]
    others: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    key: str = ""

    @property
    def preprocessing(self) -> dict[str, Any]:
        """``mean``, ``std``, ``size`` and the like, as far as the file says so."""
        config = self.config
        return self.metadata.get("preprocessing") or ({} if config is None else describe_preprocessing(config))

    @cached_property
    def broken(self) -> dict[str, int]:
        """Tensors that have infinite numbers or NaN in them, and how many."""
        # in a network's precision, where a large float64 is infinite
        counts = {n: int((~torch.isfinite(t.float())).sum()) for n, t in self.tensors.items() if t.is_floating_point()}
        return {name: count for name, count in counts.items() if count}

    @property
    def config(self) -> Config | None:
        """The settings of the run that wrote it; None for files that are not of a run of ours."""
        if "config" not in self.metadata:
            return None
        try:
            return from_dict(self.metadata["config"])
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"checkpoint {self.source} has damaged settings in it ({one_line(error)})") from error
        except UserError as error:  # a setting that this version does not know
            raise UserError(f"checkpoint {self.source}: {error}; it may be of a newer itpn") from error

    @property
    def grid(self) -> Grid | None:
        """Rows and columns of the position table where the file says so; elsewhere it is square."""
        config = self.config
        if config is not None:
            size: Any = image_size(config.data)
            patch = config.model.patch_size
        else:
            arguments = self.metadata.get("model_args") or self.metadata.get("architecture", {}).get("backbone", {})
            if "img_size" not in arguments:
                return None
            size, patch = arguments["img_size"], arguments.get("patch_size", 16)
        height, width = (size, size) if isinstance(size, int) else size
        return height // patch, width // patch


def read_checkpoint(path: str | Path, average: bool = False) -> Checkpoint:
    """Read any checkpoint of iTPN, Fast-iTPN or HiViT; only tensors and plain data are ever read.

    Args:
        path: a file, a folder with a ``model.safetensors``, or ``hf-hub:OWNER/NAME`` for that of a hub repository.
        average: of a file with a moving average beside the weights (``model_ema``), take the average.

    Raises:
        UserError: not there, damaged, with code in it, or of another network.
    """
    source = str(path)
    check_file(source)
    file = fetch(source) if source.startswith(HUB) else Path(source)
    if file.is_dir():  # a run's folder, or one in timm's layout for the hub
        file /= "model.safetensors"
        if not file.is_file():
            raise UserError(f"checkpoint {source} is a folder without a model.safetensors; give {WANTED}")
    what = f"checkpoint {source}"
    state = read_state(file, what, WANTED)
    metadata = _read_metadata(file, state, what)
    keys = (*AVERAGES, *WRAPPERS) if average else (*WRAPPERS, *AVERAGES)
    inner, key = unwrap(state, keys)
    if average and key not in AVERAGES:
        raise UserError(f"{what} has no average of the weights beside them ({', '.join(AVERAGES)})")
    tensors, others = {}, {}
    for name, tensor in inner.items():
        if not isinstance(tensor, Tensor) or not isinstance(name, str):
            continue
        bare = _strip(name)
        # a run's file also holds its teacher; mmcv keeps averages among the weights
        second = bool(metadata and not name.startswith("model.") and key) or re.match(r"ema_(backbone|neck|head)", bare)
        if second or bare in tensors:
            others[name] = tensor
        else:
            tensors[bare] = tensor
    if not tensors:
        raise UserError(f"{what} has no weights in it; give {WANTED}")
    heads = {name: t for name, t in tensors.items() if name.startswith(OTHER_HEADS)}
    tensors = {name: t for name, t in tensors.items() if name not in heads}
    if found := next((m for name in tensors if (m := PUBLIC_INSIDE.match(name))), None):
        tensors = {name.removeprefix(found[1]): t for name, t in tensors.items()}
    if any(name.startswith("backbone.backbone.") for name in tensors):  # a detector's own names
        tensors = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    layout = detect_layout(tensors)
    if layout is None:
        some = ", ".join(list(tensors)[:3])
        raise UserError(f"{what} is of another network (it has {some}, ...); give {WANTED}")
    try:
        ours, left = to_ours(tensors, layout)
    except ValueError as error:
        raise UserError(f"{what} is not complete: {error}") from error
    return Checkpoint(source, layout, ours, {**left, **heads, **others}, metadata, key)


def _strip(name: str) -> str:
    name = name.replace("_orig_mod.", "")
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name


def _read_metadata(file: Path, state: dict[str, Any], what: str) -> dict[str, Any]:
    """What one of our own files says about itself; nothing for others."""
    if file.suffix != ".safetensors":
        own = state.get("itpn")
        return _check_metadata({"task": "pretraining", **own}, what) if isinstance(own, dict) else {}
    with safe_open(file, "pt") as tensors:
        stored: dict[str, Any] = tensors.metadata() or {}
    if stored.get("format") != "itpn":
        return _read_timm_config(file.parent / "config.json")
    try:
        parts: dict[str, Any] = {
            name: json.loads(stored[name])
            for name in ("config", "settings", "architecture", "preprocessing", "classes", "colours")
            if name in stored
        }
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} has damaged metadata ({one_line(error)})") from error
    return _check_metadata({**stored, **parts}, what)


def _check_metadata(metadata: dict[str, Any], what: str) -> dict[str, Any]:
    """What a file says of itself, if each part of it is of its kind."""
    for name, kind in KINDS.items():
        part = metadata.get(name)
        if part is not None and not isinstance(part, kind):
            raise UserError(f"{what} has damaged metadata (its {name} is a {type(part).__name__})")
    if not all(isinstance(name, str) for name in metadata.get("classes") or ()):
        raise UserError(f"{what} has damaged metadata (a name of its classes is none)")
    for name in ("mean", "std"):
        values = (metadata.get("preprocessing") or {}).get(name, ())
        if not isinstance(values, list | tuple) or not all(isinstance(value, int | float) for value in values):
            raise UserError(f"{what} has damaged metadata (the {name} of its preprocessing is no list of numbers)")
    return metadata


def _read_timm_config(path: Path) -> dict[str, Any]:
    """What timm's layout for the hub keeps beside the weights: arguments that their shapes do not tell."""
    try:
        config = json.loads(read_text(path))
        own = config["pretrained_cfg"]
        preprocessing = {"mean": own["mean"], "std": own["std"], "size": own["input_size"][1:]}
        found = _check_metadata({"model_args": config.get("model_args", {}), "preprocessing": preprocessing}, "it")
    except (UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # a file of weights beside something else
    names = config.get("label_names")  # timm allows a mapping as well
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        found["classes"] = names
    return found


def fetch(source: str) -> Path:
    """The ``model.safetensors`` of a hub repository, from the hub or from what was fetched before."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repository, filename = source.removeprefix(HUB), "model.safetensors"
    try:
        check_hub(repository, filename)
        with contextlib.suppress(EntryNotFoundError):
            hf_hub_download(repository, "config.json")  # into the same folder
        return Path(hf_hub_download(repository, filename))
    except Exception as error:  # no network, no such repository, no such file: each library version has its own
        raise UserError(
            f"no model.safetensors could be fetched from {source} ({one_line(error)}); give a file's path"
        ) from error


def save_weights(path: Path, model: MaskedImageModel, recipe: str, config: Config) -> None:
    """Write ``model.safetensors`` of a run: weights, and in the metadata the architecture and the preprocessing."""
    metadata = {"task": "pretraining", "recipe": recipe, "config": to_dict(config)}
    write_safetensors(path, model.state_dict(), metadata | {"preprocessing": describe_preprocessing(config)})


def describe_preprocessing(config: Config) -> dict[str, Any]:
    return {"mean": config.data.mean, "std": config.data.std, "size": image_size(config.data)}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A network's tensors as files name them: backbone and pyramid alike in all networks."""
    state = model.state_dict()
    if isinstance(model, HiViT):
        return {f"backbone.{name}": tensor for name, tensor in state.items()}
    if isinstance(model, Detector | Segmenter):  # which have both as their backbone
        return {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    return state


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write our file: whole, or not at all."""
    # a copy each: safetensors takes neither views nor tensors that share memory
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    write_whole(path, serialize(tensors, {**texts, "format": "itpn"}))


def hold_the_same(ours: Path, other: Path) -> bool:
    """Whether another safetensors file has the very tensors of ours, in whichever order."""
    try:
        with safe_open(ours, "pt") as one, safe_open(other, "pt") as two:
            if sorted(one.keys()) != sorted(two.keys()):
                return False
            return all(torch.equal(one.get_tensor(name), two.get_tensor(name)) for name in one.keys())  # noqa: SIM118
    except (OSError, SafetensorError):  # not there, or damaged
        return False
