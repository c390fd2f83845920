"""The images of a run."""

from dataclasses import dataclass
from typing import Any

NO_IMAGES = "give --data.val-root or --data.val-fraction"


@dataclass(frozen=True)
class RunData:
    """Images to train on, and to evaluate on if there are any.

    Attributes:
        train, val: readers of images with what is known of them (:class:`itpn.data.readers.Reader`).
        notes: what is left out or missing, a sentence each.
    """

    train: Any
    val: Any = None
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int | None:
        """Files to train on, of which only a fraction may be corrupt; None where it is not known beforehand."""
        return len(self.train)

    @property
    def samples(self) -> Any:
        """The set that sample images are taken from."""
        return self.train if self.val is None else self.val
