"""Backbones as repositories of the Hugging Face hub, in timm's layout: config.json and model.safetensors.

What is written here, plain timm reads as well: ``timm.create_model("hf-hub:OWNER/NAME", pretrained=True)``.
"""

import contextlib
import copy
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from itpn.checkpoints.adapters.timm import PIXELS
from itpn.checkpoints.io import describe_error
from itpn.checkpoints.paths import HUB
from itpn.errors import UserError
from itpn.models.backbone import Backbone, find_backbone
from itpn.models.pyramid import PyramidBackbone
from itpn.models.spec import TRAINING_ONLY

PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
CARD = """---
tags:
- {task}
- timm
- itpn
library_name: timm
pipeline_tag: {task}
---
# {name}

```python
import itpn  # registers its networks with timm
import timm

model = timm.create_model("hf-hub:{repository}", pretrained=True)
```
"""


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    label_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that :func:`from_pretrained` and ``timm.create_model("local-dir:FOLDER")`` read.

    Args:
        model: a backbone made by ``timm.create_model``.
        label_names: a name for each class; those that came with the model's weights if None.
        preprocessing: mean, std, interpolation, crop_pct or crop_mode, where they are not what the model came with.

    Raises:
        UserError: not such a model, or one changed so much that its arguments do not build it any more; names or
            preprocessing that do not fit.
    """
    arguments = getattr(model, "model_args", None)
    if not isinstance(model, Backbone | PyramidBackbone) or arguments is None:
        ours = isinstance(model, Backbone | PyramidBackbone)
        why = ": timm builds networks of registered sizes alone" if ours else ""
        raise UserError(
            f"only a backbone made by timm.create_model can be saved for the hub, not this {type(model).__name__}{why}"
        )
    if unknown := sorted(set(preprocessing or {}) - set(PREPROCESSING)):
        raise UserError(f"preprocessing has no {unknown[0]}; it may have {', '.join(PREPROCESSING)}")
    names = model.pretrained_cfg.get("label_names")
    if label_names is not None:
        names = list(label_names)
        if len(names) != model.num_classes:
            raise UserError(f"{len(names)} label_names for {model.num_classes} classes")
    elif names is not None and len(names) != model.num_classes:
        names = None  # of the classifier before reset_classifier

    arguments = {name: value for name, value in arguments.items() if name not in TRAINING_ONLY}
    arguments |= _read_arguments(model)
    written = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # safetensors takes nothing else
    written.pretrained_cfg = {
        **{name: value for name, value in model.pretrained_cfg.items() if name != PIXELS},
        "input_size": (model.in_chans, *arguments["img_size"]),
        # timm before it recorded channels takes all weights for those of three, and would draw the first layer anew
        "first_conv": model.pretrained_cfg["first_conv"] if model.in_chans == 3 else None,
        "num_classes": model.num_classes,
        "label_names": None,  # they have a place of their own
        **(preprocessing or {}),
    }
    _check_rebuilding(written, arguments)
    pixels = model.pretrained_cfg.get(PIXELS)
    save_for_hf(
        written,
        str(folder),
        model_config={"label_names": names, **({PIXELS: pixels} if pixels else {})},
        model_args=arguments,
        safe_serialization=True,
    )


def _read_arguments(model: Backbone | PyramidBackbone) -> dict[str, Any]:
    """The arguments that a model's methods may have changed, or that timm's defaults would decide."""
    backbone = find_backbone(model)
    arguments: dict[str, Any] = {
        "img_size": [side * backbone.patch_size for side in backbone.grid_size],
        "in_chans": model.in_chans,
        "num_classes": model.num_classes,
    }
    return arguments | ({} if isinstance(model, PyramidBackbone) else {"global_pool": model.global_pool})


def _check_rebuilding(model: Backbone | PyramidBackbone, arguments: dict[str, Any]) -> None:
    with torch.device("meta"):
        built = timm.create_model(model.pretrained_cfg["architecture"], **arguments)
    there, here = ({name: t.shape for name, t in m.state_dict().items()} for m in (model, built))
    if differing := [name for name in {**there, **here} if there.get(name) != here.get(name)]:
        raise UserError(
            f"the model was changed after timm.create_model: its arguments build another one ({differing[0]} and "
            f"{len(differing) - 1} more tensors differ)"
        )


def push_to_hub(
    model: nn.Module,
    repository: str,
    label_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    private: bool = False,
    token: str | None = None,
    message: str = "Add model",
) -> str:
    """Upload what :func:`save_pretrained` writes to OWNER/NAME on the hub, which is made if it is not there.

    Args:
        private: of a repository that is made.
        token: of the hub; None for that of ``hf auth login``.

    Returns:
        The address of the commit.

    Raises:
        UserError: as :func:`save_pretrained`; no network, or no right to write there.
    """
    from huggingface_hub import HfApi

    repository = repository.removeprefix(HUB)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, label_names, preprocessing)
        api = HfApi(token=token, library_name="timm", library_version=timm.__version__)
        try:
            repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
            if not api.file_exists(repository, "README.md"):
                classifies = bool(getattr(model, "num_classes", 0))
                task = "image-classification" if classifies else "image-feature-extraction"
                card = CARD.format(task=task, name=repository.rpartition("/")[2], repository=repository)
                (Path(folder) / "README.md").write_text(card, encoding="utf-8")
            return api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message).commit_url
        except Exception as error:  # each library version has its own classes for the many reasons
            raise UserError(f"nothing was uploaded to {HUB}{repository} ({describe_error(error)})") from error


def from_pretrained(source: str | Path, **overrides: Any) -> nn.Module:
    """A backbone with its weights, in eval mode.

    Args:
        source: a folder of :func:`save_pretrained`, or ``hf-hub:OWNER/NAME``.
        overrides: arguments of ``timm.create_model`` that differ from the stored ones. Position tables are resampled
            to another ``img_size``, the first layer adapted to other ``in_chans``, and a classifier of another
            ``num_classes`` is randomly initialized.

    Raises:
        UserError: not there, corrupt, not a repository in timm's layout, or its weights do not fit the overrides.
    """
    online = str(source).startswith(HUB)
    if not online and not (Path(source) / "config.json").is_file():
        raise UserError(
            f"{source} is no folder with a config.json; give one that save_pretrained wrote, or {HUB}OWNER/NAME"
        )
    try:
        if online:
            check_hub(str(source).removeprefix(HUB).partition("@")[0], "config.json")
        name = str(source) if online else f"local-dir:{Path(source).resolve()}"
        model: Any = timm.create_model(name, pretrained=True, **overrides).eval()
    except Exception as error:  # no network, a corrupt file, other networks, wrong arguments: of as many classes
        reason = describe_mismatch(error) if "state_dict" in str(error) else describe_error(error)
        raise UserError(f"no model could be made of {source}: {reason}") from error
    names = model.pretrained_cfg.get("label_names")
    if names is not None and len(names) != model.num_classes:
        model.pretrained_cfg["label_names"] = None  # of the classifier that was there before
    return model


def fetch(source: str) -> Path:
    """The ``model.safetensors`` of a hub repository, from the hub or from what was fetched before.

    Raises:
        UserError: no network, no such repository, or no such file in it.
    """
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
            f"no model.safetensors could be fetched from {source} ({describe_error(error)}); give a file's path"
        ) from error


def check_hub(repository: str, filename: str | None) -> None:
    """Raise at once what is in the way to the hub: its own client retries for most of a minute, and says so often."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import HfHubHTTPError

    if cached_file(repository, filename) is not None:
        return
    # the hub's answer, that a file is not there for example, is timm's to deal with
    with contextlib.suppress(HfHubHTTPError):
        get_hf_file_metadata(hf_hub_url(repository, filename or "model.safetensors"), timeout=5)


