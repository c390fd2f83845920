"""The networks by name, for ``timm.create_model``, and the weights of any origin that timm may load into them.

Runs as soon as timm is imported, which may be in the middle of our own model files: they are imported when needed.
"""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from timm.models import _registry, build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from itpn.models.variants import BACKBONES, PUBLISHED_PYRAMID, PYRAMIDS, WITH_PYRAMID


def _cfg(prefix: str = "") -> dict[str, Any]:
    return {
        "url": "",  # nobody publishes these weights yet in a form that timm could fetch
        "num_classes": 0 if prefix else 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": f"{prefix}patch_embed.proj",
        "classifier": None if prefix else "head",
        "license": "apache-2.0",
    }


_cfgs: dict[str, Any] = {name: _cfg() for name in BACKBONES}
_cfgs |= {name: _cfg("backbone.") for name in WITH_PYRAMID.values()}
default_cfgs = generate_default_cfgs(_cfgs)


def _build(registered: str, name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Have timm build a backbone, or one with its pyramid, and record which of the network's arguments were given.

    ``device`` and ``dtype`` are timm's: where the model is built, and what its numbers are.
    """
    from itpn.checkpoints.adapters.ours import name_levels
    from itpn.models.build import backbone_arguments, make_backbone, make_pyramid
    from itpn.models.pyramid import LEVELS

    make: Callable[..., nn.Module]
    make, settings, count = make_backbone, BACKBONES[name], 3
    if registered != name:
        make, own = make_pyramid, PYRAMIDS.get(name, PUBLISHED_PYRAMID)
        settings = {**settings, "pyramid_width": own["width"], "pyramid_depth": own["depth"]}
        if "levels" in kwargs:
            kwargs["levels"] = name_levels(kwargs["levels"])  # of an older config.json
        count = LEVELS.get(kwargs.get("levels", "pyramid"), 0)  # a wrong one is the network's to refuse
    feature_cfg = {"out_indices": kwargs.pop("out_indices", tuple(range(count))), "feature_cls": "getter"}
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
    whole = {**settings, **kwargs}
    known = {*backbone_arguments(whole.get("kind", "hivit")), *inspect.signature(make).parameters}
    with contextlib.nullcontext() if device is None else torch.device(device):
        model: Any = build_model_with_cfg(
            make, registered, pretrained, pretrained_filter_fn=filter_weights, feature_cfg=feature_cfg, **whole
        )
    model.to(dtype=dtype)
    model.model_args = {argument: value for argument, value in kwargs.items() if argument in known}
    return model


def filter_weights(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """What timm puts a file's tensors through: any public names to ours, tables to the model's grid, the rest away."""
    from itpn.checkpoints.adapters import ADAPTERS, detect_layout
    from itpn.checkpoints.adapters.timm import read_stored_grid
    from itpn.checkpoints.files import named_tensors
    from itpn.checkpoints.match import check_numbers
    from itpn.models.backbone import CLASSIFIER, Backbone, find_backbone
    from itpn.models.position_tables import fit_tables

    layout = detect_layout(state_dict)
    if layout is None:
        return state_dict  # not ours: loading it will say so
    named, _ = ADAPTERS[layout].to_ours(state_dict)
    alone = isinstance(model, Backbone)
    parts = ("backbone.",) if alone else ("backbone.", "pyramid.")
    tensors = {n: t for n, t in named.items() if n.startswith(parts) and (alone or not n.startswith(CLASSIFIER))}
    grid = read_stored_grid(model.pretrained_cfg, tensors)
    own = named_tensors(model)
    check_numbers(tensors, own, "the file")
    fit_tables(tensors, own, find_backbone(model), grid)
    return {name.removeprefix("backbone."): t for name, t in tensors.items()} if alone else tensors


def _register(registered: str, name: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _build(registered, name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = registered
    register_model(entrypoint)


for _name in BACKBONES:
    _register(_name, _name)
# What timm.list_models() names is taken for a classifier, by timm's own tests first of all, and a pyramid is none.
# This is the one list of names that timm creates and does not list; creating one of ours warns of nothing.
_unlisted = getattr(_registry, "_deprecated_models", {})
for _name, _registered in WITH_PYRAMID.items():
    _register(_registered, _name)
    _unlisted[_registered] = None
