"""`itpn train`: a run of whichever kind."""

from pathlib import Path
from typing import Any

from itpn.config import Config, DetectionConfig, RunConfig, SegmentationConfig
from itpn.engine.classification import train_classifier
from itpn.engine.detection import train_detector
from itpn.engine.fitting import Run, fit
from itpn.engine.pretraining import pretrain
from itpn.engine.segmentation import train_segmenter


def train(config: RunConfig, recipe: str, source: Any = None, run: Run = fit) -> Path:
    """Run, or go on with, a run; see :func:`itpn.engine.fitting.fit`.

    Args:
        source: the images, where they have been looked for already.
        run: what to do, instead of training.
    """
    config.check()
    if isinstance(config, Config):
        return pretrain(config, recipe, source, run)
    if isinstance(config, DetectionConfig):
        return train_detector(config, recipe, source, run)
    if isinstance(config, SegmentationConfig):
        return train_segmenter(config, recipe, source, run)
    return train_classifier(config, recipe, source, run)
