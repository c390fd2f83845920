"""Small YAML files, of which a few bytes may stand for any amount of data."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from itpn.system.text import read_text

MAX_YAML = 2**20  # bytes: 20,000 class names and more
MAX_VALUES = 10**6


class _OneOfEachKey:
    """Refuses duplicate keys, of which YAML's readers keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := next((key for key, count in keys.items() if count > 1), None):
            raise ValueError(f"{twice} is there twice")
        made: dict[Any, Any] = super().construct_mapping(node, deep)  # type: ignore[misc]  # of the reader beside it
        return made


class Plain(_OneOfEachKey, yaml.SafeLoader):
    """Reads numbers, True and False, dates and text."""


class Text(_OneOfEachKey, yaml.BaseLoader):
    """Leaves every value the text that it is."""


def load_yaml(path: Path, loader: type[Plain | Text] = Plain) -> Any:
    """Plain data of a small YAML file.

    Raises:
        UserError: it cannot be read, or is no text.
        yaml.YAMLError, ValueError, RecursionError: it is no YAML, a key stands twice in one place, or aliases in it
            stand for more than they say.
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
