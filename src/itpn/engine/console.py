"""What the terminal is told beside results."""

import contextlib
import os
import sys
from collections.abc import Mapping

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


_told: set[str] = set()  # kinds of remarks


def tell_remarks(remarks: Mapping[str, tuple[str, str]], console: Console | None = None) -> None:
    """Tell what is to be said of images, (name, remark) by kind, of each kind the first alone in a whole command.

    Only the main one of several processes tells.
    """
    for kind, (name, remark) in remarks.items():
        if kind in _told:
            continue
        from itpn.engine.launch import read_launch  # takes long to import, and most images need no remark

        _told.add(kind)
        if read_launch().main:
            print_aside(f"warning: {name}: {remark} (told once, others may be alike)", console)


def forget_remarks() -> None:
    """A new command begins."""
    _told.clear()
