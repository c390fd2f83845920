"""Invalid annotations: counted by kind, with examples, and reported."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from itpn.data.file_types import describe_unread, suffix_of
from itpn.errors import UserError
from itpn.system.text import one_line


@dataclass
class InvalidAnnotations:
    """What is invalid in annotations, by kind, with the first few examples; and remarks on valid ones."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, kind: str, example: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= 3:
            self.examples.setdefault(kind, []).append(one_line(example))

    def note_unread(self, folder: str, unread: Counter[str], read: Iterable[str | Path] = ()) -> None:
        """Note what files below a folder are not read; ``read`` are some that are, and were counted as well."""
        below = os.path.join(os.path.abspath(folder), "")
        unread = unread - Counter(suffix_of(str(path)) for path in read if os.path.abspath(path).startswith(below))
        if line := describe_unread(unread):
            self.notes.append(f"{line} in {folder}")

    def lines(self) -> list[str]:
        """A line for each kind, the commonest first."""
        return [
            f"{kind}: {count:,} ({', '.join(self.examples[kind])}{', ...' if count > len(self.examples[kind]) else ''})"
            for kind, count in self.counts.most_common()
        ]

    def explain_lack(self, source: str, lacking: str) -> UserError:
        """``source`` has nothing that can be used; with every reason that is known."""
        reasons = "; ".join([*self.lines(), *dict.fromkeys(self.notes)])
        return UserError(f"{source} has no {lacking}" + (f" that can be used: {reasons}" if reasons else ""))

    def report(
        self,
        source: str,
        what_to_do: Literal["summary", "skip", "error"],
        tell: Callable[[str], None],
        told: set[str] | None = None,
    ) -> None:
        """Tell what was found in ``source``, a line at a time, if anything was.

        Args:
            told: remarks that are not repeated; those of ``source`` are added.

        Raises:
            UserError: mistakes are errors.
        """
        told = set() if told is None else told
        for note in dict.fromkeys(self.notes):
            if note not in told:
                tell(f"{source}: {note}")
                told.add(note)
        if not self.counts:
            return
        lines = self.lines()
        if what_to_do == "error":
            raise UserError(f"{source}: {'; '.join(lines)}; --data.mistakes skip leaves these out")
        if what_to_do == "summary":
            tell(f"{source}: left out, or put right, are")
            for line in lines:
                tell(f"  {line}")
        else:
            count = sum(self.counts.values())
            tell(f"{source}: {count:,} mistake{'s' * (count != 1)} left out (--data.mistakes summary shows which)")
