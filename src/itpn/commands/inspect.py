"""`itpn inspect`: what a checkpoint is, what it can be used for, what would be missing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text  # never markup: a file may be called anything

from itpn.checkpoints.paths import check_file
from itpn.commands.options import Checkpoint, TaskFile
from itpn.system.console import RequiredOutput

if TYPE_CHECKING:
    from itpn.checkpoints.match import Finding

MISSING = {"random": "randomly initialized", "harmful": "does not fit"}


@dataclass(frozen=True)
class Inspect:
    """Say what a checkpoint is, and what it can be used for."""

    checkpoint: Checkpoint
    """A file of itpn, timm, the authors' code or mmpretrain, or hf-hub:OWNER/NAME."""
    task_file: TaskFile = None

    def run(self) -> None:
        check_file(self.checkpoint)
        from itpn.checkpoints.report import inspect

        report = inspect(self.checkpoint)
        table = Table(title=Text(self.checkpoint), show_header=False, title_justify="left")
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
        console = RequiredOutput()
        # the commands are to be copied in one piece
        if not console.is_terminal:
            console = RequiredOutput(width=200)
        console.print(table, highlight=False)


def _judge(findings: Sequence["Finding"], nonfinite: bool) -> Text:
    problems = [f"it {finding.text}: {MISSING[finding.kind]}" for finding in findings if finding.kind in MISSING]
    if nonfinite:
        problems.append("it has NaN or infinite values: of no use")
    return Text("\n".join(problems), style="yellow") if problems else Text("everything is there", style="green")
