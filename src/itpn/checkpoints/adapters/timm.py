"""timm's layout for the hub: our names without a prefix, and a config.json beside the weights."""

import json
from pathlib import Path
from typing import Any

from itpn.checkpoints.adapters.ours import check_metadata
from itpn.errors import UserError
from itpn.system.text import read_text


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
        arguments = config.get("model_args", {})
    except (UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    found = check_metadata({"model_args": arguments, "preprocessing": preprocessing}, str(path))
    names = config.get("label_names")  # timm allows a mapping as well
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        found["classes"] = names
    return found
