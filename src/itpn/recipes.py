"""Recipes: where they are, how one is read, and the functions that their files call."""

import ast
import difflib
import fnmatch
import runpy
from pathlib import Path

from itpn.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainerConfig, read_yaml
from itpn.errors import UserError


def pixel_pretraining(model: str, max_epochs: int) -> Config:
    """Pixel supervision as published: 4096 images a step on 8 GPUs (Tian et al. 2023, section 4.1)."""
    return Config(
        model=ModelConfig(name=model),
        data=DataConfig(batch_size=512),
        optimizer=OptimizerConfig(base_lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05, warmup_epochs=40),
        trainer=TrainerConfig(max_epochs=max_epochs),
    )


def small_pixel_pretraining(model: str, decoder: tuple[int, int, int], img_size: int, max_epochs: int) -> Config:
    """Pixel supervision for one machine and thousands of images, not millions.

    Args:
        decoder: its width, depth and heads.
    """
    width, depth, heads = decoder
    return Config(
        model=ModelConfig(name=model, patch_size=8, decoder_width=width, decoder_depth=depth, decoder_heads=heads),
        data=DataConfig(root=("data/images",), img_size=img_size, batch_size=64, num_workers=2),
        # small batches bear a larger step per image than the published 4096
        optimizer=OptimizerConfig(base_lr=2e-3, warmup_epochs=40),
        trainer=TrainerConfig(max_epochs=max_epochs, checkpoint_every_n_steps=200),
    )


def recipe_files() -> dict[str, Path]:
    """Recipe name to file, sorted by name."""
    installed = Path(__file__).parent / "configs"  # in a wheel; beside src/ in a checkout
    folder = installed if installed.is_dir() else Path(__file__).parents[2] / "configs"
    return {path.stem: path for path in sorted(folder.rglob("*.py"), key=lambda path: path.stem)}


def list_recipes(pattern: str = "*") -> list[str]:
    """Names of recipes that match a shell pattern."""
    return fnmatch.filter(recipe_files(), pattern)


def describe(path: Path) -> str:
    """First line of a recipe file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def read_recipe(name: str) -> tuple[str, Config]:
    """Name and settings of a recipe, given by name, as a Python file, or as the config.yaml of a run.

    Raises:
        UserError: no such recipe (the nearest are named), or the file has a mistake.
    """
    files = recipe_files()
    path = files.get(name, Path(name))
    if not path.is_file():
        if path.suffix in (".py", ".yaml"):
            raise UserError(f"recipe file {name} does not exist")
        near = difflib.get_close_matches(name, files, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "see `itpn list`"
        raise UserError(f"no recipe {name!r}; {hint}")
    if path.suffix == ".yaml":
        return read_yaml(path)
    try:
        config = runpy.run_path(str(path)).get("config")
    except UserError:
        raise
    except Exception as error:  # whatever a user's file may raise
        raise UserError(f"recipe file {path} does not run: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise UserError(f"recipe file {path} must set `config` to an itpn.config.Config")
    return path.stem, config


def nearest(name: str, names: list[str]) -> str:
    """A hint at the right name ("; did you mean X?") to append to a message, or an empty string."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
