"""How long a fine-tuning run takes."""

import math
from dataclasses import replace
from typing import Any, TypeVar

from itpn.training.launch import choose_devices, read_launch

STEPS, EPOCHS = 2000, (10, 200)  # of a run that is left to scale with its images: so many steps, within these epochs
AnyConfig = TypeVar("AnyConfig", bound=Any)


def scale_epochs(config: AnyConfig, images: int, processes: int | None = None) -> AnyConfig:
    """Settings with a number of epochs, where they leave it to the number of images.

    Args:
        processes: that train together; None for those of this launch.
    """
    if config.trainer.max_epochs:
        return config
    processes = processes or choose_devices(config.trainer, read_launch()).processes
    batch = config.data.batch_size * processes * config.trainer.accumulate_grad_batches
    steps = max(1, images // batch)
    epochs = min(max(math.ceil(STEPS / steps), EPOCHS[0]), EPOCHS[1])
    return replace(config, trainer=replace(config.trainer, max_epochs=epochs))
