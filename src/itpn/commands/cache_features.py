"""`itpn cache-features`: features of a recipe's teacher, computed once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from itpn.commands.options import Flag, RecipeCommand, shown
from itpn.errors import UserError
from itpn.system.checks import Range
from itpn.tasks.spec import task_of


@dataclass(frozen=True, kw_only=True)
class CacheFeatures(RecipeCommand):
    """Run a recipe's teacher once over the images, into shards to train from.

    Worth it where the teacher costs more than the student and the disk holds its features: several runs or many epochs
    over a set that is not large, a large teacher, masked patches dropped. Training then sees the crops drawn here and
    no others, a view an epoch, so give several --views; for a long run over millions of images the live teacher with
    its fresh crops is better. A crop takes a byte for each value of its pixels and 4 (--half: 2) for each value of its
    features: 0.55 MB at 224 px with CLIP-B. Stopped in the middle, the same command resumes.
    """

    out: Annotated[Path, shown("DIR")]
    """Folder for the shards; give it as --data.root to train from them."""
    views: Annotated[int, Range(1, 10_000), shown("N")] = 1
    """Crops per image, one per epoch."""
    half: Flag = False
    """Store features in half the space, rounded to float16."""

    def run(self) -> None:
        task = task_of(self.config)
        if task.cache_features is None:
            raise UserError(f"{self.recipe} is a recipe of {task.name}, which has no teacher")
        source = self.check()
        if source.cache:
            raise UserError(f"{source.cache} holds cached features already: give the images as --data.root")
        task.cache_features(self.config, source, self.out, self.views, self.half)
