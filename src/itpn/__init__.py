"""iTPN: pre-train a hierarchical vision transformer together with its feature pyramid.

Importing this is quick: torch and timm are imported by the calls that need them.
"""

import fnmatch
import importlib
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wrapt

from itpn.models.variants import BACKBONES, WITH_PYRAMID
from itpn.system.checks import PositiveInt, check_range, check_type
from itpn.tasks.recipe_files import list_recipes
from itpn.tasks.spec import TaskSpec, load_installed_tasks, register_task
from itpn.training.config import override_model

if TYPE_CHECKING:
    from torch import nn

    from itpn.checkpoints.hub import from_pretrained, push_to_hub, save_pretrained
    from itpn.checkpoints.load import load
    from itpn.checkpoints.report import inspect
    from itpn.data.formats.reader import read_image

__version__ = "0.1.0"
__all__ = [
    "TaskSpec",
    "from_pretrained",
    "get_model",
    "inspect",
    "list_models",
    "list_recipes",
    "load",
    "push_to_hub",
    "read_image",
    "register_task",
    "save_pretrained",
]
_LATER = {
    "load": "itpn.checkpoints.load",
    "inspect": "itpn.checkpoints.report",
    "from_pretrained": "itpn.checkpoints.hub",
    "push_to_hub": "itpn.checkpoints.hub",
    "save_pretrained": "itpn.checkpoints.hub",
    "read_image": "itpn.data.formats.reader",
}

# timm knows our models as soon as both are imported, in either order
wrapt.register_post_import_hook(lambda _: importlib.import_module("itpn.checkpoints.registry"), "timm")


def list_models(pattern: str = "*") -> list[str]:
    """Names that ``timm.create_model`` knows once itpn is imported, by a shell pattern."""
    check_type(pattern, str, "pattern")
    return fnmatch.filter([*BACKBONES, *WITH_PYRAMID.values()], pattern)


def get_model(recipe: str | Path, pretrained: bool | str | Path = False, **overrides: Any) -> "nn.Module":
    """Build the model of a recipe: a masked model of pre-training, a classifier, or a detector.

    Args:
        recipe: a name of :func:`list_recipes`, or a recipe file.
        pretrained: False for random weights; a checkpoint of any kind that :func:`load` reads, as a path or as
            ``hf-hub:OWNER/NAME``, a repository of the Hugging Face hub that holds a ``model.safetensors``.
        overrides: settings of the recipe's model by name (see :mod:`itpn.tasks.configs`), and ``img_size``;
            ``num_classes`` of a classifier, detector or segmenter, without the background.

    Raises:
        itpn.errors.UserError: no such recipe, setting or file, or weights of another model.
    """
    from itpn.checkpoints.files import read_checkpoint
    from itpn.errors import UserError
    from itpn.tasks.recipe_files import check_recipe, read_recipe
    from itpn.tasks.spec import task_of

    if pretrained is True:
        raise UserError(
            f"no weights are published for {recipe}; give pretrained=PATH of a checkpoint, or "
            "pretrained='hf-hub:OWNER/NAME' of a hub repository with a model.safetensors"
        )
    check_type(recipe, str | os.PathLike, "recipe")
    config = read_recipe(os.fspath(recipe))[1]
    check_recipe(config)
    classes = overrides.pop("num_classes", None)
    check_type(classes, PositiveInt | None, "num_classes")
    check_range(classes, PositiveInt | None, "num_classes")
    if overrides.get("channel_map") is not None and not pretrained:
        raise UserError("channel_map says which channels of a checkpoint are kept: give pretrained=PATH")
    found = read_checkpoint(pretrained) if pretrained else None
    model, notes = task_of(config).build_recipe(override_model(config, overrides), classes, found)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return model


def __getattr__(name: str) -> Any:
    """The functions that need torch, imported when they are used."""
    if name in _LATER:
        load_installed_tasks()
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module 'itpn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LATER])
