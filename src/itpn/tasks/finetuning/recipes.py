"""Settings that recipes of several tasks share."""

from itpn.tasks.finetuning.config import FineTuningConfig


def small_dense_optimizer() -> FineTuningConfig:
    """For objects and pixels of one's own."""
    return FineTuningConfig(
        lr=2e-4,
        betas=(0.9, 0.999),
        warmup_epochs=5,
        min_lr=1e-6,
        clip_grad=1.0,
        layer_decay=0.9,
        layer_decay_over=None,
    )
