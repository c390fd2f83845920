"""What the terminal is told beside results."""

import contextlib
import os
import sys
from collections.abc import Iterable

from rich.console import Console

from itpn.text import one_line


class Output(Console):
    """For commands that write files: when who reads what is printed has ended, as `head` does, they go on."""

    def on_broken_pipe(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # closed altogether
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
        if self.file is sys.stdout:
            print_aside("nobody reads standard output any more: the command goes on, and its files tell how it goes")


def print_aside(message: str, console: Console | None = None) -> None:
    """A remark, in one piece and word for word whatever a file is called; on stderr unless a console is given."""
    console = console or Output(stderr=True)
    console.print(one_line(message), style="yellow", markup=False, highlight=False, soft_wrap=True)


_remarked = False


def tell_remarks(remarks: Iterable[tuple[str, str]], console: Console | None = None) -> None:
    """Tell what is to be said of the values of images, (name, remark), of the first alone in a whole command.

    Only the main one of several processes tells.
    """
    global _remarked
    first = next(iter(remarks), None)
    if first is None or _remarked:
        return
    from itpn.engine.launch import read_launch  # takes long to import, and most images need no remark

    _remarked = True
    if read_launch().main:
        name, remark = first
        print_aside(f"warning: {name}: {remark} (told once, others may be alike)", console)


def forget_remarks() -> None:
    """A new command begins."""
    global _remarked
    _remarked = False
