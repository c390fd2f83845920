"""How far an evaluation is, in a terminal."""

from collections.abc import Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from itpn.system.console import Output
from itpn.tasks.tiling import Grid, Tile


class EvaluationBar:
    """A bar of images, and one of the tiles of a large image; nothing where standard error is no terminal.

    Args:
        images: that are evaluated.
        hidden: show nothing, as in all processes but one.
    """

    def __init__(self, images: int, hidden: bool = False) -> None:
        console = Output(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=hidden or not console.is_terminal)
        self._images = self._bar.add_task("images", total=images)
        self._tiles = self._bar.add_task("tiles", visible=False)

    def __enter__(self) -> "EvaluationBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, images: int) -> None:
        self._bar.advance(self._images, images)

    def show(self, grid: Grid) -> Iterator[Tile]:
        """The tiles of an image."""
        self._bar.reset(self._tiles, total=len(grid), visible=True)
        for tile in grid:
            yield tile
            self._bar.advance(self._tiles)
        self._bar.update(self._tiles, visible=False)
