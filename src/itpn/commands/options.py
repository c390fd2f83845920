"""What several commands have in common: how options look in the help, and commands that begin with a recipe."""

from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import FlagCreatePairsOff, Positional, Suppress, arg

from itpn.system import checks
from itpn.tasks.recipe_files import check_model_name
from itpn.tasks.spec import task_of
from itpn.training.config import check_start


def shown(metavar: str, hint: str | None = None) -> Any:
    """How an option is shown: what stands for its value, and what to say instead of its default as it is."""
    return arg(metavar=metavar, help_behavior_hint=hint)


def of_data(name: str, metavar: str, default: str, help: str) -> Any:
    """An option that also has the name by which messages speak of it, that of a setting of training."""
    hint = f"(default: {default})"
    return arg(name=f"data.{name}", aliases=(f"--{name}",), metavar=metavar, help_behavior_hint=hint, help=help)


Flag = FlagCreatePairsOff[bool]
Checkpoint = Annotated[Positional[str], arg(metavar="CKPT")]
MEMBERS = "In tar shards: endings of the members that are read as images, e.g. jpg or seg.png; or all."
Members = Annotated[tuple[str, ...], of_data("members", "ENDING [ENDING ...]", "a sample's plain image", MEMBERS)]
NUM_HEADS = "Attention heads, for files that do not tell them (see `itpn inspect`)."
NumHeads = Annotated[checks.NumHeads | None, arg(metavar="N", help_behavior_hint="(optional)", help=NUM_HEADS)]
TASK_FILE = "For tasks of your own: the recipe file that registers the task."
TaskFile = Annotated[str | None, arg(name="recipe", metavar="FILE", help_behavior_hint="(optional)", help=TASK_FILE)]


@dataclass(frozen=True, kw_only=True)
class RecipeCommand:
    """A command whose first word is a recipe, and whose options are its own and the settings of that recipe.

    Attributes:
        config: the settings of the recipe, with those that were given.
        given: options of these settings that were given.
    """

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """A name of `itpn list`, a recipe file or a run's config.yaml. Its settings are options: give RECIPE --help."""
    config: Suppress[Any] = None
    given: Suppress[tuple[str, ...]] = ()
    task_file: TaskFile = None

    @property
    def given_data(self) -> set[str]:
        """Names of the settings of data that were given."""
        return {option.removeprefix("--data.").removeprefix("no-").replace("-", "_") for option in self.given}

    def check(self) -> Any:
        """What can be found wrong before torch is imported.

        Returns:
            What the task's ``check_data`` found.

        Raises:
            UserError: impossible settings, an unknown model, a folder that is missing or without images.
        """
        self.config.check()
        check_start(self.config, self.recipe)
        name = self.config.model.name
        if name is not None:
            check_model_name(name)
        check = task_of(self.config).check_data
        return None if check is None else check(self.config)
