"""iTPN: pre-train a hierarchical vision transformer together with its feature pyramid.

Importing this is quick: torch and timm are imported by the calls that need them.
"""

import fnmatch
import importlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wrapt

from itpn.models.variants import BACKBONES, WITH_PYRAMID
from itpn.recipes import list_recipes

if TYPE_CHECKING:
    from itpn.pretraining.model import MaskedImageModel

__version__ = "0.1.0"
__all__ = ["get_model", "list_models", "list_recipes", "load"]

# timm knows our models as soon as both are imported, in either order
wrapt.register_post_import_hook(lambda _: importlib.import_module("itpn.models.registry"), "timm")


def list_models(pattern: str = "*") -> list[str]:
    """Names that ``timm.create_model`` knows once itpn is imported, by a shell pattern."""
    return fnmatch.filter([*BACKBONES, *WITH_PYRAMID.values()], pattern)


def get_model(recipe: str, pretrained: bool | str | Path = False, **overrides: Any) -> "MaskedImageModel":
    """Build the model of a recipe.

    Args:
        recipe: a name of :func:`list_recipes`, or a recipe file.
        pretrained: False for fresh weights; the path of a ``model.safetensors`` or ``.ckpt`` of a run; or
            ``hf-hub:OWNER/NAME``, a repository of the Hugging Face hub that holds a ``model.safetensors``.
        overrides: settings of :class:`itpn.config.ModelConfig` by name, and ``img_size``.

    Raises:
        itpn.errors.UserError: no such recipe, setting or file, or weights of another model.
    """
    from itpn.checkpoints.weights import load_weights, read_weights
    from itpn.config import image_size, override_model
    from itpn.errors import UserError
    from itpn.pretraining.build import build_masked_model
    from itpn.recipes import read_recipe

    if pretrained is True:
        raise UserError(
            f"no weights are published for {recipe}; give pretrained=PATH of a model.safetensors or .ckpt of a run, or "
            "pretrained='hf-hub:OWNER/NAME' of a hub repository with such a model.safetensors"
        )
    config = override_model(read_recipe(recipe)[1], overrides)
    model = build_masked_model(config.model, image_size(config.data), config.teacher)
    if pretrained:
        for note in load_weights(model, read_weights(pretrained), str(pretrained)):
            warnings.warn(note, stacklevel=2)
    return model


def load(checkpoint: str | Path, **overrides: Any) -> "MaskedImageModel":
    """The model that a checkpoint of ours holds, with its weights (see :func:`itpn.checkpoints.weights.load`)."""
    from itpn.checkpoints.weights import load

    return load(checkpoint, **overrides)
