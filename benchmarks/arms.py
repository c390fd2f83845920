"""Arms of a comparison: one that fails is named in a line, and does not end the others."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
