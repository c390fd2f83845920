"""Settings of detectors that recipe files call."""

from itpn.tasks.detection.config import (
    DetectionConfig,
    DetectionDataConfig,
    DetectionEvaluationConfig,
    DetectionModelConfig,
)
from itpn.tasks.finetuning.config import FineTuningConfig, small_dense_optimizer
from itpn.training.config import TrainerConfig


def detection(model: str, epochs: int) -> DetectionConfig:
    """Mask R-CNN on COCO as published: 32 images a step on 16 GPUs, 1x being 12 epochs (Tian et al. 2023, section 4.2).

    The layer decay is per layer. Warm-up is mmdetection's, 500 steps.

    Args:
        model: whose pre-trained weights are taken; relative positions of CLIP's come with them.
    """
    large = "large" in model
    drop_path = 0.3 if epochs > 12 else 0.2 if large else 0.05
    return DetectionConfig(
        model=DetectionModelConfig(name=model, drop_path_rate=drop_path, grad_checkpointing=large),
        data=DetectionDataConfig(root="data/coco", batch_size=2, num_workers=4, interpolation="bilinear"),
        optimizer=FineTuningConfig(
            lr=2e-4,
            betas=(0.9, 0.999),
            weight_decay=0.05,
            warmup_steps=500,
            warmup_start=1e-3,
            schedule="step",
            layer_decay=0.95 if large else 0.9,
            layer_decay_over=None,
        ),
        trainer=TrainerConfig(max_epochs=epochs, checkpoint_every_n_steps=1000, log_every_n_steps=50),
    )


def clip_detection(model: str, epochs: int) -> DetectionConfig:
    """From CLIP supervision, whose relative positions make attention's memory grow with the square of the patches."""
    config = detection(model, epochs)
    config.model.grad_checkpointing = True
    return config


def small_detection() -> DetectionConfig:
    """A detector of one's own objects on one machine: the network is the checkpoint's, and epochs scale."""
    return DetectionConfig(
        model=DetectionModelConfig(drop_path_rate=0.1),
        data=DetectionDataConfig(root="data/objects", batch_size=2, num_workers=2, interpolation="bilinear"),
        optimizer=small_dense_optimizer(),
        trainer=TrainerConfig(max_epochs=0, checkpoint_every_n_steps=200),
        evaluation=DetectionEvaluationConfig(every_n_epochs=5),
    )


def nano_detection() -> DetectionConfig:
    """Small images of few objects, as of the generated sample set, on a laptop: narrow heads, few proposals."""
    config = small_detection()
    config.model.head_width, config.model.rpn_post_nms_top_n_train, config.model.box_batch_size_per_image = 64, 200, 64
    config.data.img_size, config.data.crop_prob, config.data.batch_size = 96, 0.0, 8
    config.data.scales = (0.8, 1.2)
    config.optimizer.lr, config.model.drop_path_rate = 1e-3, 0.0
    return config
