"""Arms of a comparison: one that fails is named in a line, and does not end the others."""

import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


class Failures:
    """What failed, by the name of its arm."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    @contextmanager
    def of(self, arm: str) -> Iterator[None]:
        """Run a part of an arm; whatever it raises ends this part alone."""
        try:
            yield
        except Exception as error:  # out of memory, the compiler's many classes, a run's own
            reason = (str(error).strip().splitlines() or [""])[0]
            self.reasons[arm] = f"{type(error).__name__}: {reason}"
            print(f"{arm} failed: {self.reasons[arm]}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Exit with 1 if an arm failed."""
        if self.reasons:
            raise SystemExit(f"failed: {', '.join(self.reasons)}")


def write_rows(rows: Sequence[dict], path: Path) -> None:
    """All rows so far as a CSV file, whose columns are those of the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def show_means(rows: Sequence[dict], metric: str, arms: Iterable[str], fractions: Sequence[float], title: str) -> None:
    """A table of a metric in %: mean and std over seeds of each arm, a column for each fraction of the labels."""
    table = Table("arm", *(f"{fraction:.0%} of the labels" for fraction in fractions), title=title)
    for arm in arms:
        cells = []
        for fraction in fractions:
            own = [100 * row[metric] for row in rows if (row["arm"], row["fraction"]) == (arm, fraction)]
            values = torch.tensor(own)
            spread = f" \u00b1 {values.std():.1f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.1f}{spread}" if len(values) else "failed")
        table.add_row(arm, *cells)
    Console().print(table)
