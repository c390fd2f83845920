"""Settings of segmenters that recipe files call."""

from itpn.tasks.finetuning.config import FineTuningConfig, small_dense_optimizer
from itpn.tasks.segmentation.config import (
    SegmentationConfig,
    SegmentationDataConfig,
    SegmentationEvaluationConfig,
    SegmentationModelConfig,
)
from itpn.training.config import TrainerConfig


def segmentation(model: str, img_size: int = 512) -> SegmentationConfig:
    """UPerNet on ADE20K as published: 16 images a step on 8 GPUs, 160,000 steps (Tian et al. 2023, section 4.2).

    The layer decay is per layer.
    """
    return SegmentationConfig(
        model=SegmentationModelConfig(name=model, drop_path_rate=0.1, grad_checkpointing="large" in model),
        data=SegmentationDataConfig(
            root="data/ade20k",
            reduce_zero_label=True,
            img_size=img_size,
            batch_size=2,
            num_workers=4,
            interpolation="bilinear",
        ),
        optimizer=FineTuningConfig(
            lr=3e-5,
            betas=(0.9, 0.999),
            weight_decay=0.05,
            warmup_steps=1500,
            warmup_start=1e-6,
            schedule="linear",
            layer_decay=0.9,
            layer_decay_over=None,
        ),
        # 160,000 steps of 16 are 127 epochs of 20,210 images
        trainer=TrainerConfig(max_epochs=1000, max_steps=160_000, checkpoint_every_n_steps=1000, log_every_n_steps=50),
        evaluation=SegmentationEvaluationConfig(every_n_epochs=13),
    )


def small_segmentation() -> SegmentationConfig:
    """Masks of one's own on one machine: the network is the checkpoint's, and epochs scale."""
    return SegmentationConfig(
        model=SegmentationModelConfig(drop_path_rate=0.1),
        data=SegmentationDataConfig(
            root="data/scenes", batch_size=4, num_workers=2, interpolation="bilinear", val_fraction=0.1
        ),
        optimizer=small_dense_optimizer(),
        trainer=TrainerConfig(max_epochs=0, checkpoint_every_n_steps=200),
        evaluation=SegmentationEvaluationConfig(every_n_epochs=5),
    )


def nano_segmentation() -> SegmentationConfig:
    """Small images, as of the generated sample set, on a laptop: narrow heads."""
    config = small_segmentation()
    config.model.head_width, config.model.drop_path_rate = 64, 0.0
    config.data.img_size, config.data.batch_size = 96, 8
    config.data.scales = (0.75, 1.5)
    config.optimizer.lr = 1e-3
    return config