def cached_file(repository: str, filename: str | None) -> str | None:
    """The file that timm takes weights from, where the hub's client has it; None if it has not."""
    from huggingface_hub import try_to_load_from_cache

    # timm prefers a safetensors twin of whatever file is named
    twin = [f"{filename.rpartition('.')[0]}.safetensors"] if filename and filename.endswith(".bin") else []
    names = [*twin, *([filename] if filename else []), "model.safetensors", "open_clip_model.safetensors"]
    found = (try_to_load_from_cache(repository, name) for name in [*names, "pytorch_model.bin"])
    return next((path for path in found if isinstance(path, str)), None)


def describe_mismatch(error: Exception) -> str:
    """The first thing that does not fit, of all that torch lists."""
    text = str(error)
    if found := re.search(r"size mismatch for (\S+): .*?\[([\d, ]*)\].*?\[([\d, ]*)\]", text):
        there, here = (f"[{shape}]" for shape in found.groups()[1:])
        return f"{found[1]} is {there} there, {here} in the model"
    if found := re.search(r'Missing key\(s\) in state_dict: "(.*?)"', text):
        return f"it has no {found[1]}"
    if found := re.search(r'Unexpected key\(s\) in state_dict: "(.*?)"', text):
        return f"the model has no {found[1]}"
    return f"timm cannot convert it ({describe_error(error)})"
