"""Weights on disk: our safetensors with everything that rebuilds the model, and the checkpoints of a run."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from itpn.config import HUB, Config, from_dict, image_size, override_model, to_dict
from itpn.errors import UserError
from itpn.models.position import Grid, resample_position_table, resample_relative_table
from itpn.models.variants import BACKBONES
from itpn.pretraining.build import build_masked_model
from itpn.pretraining.foreign import check_hub, one_line
from itpn.pretraining.model import MaskedImageModel


@dataclass
class Weights:
    """A file's tensors and what they belong to."""

    recipe: str
    config: Config
    tensors: dict[str, Tensor]

    @property
    def grid(self) -> Grid:
        """Rows and columns of the position tables."""
        height, width = image_size(self.config.data)
        return height // self.config.model.patch_size, width // self.config.model.patch_size


def save_weights(path: Path, model: MaskedImageModel, recipe: str, config: Config) -> None:
    """Write ``model.safetensors``: weights, and in the metadata the architecture and the preprocessing."""
    metadata = {
        "format": "itpn",
        "task": "pretraining",
        "recipe": recipe,
        "config": json.dumps(to_dict(config)),
        "preprocessing": json.dumps(
            {"mean": config.data.mean, "std": config.data.std, "size": image_size(config.data)}
        ),
    }
    unfinished = path.with_suffix(".tmp")
    unfinished.write_bytes(serialize({name: t.contiguous() for name, t in model.state_dict().items()}, metadata))
    unfinished.replace(path)


def fetch(source: str | Path) -> Path:
    """The ``model.safetensors`` of a hub repository, from the hub or from what was fetched before."""
    from huggingface_hub import hf_hub_download

    repository, filename = str(source).removeprefix(HUB), "model.safetensors"
    try:
        check_hub(repository, filename)
        return Path(hf_hub_download(repository, filename))
    except Exception as error:  # no network, no such repository, no such file: each library version has its own
        raise UserError(
            f"no model.safetensors could be fetched from {source} ({one_line(error)}); give a file's path"
        ) from error


def read_weights(path: str | Path) -> Weights:
    """Read a ``.safetensors`` or ``.ckpt`` of ours, or the ``model.safetensors`` of ``hf-hub:OWNER/NAME``.

    Raises:
        UserError: not there, damaged, or not ours.
    """
    path = fetch(path) if str(path).startswith(HUB) else Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata: dict[str, Any] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            stored = {"recipe": metadata["recipe"], "config": json.loads(metadata["config"])}
        else:
            # weights_only: a checkpoint must not be able to run code
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            stored = checkpoint["itpn"]
            state = checkpoint["state_dict"]
            tensors = {n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")}
        return Weights(stored["recipe"], from_dict(stored["config"]), tensors)
    except UserError as error:  # a setting that this version does not know
        raise UserError(f"checkpoint {path}: {error}; it may be of a newer itpn") from error
    except (KeyError, TypeError, SafetensorError, RuntimeError, OSError, ValueError, EOFError) as error:
        reason = "has no itpn settings in it" if isinstance(error, KeyError | TypeError) else "is damaged"
        raise UserError(f"checkpoint {path} {reason}; give a model.safetensors or .ckpt of an itpn run") from error
    except Exception as error:  # an unpickling error of whatever class
        raise UserError(f"checkpoint {path} is not a checkpoint of itpn ({type(error).__name__})") from error


# what only pre-training has
HEADS = {
    "decoder": "decoder",
    "auxiliary": "auxiliary head",
    "pyramid_heads": "set of heads for pyramid levels",
    "mask_token": "mask token",
}


def load_weights(model: MaskedImageModel, weights: Weights, source: str) -> list[str]:
    """Copy a file's weights into a model that may differ in image size and in what it predicts.

    Returns:
        What is not as in the file, a sentence each: tables resampled, a decoder that starts fresh.

    Raises:
        UserError: backbone or pyramid differ: in shapes, in heads, or in tensors that only one of the two has.
    """
    own = model.state_dict()
    tensors = dict(weights.tensors)
    notes = []
    wanted = model.backbone.grid_size
    if weights.grid != wanted:
        for name in [n for n in tensors if n in own and n.endswith(("pos_embed", "relative_position_bias_table"))]:
            resample = resample_relative_table if name.endswith("bias_table") else resample_position_table
            tensors[name] = resample(tensors[name], weights.grid, wanted)
            notes.append(f"{name} of {source} was resampled from {weights.grid} to {wanted} units")

    differing = [n for n in {**own, **tensors} if _shape(own, n) != _shape(tensors, n)]
    trunk = [name for name in differing if not name.startswith(tuple(HEADS))]
    heads = (BACKBONES[weights.config.model.name]["num_heads"], model.backbone.num_heads)
    if trunk or heads[0] != heads[1]:
        what = (
            f"{trunk[0]} is {_shape(tensors, trunk[0])} there and {_shape(own, trunk[0])} here"
            if trunk
            else (f"it has {heads[0]} attention heads, this one {heads[1]}")
        )
        raise UserError(
            f"checkpoint {source} holds another model ({weights.config.model.name}, patch size "
            f"{weights.config.model.patch_size}): {what}"
        )
    for part, title in HEADS.items():
        changed = any(name.startswith(part) for name in differing)
        if part == "decoder" and model.decoder is not None and len(model.decoder.blocks):
            changed = changed or weights.config.model.decoder_heads != model.decoder.num_heads
        if not changed:
            continue
        # all or nothing: half a decoder is of no use
        if any(name.startswith(part) for name in own):
            notes.append(f"{source} has no {title} that fits: it starts fresh")
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(part)}
    model.load_state_dict(tensors, strict=False)
    return notes


def _shape(tensors: dict[str, Tensor], name: str) -> str:
    return "x".join(map(str, tensors[name].shape)) if name in tensors else "missing"


def load(checkpoint: str | Path, **overrides: Any) -> MaskedImageModel:
    """Build the model that a checkpoint of ours holds, with its weights, in eval mode.

    Args:
        checkpoint: ``model.safetensors`` or a ``.ckpt`` of a run.
        overrides: settings of :class:`itpn.config.ModelConfig`, or ``img_size``, that differ from the file's.

    Raises:
        UserError: no such file, not ours, or the overrides ask for a model that the weights do not fit.
    """
    weights = read_weights(checkpoint)
    config = override_model(weights.config, overrides)
    model = build_masked_model(config.model, image_size(config.data), config.teacher)
    for note in load_weights(model, weights, str(checkpoint)):
        warnings.warn(note, stacklevel=2)
    return model.eval()
