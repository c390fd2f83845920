"""What can be found wrong with images without importing torch."""

from typing import Any

from itpn.data.files import find_training_images
from itpn.tasks.pretraining.config import PretrainingConfig


def find_images(config: PretrainingConfig) -> Any:
    """The images of a run, an :class:`itpn.data.files.ImageSource`.

    Raises:
        UserError: a folder is missing or without images.
    """
    return find_training_images(config.data.root, config.data.members)
