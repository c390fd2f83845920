"""`itpn inspect`: what a checkpoint is, what it can be used for, what would be missing."""

from rich.table import Table
from rich.text import Text  # never markup: a file may be called anything

from itpn.checkpoints.match import Finding
from itpn.checkpoints.report import inspect
from itpn.system.console import Answer

MISSING = {"random": "randomly initialized", "harmful": "does not fit"}


def print_report(checkpoint: str) -> None:
    """Print what :func:`itpn.inspect` finds, to be understood without having read the code."""
    report = inspect(checkpoint)
    table = Table(title=Text(checkpoint), show_header=False, title_justify="left")
    for title, line in report.summary.items():
        table.add_row(title, Text(line))
    table.add_section()
    for use in report.uses:
        table.add_row(use.purpose, _judge(use.findings, bool(report.nonfinite)))
        if use.command:
            table.add_row("", Text(use.command, style="cyan"))
    if report.leftovers:
        table.add_section()
        for i, finding in enumerate(report.leftovers):
            table.add_row("" if i else "left over", Text(f"it {finding.text} ({len(finding.names)})"))
    console = Answer()
    # the commands are to be copied in one piece
    if not console.is_terminal:
        console = Answer(width=200)
    console.print(table, highlight=False)


def _judge(findings: list[Finding], nonfinite: bool) -> Text:
    problems = [f"it {finding.text}: {MISSING[finding.kind]}" for finding in findings if finding.kind in MISSING]
    if nonfinite:
        problems.append("it has NaN or infinite values: of no use")
    return Text("\n".join(problems), style="yellow") if problems else Text("everything is there", style="green")
