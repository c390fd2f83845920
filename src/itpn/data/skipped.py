"""Images that cannot be read: counted, named once each, and an error where there are too many."""

from collections.abc import Iterable

from itpn.data.readers import remedy_of_loss
from itpn.errors import MachineError, UserError
from itpn.system.text import one_line


class SkippedImages:
    """Counts the images that cannot be read, names each once, and stops a run when there are too many.

    Args:
        images: number of images in the data set; None for shards, where the count is compared with the images read so
            far.
        max_fraction: largest fraction that may be unreadable.
    """

    MIN_READ = 200  # images: of fewer, a handful of corrupt ones proves nothing

    def __init__(self, images: int | None, max_fraction: float = 0.05) -> None:
        self._images = images
        self._max_fraction = max_fraction
        self._reasons: dict[str, str] = {}

    @property
    def count(self) -> int:
        return len(self._reasons)

    def update(self, corrupt: Iterable[tuple[str, str]]) -> list[str]:
        """Add the (name, reason) of a batch; returns "name: reason" of those that are new."""
        new = {name: reason for name, reason in corrupt if name not in self._reasons}
        self._reasons.update(new)
        return [f"{name}: {reason}" for name, reason in new.items()]

    def check(self, images_read: int, epoch_ended: bool = False) -> None:
        """Stop if too many images are unreadable.

        Raises:
            UserError: more than ``max_fraction`` of all images are corrupt; of shards, of the images read so far, once
                they are 200 or the epoch has ended.
            MachineError: as many are unreadable because the file system fails.
        """
        of = self._images
        if of is None:
            if images_read < self.MIN_READ and not epoch_ended:
                return
            of = images_read
        if self.count > self._max_fraction * of:
            name, reason = next(iter(self._reasons.items()))
            what = f"{self.count} of {of} images cannot be read, more than {self._max_fraction:.0%}"
            raise _too_many(what, name, reason)

    def state_dict(self) -> dict[str, dict[str, str]]:
        return {"corrupt": dict(self._reasons)}

    def load_state_dict(self, state_dict: dict[str, dict[str, str]]) -> None:
        # checkpoints of version 0.1 say "broken"
        self._reasons = dict(state_dict["corrupt"] if "corrupt" in state_dict else state_dict["broken"])


def nothing_readable(corrupt: list[tuple[str, str]]) -> UserError | MachineError:
    """The error to raise where no image can be read, from the (name, reason) of each."""
    if not corrupt:
        return UserError("no images in the shards: check that the data root is right")
    return _too_many(f"none of {len({name for name, _ in corrupt})} images in a row can be read", *corrupt[0])


def _too_many(what: str, name: str, reason: str) -> UserError | MachineError:
    """The error to raise for too many unreadable images; ``name`` and ``reason`` are those of the first."""
    what = f"{what}; the first is {one_line(name)}: {reason}"
    if lost := remedy_of_loss(name, reason):
        return MachineError(f"{what}; {lost}")
    return UserError(f"{what.rstrip('.')}. Repair or remove the corrupt files, or check that the data root is right")
