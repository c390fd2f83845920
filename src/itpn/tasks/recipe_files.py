"""Recipes: where they are, and how one is read."""

import ast
import difflib
import fnmatch
import hashlib
import importlib.util
import os
import signal
import stat
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from itpn.errors import WRONG_PATH, RunStopped, UserError
from itpn.models.heads import UnknownTask
from itpn.models.variants import BACKBONES
from itpn.system.checks import check_type
from itpn.tasks.spec import all_tasks, find_task
from itpn.training.config import (
    RunConfig,
    StoredSettings,
    check_types,
    from_dict,
    is_folder_name,
    not_settings,
    read_yaml,
)

FIRST_TASK = "pretraining"  # of the first files, which did not name their task


def recipe_files() -> dict[str, Path]:
    """Recipe name to file, sorted by name."""
    installed = Path(__file__).parents[1] / "configs"  # in a wheel; beside src/ in a checkout
    folder = installed if installed.is_dir() else Path(__file__).parents[3] / "configs"
    return {path.stem: path for path in sorted(folder.rglob("*.py"), key=lambda path: path.stem)}


def list_recipes(pattern: str = "*") -> list[str]:
    """Names of recipes that match a shell pattern."""
    check_type(pattern, str, "pattern")
    return fnmatch.filter(recipe_files(), pattern)


def describe(path: Path) -> str:
    """First line of a recipe file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_bytes())) or "").partition("\n")[0]


def read_recipe(name: str) -> tuple[str, RunConfig]:
    """Name and settings of a recipe, given by name, as a Python file, or as the config.yaml of a run.

    Raises:
        UserError: no such recipe (the nearest are named), or the file has a mistake.
    """
    files = recipe_files()
    path = files.get(name, Path(name))
    if not is_file(path):
        check_suffix(name)
        raise UserError(f"no recipe {name!r}{nearest(name, list(files), cutoff=0.4) or '; see `itpn list`'}")
    if path.suffix.lower() in (".yaml", ".yml"):
        return _read_run_settings(path)
    config = getattr(_import_file(path), "config", None)
    if not isinstance(config, RunConfig) or not hasattr(config, "task"):
        kinds = ", ".join(task.config.__name__ for task in all_tasks())
        raise UserError(f"recipe file {path} must set `config` to one of {kinds} of itpn.tasks.configs")
    try:
        find_task(config.task)
    except UnknownTask:
        raise UserError(
            f"recipe file {path} sets a config of the task {config.task!r}, which it does not register: call "
            "itpn.register_task in it, or import what does"
        ) from None
    _check_values(path, config)
    return path.stem, config


def is_file(path: str | Path) -> bool:
    """Whether there is a file that can be reached; no name is too long to ask.

    Raises:
        OSError: it cannot be told.
    """
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in WRONG_PATH:
            return False
        raise


def check_suffix(name: str) -> None:
    """Raise :class:`UserError` where a name that is no file was meant as one, by its suffix."""
    if Path(name).suffix.lower() in (".py", ".yaml", ".yml"):
        raise UserError(f"recipe file {name} {_why_no_file(Path(name))}")


def _why_no_file(path: Path) -> str:
    """What a path is that is no file, after its name."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        reason = error.strerror or str(error)
        return "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {reason}"
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return f"is a {kinds.get(stat.S_IFMT(mode), 'device')}, not a file"


def _check_values(path: Path, config: RunConfig) -> None:
    """Raise :class:`UserError` for a setting of a file that has another type or range than it may have."""
    try:
        check_types(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _import_file(path: Path) -> ModuleType:
    """A recipe file as a module, so that classes in it can be looked up by name; it may register a task of its own.

    Raises:
        UserError: it does not run.
    """
    name = f"itpn_recipe_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"recipe file {path} must be a Python file (.py)")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (UserError, RunStopped):
        raise
    except BaseException as error:  # whatever a user's file may raise, the end of the interpreter as well
        if isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            raise  # Ctrl-C outside of a command, in which it raises RunStopped
        raise UserError(f"recipe file {path} does not run: {type(error).__name__}: {error}") from error
    return module


def read_settings(path: Path) -> tuple[str, RunConfig]:
    """Recipe name and settings of a run's config.yaml.

    Raises:
        UserError: it is something else, or of a task that is not known.
    """
    return parse_settings(path, read_yaml(path))


def parse_settings(path: Path, stored: StoredSettings) -> tuple[str, RunConfig]:
    """Settings that a file holds."""
    if not isinstance(stored.recipe, str) or not is_folder_name(stored.recipe):  # its runs have a folder of that name
        raise not_settings(path, f"its recipe must be a plain name, not {stored.recipe!r}")
    if not isinstance(stored.task, str):
        raise not_settings(path, f"its task must be a name, not {stored.task!r}")
    kind = find_task(stored.task or FIRST_TASK).config
    try:
        config = from_dict(stored.values, kind)
    except (UserError, TypeError) as error:
        raise not_settings(path, str(error)) from error
    except (KeyError, AttributeError, ValueError) as error:
        raise not_settings(path, error) from error
    _check_values(path, config)
    return stored.recipe, config


def _read_run_settings(path: Path) -> tuple[str, RunConfig]:
    """Of a config.yaml; where it is corrupt, of the checkpoint of the run that it belongs to."""
    try:
        return read_settings(path)
    except UserError:
        last = path.parent / "checkpoints" / "last.ckpt"
        if not last.exists():
            raise
        from itpn.training.run_state import CorruptCheckpoint, find_settings, read_state  # torch takes its time

        try:
            found = find_settings(read_state(last, whole=False))
        except CorruptCheckpoint:
            found = None
        if found is None:
            raise
        settings = parse_settings(last, found)
        print(f"{path} is corrupt: its settings are taken from {last}", file=sys.stderr)
        return settings


def check_recipe(config: RunConfig) -> None:
    """Find impossible settings as a run does, where there is nothing to start from yet.

    Raises:
        UserError: the first that is found.
    """
    model: Any = config.model
    if hasattr(model, "scratch"):
        model = replace(model, scratch=True, checkpoint=None, name=model.name or next(iter(BACKBONES)))
    replace(config, model=model).check()
    if config.model.name is not None:
        check_model_name(config.model.name)


def check_model_name(name: str) -> None:
    """Raise :class:`UserError` where no model has this name; the nearest is named."""
    if name not in BACKBONES:
        raise UserError(f"no model {name!r}{nearest(name, list(BACKBONES))}; see `itpn list`")


def nearest(name: str, names: list[str], cutoff: float = 0.6) -> str:
    """A hint at the right name ("; did you mean X?") to append to a message, or an empty string."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""
