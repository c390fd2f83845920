"""timm's layout for the hub: our names without a prefix, and a config.json beside the weights."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from itpn.checkpoints.adapters.ours import check_metadata
from itpn.errors import UserError
from itpn.models.position import Grid
from itpn.system.text import read_text

PIXELS = "pixels"  # our section of config.json, of which timm knows nothing
STORED = ("dtype", "channels", "value_range", "value_range_per_image", "nodata")  # of images that are no photographs


def read_metadata(path: Path) -> dict[str, Any]:
    """What a config.json says: the arguments that shapes of tensors do not tell, preprocessing, classes.

    Returns:
        Nothing where there is no such file, or a file of something else.

    Raises:
        UserError: its preprocessing is of another kind than timm's.
    """
    try:
        config = json.loads(read_text(path))
        own = config["pretrained_cfg"]
        preprocessing = {"mean": own["mean"], "std": own["std"], "size": own["input_size"][1:]}
        preprocessing |= {name: value for name, value in config.get(PIXELS, {}).items() if name in STORED}
        arguments = config.get("model_args", {})
    except (UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    found = check_metadata({"model_args": arguments, "preprocessing": preprocessing}, str(path))
    names = config.get("label_names")  # timm allows a mapping as well
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        found["classes"] = names
    return found


def read_stored_grid(pretrained_cfg: dict[str, Any], tensors: dict[str, Tensor]) -> Grid | None:
    """Rows and columns of a file's position tables, from the image size in timm's ``pretrained_cfg``.

    Returns:
        None if that size does not fit the table: for a file given by hand, ``pretrained_cfg`` holds the default of
        the variant, not the file's size.
    """
    table, patch = tensors.get("backbone.pos_embed"), tensors.get("backbone.patch_embed.proj.weight")
    if table is None or patch is None:
        return None
    height, width = pretrained_cfg["input_size"][-2:]
    grid = (height // (4 * patch.shape[2]), width // (4 * patch.shape[3]))
    return grid if grid[0] * grid[1] == table.shape[1] else None
