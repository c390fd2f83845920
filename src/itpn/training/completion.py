"""What a run whose steps are all taken may still lack: it was killed before it wrote its last files."""

import lightning as L

from itpn.training.callbacks import Monitor, Pictures
from itpn.training.checkpointing import Checkpointing
from itpn.training.run_folder import RunFolder


class Completion(L.Callback):
    """Makes up for what comes between the last checkpoint and the end of a run, where it is missing.

    Args:
        pictures: None where one process cannot draw.

    Attributes:
        missing: whether weights or summary were; they are left to be written.
    """

    def __init__(
        self, folder: RunFolder, monitor: Monitor, pictures: Pictures | None, checkpointing: Checkpointing
    ) -> None:
        self.folder = folder
        self.monitor = monitor
        self.pictures = pictures
        self.checkpointing = checkpointing
        self.missing = False

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        monitor, watcher, step = self.monitor, self.monitor.watcher, trainer.global_step
        if monitor.started:
            return
        monitor.device = pl_module.device
        monitor.restore(self.checkpointing.restored.get("training", {}))
        self.checkpointing.restore_best(trainer)  # training, at whose start it is done, has not begun
        self.missing = trainer.strategy.broadcast(not self.folder.is_finished(step))
        if self.missing and watcher is not None and watcher.step != step:
            watcher.evaluate(trainer, pl_module)
            monitor.add_evaluation(trainer)
            if trainer.is_global_zero and self.checkpointing.score() > self.checkpointing.best_score:
                with self.folder.writing(self.folder.best):
                    self.folder.put_best(self.folder.last)
        if self.pictures is not None and trainer.is_global_zero:
            self.pictures.latest = self.pictures.path(step)
            if not self.pictures.latest.exists():
                self.pictures.write(trainer, step)
