"""Settings of classifiers that recipe files call."""

from itpn.tasks.classification.config import ClassificationConfig, ClassificationDataConfig, ClassificationModelConfig
from itpn.tasks.finetuning.config import FineTuningConfig
from itpn.training.config import TrainerConfig


def fine_tuning(
    model: str,
    max_epochs: int,
    *,
    base_lr: float,
    layer_decay: float | None,
    drop_path_rate: float,
    batch: int = 1024,
    warmup_epochs: int = 5,
) -> ClassificationConfig:
    """ImageNet-1K fine-tuning as published (REFERENCE: Tian et al. 2023, appendix; the official code), on 8 GPUs.

    The layer decay is in the official form: over the layers of the network it is as much as over 13. What is not
    published is as in He et al. 2022: crops, the end of the cosine.

    Args:
        base_lr: for 256 images a step.
        batch: images of a step.
    """
    return ClassificationConfig(
        model=ClassificationModelConfig(name=model, drop_path_rate=drop_path_rate, ema_decay=0.9999),
        data=ClassificationDataConfig(batch_size=batch // 8, crop_scale=(0.08, 1.0), img_size=224),
        optimizer=FineTuningConfig(
            base_lr=base_lr,
            betas=(0.9, 0.999),
            weight_decay=0.05,
            warmup_epochs=warmup_epochs,
            max_warmup=0.2,
            min_lr=1e-6,
            layer_decay=layer_decay,
        ),
        trainer=TrainerConfig(max_epochs=max_epochs),
    )


def pixel_fine_tuning(model: str) -> ClassificationConfig:
    """From pixel supervision; relative positions are added, as the released fine-tuned weights have them."""
    if "large" in model:
        config = fine_tuning(model, 50, base_lr=1e-3, layer_decay=0.55, drop_path_rate=0.2)
    else:
        config = fine_tuning(model, 100, base_lr=4e-4, layer_decay=0.60, drop_path_rate=0.15)
    config.model.rel_pos_bias = True
    return config


def clip_fine_tuning(model: str) -> ClassificationConfig:
    """From CLIP supervision; its learning rates are published as they are, for its batches."""
    if "large" in model:
        return fine_tuning(model, 50, base_lr=2e-4 / 2, layer_decay=0.55, drop_path_rate=0.25, batch=512)
    return fine_tuning(model, 100, base_lr=5e-4 / 4, layer_decay=0.60, drop_path_rate=0.1, warmup_epochs=20)


def fast_fine_tuning(model: str, img_size: int) -> ClassificationConfig:
    """Fine-tuning of Fast-iTPN, whose settings were not published: those of iTPN from CLIP, with the same global batch.

    Larger images go through in several passes.
    """
    config = clip_fine_tuning(model)
    config.data.img_size = img_size
    passes = {224: 1, 384: 2, 512: 4}[img_size]
    config.data.batch_size //= passes
    config.trainer.accumulate_grad_batches = passes
    if img_size > 224:
        config.data.crop_pct = 1.0  # as is usual where the test size is not the pre-training's
    return config


def from_scratch(model: str, drop_path_rate: float) -> ClassificationConfig:
    """Supervised training of HiViT as in mmpretrain: 300 epochs, 1024 images a step (Zhang et al. 2023)."""
    config = fine_tuning(model, 300, base_lr=2.5e-4, layer_decay=None, drop_path_rate=drop_path_rate, warmup_epochs=20)
    config.model.scratch = True
    config.optimizer.clip_grad, config.optimizer.min_lr = 5.0, 1e-5
    return config


def small_fine_tuning() -> ClassificationConfig:
    """A classifier of one's own images on one machine: the network is the checkpoint's, and epochs scale."""
    return ClassificationConfig(
        model=ClassificationModelConfig(drop_path_rate=0.1, ema_decay=0.999),
        data=ClassificationDataConfig(
            root=("data/images",),
            batch_size=64,
            num_workers=2,
            crop_scale=(0.3, 1.0),
            mixup=0.0,  # few steps: images as they are teach faster
            cutmix=0.0,
        ),
        optimizer=FineTuningConfig(
            base_lr=2e-3, betas=(0.9, 0.999), warmup_epochs=5, min_lr=1e-6, clip_grad=1.0, layer_decay=0.75
        ),
        trainer=TrainerConfig(max_epochs=0, checkpoint_every_n_steps=200),
    )


def cifar_fine_tuning() -> ClassificationConfig:
    """Images of 32 pixels, of which there is nothing to cut away."""
    config = small_fine_tuning()
    config.data.root, config.data.img_size, config.data.crop_pct = ("data/cifar10",), 32, 1.0
    config.data.crop_scale, config.data.batch_size = (0.5, 1.0), 128
    config.data.auto_augment, config.data.erase = "rand-m5-mstd0.5-inc1", 0.0
    return config


def linear_probe() -> ClassificationConfig:
    """A linear classifier on frozen features: the exact optimum, no schedule."""
    return ClassificationConfig(
        model=ClassificationModelConfig(freeze=True),
        data=ClassificationDataConfig(root=("data/images",), num_workers=2),
    )
