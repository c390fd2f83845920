"""Settings as YAML and JSON, of whichever kind of run."""

import dataclasses
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
from itpn.text import read_text

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


def read_yaml(path: Path) -> tuple[str, RunConfig]:
    """Recipe name and settings of a run's config.yaml."""
    try:
        settings = yaml.safe_load(read_text(path))
        recipe = settings.pop("recipe")
        return recipe, from_dict(settings, CONFIGS[settings.pop("task", Config.task)])
    except (yaml.YAMLError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a run's config.yaml ({type(error).__name__}: {error})") from error


def write_yaml(path: Path, recipe: str, config: RunConfig) -> None:
    """Write what repeats the run: `itpn train config.yaml`."""
    path.write_text(yaml.safe_dump({"recipe": recipe, "task": config.task, **to_dict(config)}, sort_keys=False))
