"""What ends a run before its time: too many corrupt files, a loss or weights that are not finite."""

from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.distributed.tensor import DTensor

from itpn.checkpoints.io import save_to
from itpn.data.skipped import SkippedImages
from itpn.distributed import gather
from itpn.errors import NonFiniteLoss
from itpn.system.console import print_note, print_warnings
from itpn.system.writing import open_whole
from itpn.training.state import Training


class CorruptFiles:
    """Counts files that could not be read, over all processes, and names each once."""

    def __init__(self, run: Training) -> None:
        self.skipped = SkippedImages(run.job.images, run.config.data.max_corrupt)
        self._run = run
        self._new: list[tuple[str, str]] = []
        self._warnings: dict[str, tuple[str, str]] = {}

    def add(self, batch: dict[str, Any]) -> None:
        self._new += batch["corrupt"]
        self._warnings = {**batch["warnings"], **self._warnings}

    def count(self, images_seen: int) -> None:
        """Count the new ones, all processes together.

        Raises:
            UserError: there are too many; on every process.
        """
        found = gather((self._new, self._warnings))
        self._new, self._warnings = [], {}
        for message in self.skipped.update(item for new, _ in found for item in new):
            print_note(f"skipped {message}", self._run.console)
        for _, warnings in found:
            print_warnings(warnings, self._run.console)
        images = self._run.loader.images
        self.skipped.check(min(images_seen, images), epoch_ended=images_seen >= images)


class NonFiniteGuard:
    """Remembers the first pass whose loss was not finite, without waiting for the device."""

    def __init__(self, run: Training) -> None:
        self._run = run
        self._first = torch.full((), -1, device=run.device)

    def add(self, loss: Tensor, number: int) -> None:
        """The loss of a pass, by its number in the run."""
        found = (self._first < 0) & ~torch.isfinite(loss)
        self._first = torch.where(found, torch.full_like(self._first, number), self._first)

    def stop(self, what: str, loss: float, batch: dict[str, Any]) -> None:
        """Write batch, step and the names of weights that are not finite beside the checkpoints.

        Raises:
            NonFiniteLoss: always.
        """
        run, folder = self._run, self._run.folder
        evidence = folder.path / f"nonfinite-step-{run.step:08d}-rank-{run.fabric.global_rank}.pt"
        found = {
            "step": run.step,
            "epoch": run.epoch,
            "loss": loss,
            # on a GPU the loss is read now and then, so the batch at hand may come after the first bad one, which
            # the same settings make again
            "first_batch_with_nonfinite_loss": int(self._first),
            "batch": {"image": move_data_to_device(batch["image"], "cpu"), "key": batch["key"]},
            "nonfinite_parameters": [name for name, p in run.module.model.named_parameters() if not is_finite(p)],
        }
        where = f"are in {evidence}"
        try:
            with open_whole(evidence) as file:
                save_to(file, found)
        except OSError as error:  # which must not hide what happened
            where = f"could not be written to {evidence} ({error.strerror or error})"
        raise NonFiniteLoss(
            f"{what} at step {run.step}, epoch {run.epoch}: stopped; the batch and the names of weights that are not "
            f"finite {where}; checkpoints in {folder.checkpoints} are from before; try a lower --optimizer.lr, "
            "--optimizer.clip-grad 1 or --trainer.precision 32-true under another --name"
        )


def is_finite(parameter: Tensor) -> bool:
    """Of a sharded one, the part that this process holds."""
    own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return bool(torch.isfinite(own).all())
