"""Messages on the terminal, beside results."""

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from itpn.errors import MachineError
from itpn.system.environment import is_main_process
from itpn.system.text import one_line, readable


class Output(Console):
    """For commands that write files: they continue when nobody reads what is printed, or it cannot be written.

    As when `head` has ended, a terminal was closed, or the disk of a log is full.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **{"crop": False, **options})  # a path that is too long is shown whole

    def _check_buffer(self) -> None:  # through which all goes that rich writes; it knows broken pipes alone
        try:
            super()._check_buffer()
        except OSError as error:
            self.on_lost(error)

    def on_broken_pipe(self) -> None:
        error = sys.exc_info()[1]
        assert isinstance(error, OSError)
        self.on_lost(error)

    def on_lost(self, error: OSError) -> None:
        silence(self.file)
        if self.file is sys.stdout:
            what = "nobody reads standard output any more"
            if not isinstance(error, BrokenPipeError):
                what = f"standard output cannot be written ({error.strerror})"
            print_note(f"{what}: the command continues; see its files for the results")


class RequiredOutput(Output):
    """For commands that only print: they end with a line when it cannot be written."""

    def on_lost(self, error: OSError) -> None:
        raise lost_output(error) from error


def lost_output(error: OSError) -> OSError | MachineError:
    """What to raise where standard output cannot be written; for a broken pipe no message is needed."""
    if isinstance(error, BrokenPipeError):
        return error
    silence(sys.stdout)
    return MachineError(f"standard output cannot be written: {error.strerror or error}")


def finish_output() -> None:
    """Write what is left of what a command printed.

    Raises:
        MachineError: standard output does not take it.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        raise lost_output(error) from error


def silence(stream: IO[str]) -> None:
    """Let nothing that is still to be written to it fail, at the end of the program as well."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed altogether, or no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def print_error(message: str) -> None:
    """The one line on stderr with which a command ends; the exit code counts even where it cannot be written."""
    try:
        print(f"itpn: {one_line(message)}", file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def print_note(message: str, console: Console | None = None) -> None:
    """A remark, in one piece and word for word whatever a file is called; on stderr unless a console is given."""
    console = console or Output(stderr=True)
    console.print(one_line(message), style="yellow", markup=False, highlight=False, soft_wrap=True)


_warned: set[str] = set()  # kinds of warnings


def print_warnings(warnings: Mapping[str, tuple[str, str]], console: Console | None = None) -> None:
    """Print warnings about images, (name, warning) by kind: the first of a kind in a command, on the main process."""
    for kind, (name, warning) in warnings.items():
        if kind not in _warned and is_main_process():
            print_note(f"warning: {name}: {warning} (shown once, other images may have it too)", console)
        _warned.add(kind)


def forget_warnings() -> None:
    """A new command begins."""
    _warned.clear()


def make_table(title: str, rows: Mapping[str, str | Path]) -> "RowTable":
    """Rows of a title and a text or path each."""
    return RowTable(title, rows)


class RowTable:
    """A table in which no path is broken, so that it can be copied: what does not fit follows in a line of its own."""

    def __init__(self, title: str, rows: Mapping[str, str | Path]) -> None:
        self.title = title
        self.rows = {name: readable(str(value)) for name, value in rows.items()}
        self.paths = {name for name, value in rows.items() if isinstance(value, Path)}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.max_width - max(map(cell_len, self.rows), default=0) - 7  # of borders and padding
        below = {}
        table = Table(show_header=False)
        for name, value in self.rows.items():
            words = [value] if name in self.paths else value.split()
            if any(cell_len(word) > room for word in words):
                below[name] = value
            else:
                table.add_row(name, Text(value))  # never markup: a class may be called anything
        yield unfolded(self.title, "italic")
        yield table
        for name, value in below.items():
            yield unfolded(f"{name}: {value}")


def unfolded(text: str, style: str = "") -> Text:
    """A line that is neither wrapped nor cut by an :class:`Output`, however narrow the terminal."""
    return Text(readable(text), style=style, no_wrap=True, overflow="ignore")
