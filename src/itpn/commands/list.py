"""`itpn list`: recipes and models."""

import fnmatch
import sys
from dataclasses import dataclass
from typing import Annotated

from rich.table import Table
from tyro.conf import Positional

from itpn.commands.options import shown
from itpn.errors import UserError
from itpn.models.variants import BACKBONES, FAST, WITH_PYRAMID
from itpn.system.console import RequiredOutput
from itpn.tasks.recipe_files import describe, list_recipes, nearest, recipe_files


@dataclass(frozen=True)
class List:
    """List recipes and models."""

    pattern: Annotated[Positional[str], shown("[PATTERN]", "(default: all)")] = "*"
    """A part of the name, or a shell pattern, e.g. '*base*800e*'."""

    def run(self) -> None:
        files = recipe_files()
        # a bare word means any name with it inside
        pattern = self.pattern if set(self.pattern) & set("*?[") else f"*{self.pattern}*"
        known = [*BACKBONES, *WITH_PYRAMID.values()]
        recipes, models = list_recipes(pattern), fnmatch.filter(known, pattern)
        if not recipes and not models:
            raise UserError(f"no recipe or model matches {self.pattern!r}{nearest(self.pattern, [*files, *known])}")
        table = Table("recipe", "what", box=None, pad_edge=False, header_style="bold")
        for recipe in recipes:
            table.add_row(recipe, describe(files[recipe]))
        for model in models:
            table.add_row(model, summarize_model(model))
        # names must survive a narrow window or a pipe in one piece
        RequiredOutput(width=None if sys.stdout and sys.stdout.isatty() else 200).print(table, highlight=False)


def summarize_model(name: str) -> str:
    if name not in BACKBONES:
        return f"model: {name.removesuffix('_pyramid')} and its feature pyramid"
    settings = BACKBONES[name]
    about = ", ".join(f"{key} {value}" for key, value in settings.items() if key not in FAST)
    return f"model: {about}{', Fast-iTPN' if settings.keys() >= FAST.keys() else ''}"
