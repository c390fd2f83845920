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
    """Invalid annotations by kind, with the first examples of each, and notes on valid ones."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, kind: str, example: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= 3:
            self.examples.setdefault(kind, []).append(one_line(example))

    def note_unread(self, folder: str, unread: Counter[str], read: Iterable[str | Path] = ()) -> None:
        """Add a note on the files below a folder that are not read; ``read``: files that are read, though counted."""
        below = os.path.join(os.path.abspath(folder), "")
        unread = unread - Counter(suffix_of(str(path)) for path in read if os.path.abspath(path).startswith(below))
        if unread:
            self.notes.append(f"{describe_unread(unread)} in {folder}")

    def lines(self) -> list[str]:
        """A line for each kind, the most frequent first."""
        return [
            f"{kind}: {count:,} ({', '.join(self.examples[kind])}{', ...' if count > len(self.examples[kind]) else ''})"
            for kind, count in self.counts.most_common()
        ]

    def explain_lack(self, source: str, lacking: str) -> UserError:
        """The error to raise where ``source`` has no usable images or objects, with all known reasons."""
        reasons = "; ".join([*self.lines(), *dict.fromkeys(self.notes)])
        return UserError(f"{source} has no {lacking}" + (f" that can be used: {reasons}" if reasons else ""))

    def report(
        self,
        source: str,
        on_invalid: Literal["summary", "skip", "error"],
        log: Callable[[str], None],
        logged: set[str] | None = None,
    ) -> None:
        """Log the notes and the invalid annotations of ``source``, a line at a time.

        Args:
            logged: notes that are not repeated; those of ``source`` are added.

        Raises:
            UserError: there are invalid annotations, and ``on_invalid`` is "error".
        """
        logged = set() if logged is None else logged
        for note in dict.fromkeys(self.notes):
            if note not in logged:
                log(f"{source}: {note}")
                logged.add(note)
        if not self.counts:
            return
        lines = self.lines()
        if on_invalid == "error":
            raise UserError(f"{source}: {'; '.join(lines)}; --data.invalid-annotations skip leaves these out")
        if on_invalid == "summary":
            log(f"{source}: invalid annotations, left out or corrected:")
            for line in lines:
                log(f"  {line}")
        else:
            count = sum(self.counts.values())
            what = f"invalid annotation{'s' * (count != 1)} left out"
            log(f"{source}: {count:,} {what} (--data.invalid-annotations summary shows which)")
