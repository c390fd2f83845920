"""Settings as YAML and JSON, of whichever kind of run."""

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

import yaml

from itpn.config.classification import ClassificationConfig
from itpn.config.detection import DetectionConfig
from itpn.config.pretraining import Config
from itpn.config.segmentation import SegmentationConfig
from itpn.config.training import to_dict
from itpn.errors import UserError
from itpn.system.text import read_text
from itpn.system.writing import write_whole

MAX_YAML = 2**20  # bytes: 20,000 class names and more
MAX_VALUES = 10**6
FineTuningRun = ClassificationConfig | DetectionConfig | SegmentationConfig
RunConfig = Config | FineTuningRun
CONFIGS: dict[str, type[RunConfig]] = {
    cls.task: cls for cls in (Config, ClassificationConfig, DetectionConfig, SegmentationConfig)
}


def from_dict(settings: dict[str, Any], cls: Any = Config) -> Any:
    """Undo :func:`to_dict`; settings that are not there keep their default, unknown ones are a :class:`UserError`."""

    def build(cls: Any, values: dict[str, Any], path: str) -> Any:
        types = typing.get_type_hints(cls)
        known = {field.name for field in dataclasses.fields(cls)}
        kwargs = {}
        for key, value in values.items():
            if key not in known:
                raise UserError(f"unknown setting {path}{key}")
            if dataclasses.is_dataclass(types[key]):
                value = build(types[key], value, f"{key}.")
            elif isinstance(value, str) and float in (types[key], *typing.get_args(types[key])):
                value = float(value)  # YAML takes 1e-3 for text
            kwargs[key] = tuple(value) if isinstance(value, list) else value
        return cls(**kwargs)

    return build(cls, settings, "")


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


def read_yaml(path: Path) -> tuple[str, RunConfig]:
    """Recipe name and settings of a run's config.yaml."""
    try:
        settings = load_yaml(path)
        recipe = settings.pop("recipe")
        return recipe, from_dict(settings, CONFIGS[settings.pop("task", Config.task)])
    except (yaml.YAMLError, KeyError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a run's config.yaml ({type(error).__name__}: {error})") from error


def write_yaml(path: Path, recipe: str, config: RunConfig) -> None:
    """Write what repeats the run: `itpn train config.yaml`."""
    content = yaml.safe_dump({"recipe": recipe, "task": config.task, **to_dict(config)}, sort_keys=False)
    write_whole(path, content.encode())
