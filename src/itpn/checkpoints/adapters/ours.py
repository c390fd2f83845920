"""Our own files, of this version and of older ones: what their metadata says."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from itpn.checkpoints.adapters.renaming import Adapter, Tensors
from itpn.checkpoints.io import describe_error
from itpn.checkpoints.older_settings import update_settings
from itpn.errors import UserError
from itpn.models.heads import heads
from itpn.models.position import Grid
from itpn.models.spec import NetworkSpec

# what metadata holds as JSON, and its types
TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("network", "settings", "preprocessing"), dict),
    **dict.fromkeys(("config", "architecture"), dict),  # before the network had one description
    **dict.fromkeys(("classes", "colours", "guessed"), (list, tuple)),
}

CLASSIFIER = ("num_classes", "fc_norm")  # which were among the backbone's arguments


class Ours(Adapter):
    title = "itpn or timm"

    def to_ours(self, tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Names without a prefix are a backbone's."""
        bare = not any(name.startswith("backbone.") for name in tensors)
        return {f"backbone.{name}" if bare else name: tensor for name, tensor in tensors.items()}, {}

    def from_ours(self, tensors: Tensors, rel_pos_grid: Grid | None = None) -> tuple[dict[str, Tensor], list[str]]:
        return dict(tensors), []


def read_metadata(stored: Mapping[str, str], what: str) -> dict[str, Any]:
    """Metadata of a safetensors file of ours.

    Raises:
        UserError: it is corrupt.
    """
    try:
        parts = {name: json.loads(stored[name]) for name in TYPES if name in stored}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} has corrupt metadata ({describe_error(error)})") from error
    return check_metadata({**stored, **parts}, what)


def check_metadata(metadata: dict[str, Any], what: str) -> dict[str, Any]:
    """Metadata of which each part has its type.

    Raises:
        UserError: a part has another.
    """
    for name, kind in TYPES.items():
        part = metadata.get(name)
        if part is not None and not isinstance(part, kind):
            raise UserError(f"{what} has corrupt metadata (its {name} is a {type(part).__name__})")
    if not all(isinstance(name, str) for name in metadata.get("classes") or ()):
        raise UserError(f"{what} has corrupt metadata (a name of its classes is none)")
    for name in ("mean", "std"):
        values = (metadata.get("preprocessing") or {}).get(name, ())
        if not isinstance(values, list | tuple) or not all(isinstance(value, int | float) for value in values):
            raise UserError(f"{what} has corrupt metadata (the {name} of its preprocessing is no list of numbers)")
    own = metadata.get("preprocessing") or {}
    if own.get("dtype", "photo") != "photo":  # images of any channels, which nothing else describes
        for name, kind in (("channels", int), ("value_range", (list, tuple))):
            if not isinstance(own.get(name), kind):
                raise UserError(f"{what} has corrupt metadata (its preprocessing has a dtype, and no {name})")
    if "config" in metadata:  # of pre-training, before all tasks called it so
        metadata["settings"] = metadata.pop("config")
    if metadata.get("settings"):
        metadata["settings"] = update_settings(metadata["settings"])
    return metadata


def read_network(metadata: Mapping[str, Any], source: str) -> NetworkSpec | None:
    """The network that metadata describes; None where it describes none.

    Raises:
        UserError: it is corrupt, or of a newer version.
    """
    try:
        if (stored := metadata.get("network")) is not None:
            return NetworkSpec(**stored)
        if (stored := metadata.get("architecture")) is not None:
            return _read_architecture(stored)
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"checkpoint {source} has corrupt metadata; it may be of a newer itpn") from error
    if "settings" not in metadata:
        return None
    known = heads()
    task = metadata.get("task")
    try:  # the first files did not name their task
        specs = [known[task]] if task in known else known.values()
        found = (head.from_settings(metadata["settings"], {}) for head in specs)
        return next((spec for spec in found if spec is not None), None)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"checkpoint {source} has corrupt settings in it ({describe_error(error)})") from error
    except UserError as error:  # a setting that this version does not know
        raise UserError(f"checkpoint {source}: {error}; it may be of a newer itpn") from error


def _read_architecture(stored: dict[str, Any]) -> NetworkSpec:
    """The network of a file that was written before a head was held by name and options."""
    backbone = {key: value for key, value in stored["backbone"].items() if key not in CLASSIFIER}
    spec = NetworkSpec(backbone, stored.get("pyramid"), name_levels(stored.get("levels", "pyramid")))
    for name, head in heads().items():
        if (options := head.from_architecture(stored)) is not None:
            return replace(spec, head=name, options=options)
    return spec


def name_levels(levels: str) -> str:
    """The maps of a pyramid, which were called by the head that takes them."""
    head = heads().get(levels)
    return levels if head is None else head.levels


def read_guesses(metadata: Mapping[str, Any]) -> list[str]:
    """What was guessed when a public file was converted to this one."""
    return list(metadata.get("guessed") or metadata.get("architecture", {}).get("guessed", ()))
