"""`itpn train`: a run of whichever kind."""

import os
from pathlib import Path
from typing import Any

from itpn.config import Config, DetectionConfig, RunConfig, SegmentationConfig
from itpn.system.accidents import guard
from itpn.tasks.classification.run import train_classifier
from itpn.tasks.detection.run import train_detector
from itpn.tasks.pretraining.run import pretrain
from itpn.tasks.segmentation.run import train_segmenter
from itpn.training.loop import Run, fit
from itpn.training.run_folder import RunFolder


def train(config: RunConfig, recipe: str, source: Any = None, run: Run = fit) -> Path:
    """Run, or go on with, a run; see :func:`itpn.training.loop.fit`.

    Args:
        source: the images, where they have been looked for already.
        run: what to do, instead of training.

    Raises:
        MachineError: an accident of the machine; the message says what is kept.
    """
    config.check()
    folder = RunFolder(config, recipe)

    def kept() -> str:
        return f"the same command resumes from {folder.last}" if os.path.exists(folder.last) else ""

    with guard(f"run folder {folder.path}", kept):
        return _train(config, recipe, source, run)


def _train(config: RunConfig, recipe: str, source: Any, run: Run) -> Path:
    if isinstance(config, Config):
        return pretrain(config, recipe, source, run)
    if isinstance(config, DetectionConfig):
        return train_detector(config, recipe, source, run)
    if isinstance(config, SegmentationConfig):
        return train_segmenter(config, recipe, source, run)
    return train_classifier(config, recipe, source, run)
