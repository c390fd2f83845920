"""Reconstructions of images."""

from dataclasses import replace

from itpn.checkpoints.files import Checkpoint
from itpn.data.files import ImageSource
from itpn.masked.masked_model import MaskedImageModel
from itpn.tasks.prediction import PredictionOptions, read_batches, save_picture
from itpn.tasks.preprocessing import read_preprocessing
from itpn.tasks.pretraining.config import PretrainingConfig
from itpn.tasks.pretraining.module import PretrainingTask
from itpn.tasks.pretraining.visualization import draw_predictions
from itpn.training.config import from_dict


def predict(model: MaskedImageModel, found: Checkpoint, source: ImageSource, options: PredictionOptions) -> None:
    """Write images of what the model predicts for masked patches."""
    crop, normalize = read_preprocessing(found, model)
    config = from_dict(found.settings, PretrainingConfig) if found.settings else PretrainingConfig()
    mean, std = (tuple(values.flatten().tolist()) for values in (normalize.mean, normalize.std))
    config = replace(
        config,
        seed=options.seed,
        model=replace(config.model, in_chans=model.backbone.in_chans),
        data=replace(config.data, mean=mean, std=std),
    )
    task = PretrainingTask(model, config, "predict")
    for number, (_, images) in enumerate(read_batches(source, crop, options.max_pixels)):
        save_picture(draw_predictions(task, images), options.out, number)
