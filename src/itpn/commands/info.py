"""`itpn info`: how large a network is, what it costs, what comes out where."""

from dataclasses import dataclass
from typing import Annotated

from rich.table import Table
from tyro.conf import Positional

from itpn.commands.options import TaskFile, shown
from itpn.errors import UserError
from itpn.models.variants import BACKBONES, WITH_PYRAMID
from itpn.system.console import RequiredOutput
from itpn.tasks.recipe_files import check_recipe, check_suffix, is_file, nearest, read_recipe, recipe_files
from itpn.tasks.spec import task_of


@dataclass(frozen=True)
class Info:
    """Show parameters, MACs and shapes of a recipe or model."""

    name: Annotated[Positional[str], shown("NAME")]
    """A name of `itpn list`, a recipe file, or the config.yaml of a run."""
    checkpoint: Annotated[str | None, shown("CKPT", "(optional)")] = None
    """For recipes that take their network from a checkpoint: the one to take it from."""
    task_file: TaskFile = None

    def run(self) -> None:
        known, files = [*BACKBONES, *WITH_PYRAMID.values()], recipe_files()
        if self.name not in known and self.name not in files and not is_file(self.name):
            check_suffix(self.name)
            near = nearest(self.name, [*files, *known]) or "; see `itpn list`"
            raise UserError(f"no recipe or model {self.name!r}{near}")
        config = None if self.name in known else read_recipe(self.name)[1]
        if config is None and self.checkpoint is not None:
            raise UserError("--checkpoint is for recipes; `itpn inspect` tells what a checkpoint is")
        if config is not None:
            check_recipe(config)
        from itpn.checkpoints.files import read_checkpoint
        from itpn.tasks.info import describe_model

        found = None if self.checkpoint is None else read_checkpoint(self.checkpoint)
        rows = describe_model(self.name) if config is None else task_of(config).describe(config, found)
        table = Table(title=self.name, show_header=False, title_justify="left")
        for title, text in rows:
            if title or text:
                table.add_row(title, text)
            else:
                table.add_section()
        RequiredOutput().print(table)
