"""`itpn train`: a run of a recipe."""

from dataclasses import dataclass

from itpn.commands.options import Flag, RecipeCommand


@dataclass(frozen=True, kw_only=True)
class Train(RecipeCommand):
    """Train a recipe; `itpn train RECIPE --help` lists every option."""

    profile: Flag = False
    """Take a few steps only, keep nothing of them, and say where their time goes: a summary and a trace."""

    def run(self) -> None:
        source = self.check()
        from itpn.tasks.run import train

        train(self.config, self.recipe, source, self.profile, self.given_data)
