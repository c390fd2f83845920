"""Small YAML files, of which a few bytes may stand for any amount of data."""

import math
from pathlib import Path
from typing import Any

import yaml

from itpn.system.text import read_text

MAX_YAML = 2**20  # bytes: 20,000 class names and more
MAX_VALUES = 10**6


def load_yaml(path: Path, loader: type[yaml.SafeLoader] | type[yaml.BaseLoader] = yaml.SafeLoader) -> Any:
    """Plain data of a small YAML file.

    Args:
        loader: `yaml.BaseLoader` leaves every value the text that it is.

    Raises:
        UserError: it cannot be read, or is no text.
        yaml.YAMLError, ValueError, RecursionError: it is no YAML, or aliases in it stand for more than they say.
    """
    content = yaml.load(read_text(path, most=MAX_YAML), Loader=loader)
    sizes: dict[int, float] = {}

    def size_of(value: Any) -> float:
        """How many values it is written out; a list that holds itself has no end."""
        if not isinstance(value, dict | list):
            return 1
        if id(value) not in sizes:
            sizes[id(value)] = math.inf  # while it is looked at
            parts = (*value.keys(), *value.values()) if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(map(size_of, parts))
        return sizes[id(value)]

    if size_of(content) > MAX_VALUES:
        raise ValueError(f"its aliases stand for more than {MAX_VALUES:,} values")
    return content
