"""What the terminal is told beside results."""

from rich.console import Console

from itpn.text import one_line


def print_aside(message: str, console: Console | None = None) -> None:
    """A remark, in one piece and word for word whatever a file is called; on stderr unless a console is given."""
    console = console or Console(stderr=True)
    console.print(one_line(message), style="yellow", markup=False, highlight=False, soft_wrap=True)
