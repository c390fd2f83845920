"""How long a run is, AdamW, and the learning rate by step."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR

from itpn.training.config import OptimizerConfig, RunConfig
from itpn.training.module import TrainingModule


@dataclass(frozen=True)
class RunLength:
    """Images and steps of a run.

    Attributes:
        global_batch: images that one optimizer step sees, over all processes and accumulated passes.
        total_steps: optimizer steps of the whole run.
    """

    global_batch: int
    steps_per_epoch: int
    total_steps: int


def measure_run(config: RunConfig, images: int, passes_per_epoch: int, processes: int) -> RunLength:
    """The length of a run whose epoch has so many images, in so many batches of each process."""
    settings = config.trainer
    global_batch = min(config.data.batch_size * processes, images) * settings.accumulate_grad_batches
    steps_per_epoch = math.ceil(passes_per_epoch / settings.accumulate_grad_batches)  # the last may be of fewer passes
    steps = [steps_per_epoch * settings.max_epochs] if settings.max_epochs > 0 else []
    steps += [settings.max_steps] if settings.max_steps else []
    return RunLength(global_batch, steps_per_epoch, min(steps))


def peak_lr(settings: OptimizerConfig, global_batch: int) -> float:
    """The given learning rate, or the base one, which is for 256 images a step, scaled linearly."""
    return settings.base_lr * global_batch / 256 if settings.lr is None else settings.lr


def learning_rate(
    settings: OptimizerConfig, peak_lr: float, total_steps: int, steps_per_epoch: int
) -> Callable[[int], float]:
    """Learning rate as a fraction of the peak, by step: linear warm-up, then half a cosine or a line to ``min_lr``,
    or steps.

    The warm-up takes ``warmup_epochs`` or ``warmup_steps``, but at most ``max_warmup`` of all steps, so that short runs
    get somewhere.
    """
    wanted = settings.warmup_steps
    wanted = round(settings.warmup_epochs * steps_per_epoch) if wanted is None else wanted
    warmup = min(wanted, int(total_steps * settings.max_warmup))
    last = settings.min_lr / peak_lr if peak_lr else 0.0

    def fraction(step: int) -> float:
        if step < warmup:
            return settings.warmup_start + (1 - settings.warmup_start) * step / warmup
        if settings.schedule == "step":
            return 0.1 ** sum(step >= round(milestone * total_steps) for milestone in settings.milestones)
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if settings.schedule == "linear":
            return last + (1 - last) * (1 - progress)
        return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress))

    return fraction


def make_optimizer(module: TrainingModule, length: RunLength, precision: str) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW over the module's groups of parameters, and its learning rate, which changes after each step.

    Args:
        precision: Lightning's name of it.
    """
    settings: OptimizerConfig = module.config.optimizer
    peak = peak_lr(settings, length.global_batch)
    groups = module.parameter_groups()
    scales = [group.pop("lr_scale", 1.0) for group in groups]
    # loss scaling and gradient clipping together need the gradients unscaled outside a fused step
    fused = not (precision == "16-mixed" and settings.clip_grad)
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=settings.betas, fused=fused)
    fraction = learning_rate(settings, peak, length.total_steps, length.steps_per_epoch)
    return optimizer, LambdaLR(optimizer, [_scaled(fraction, scale) for scale in scales])


def _scaled(fraction: Callable[[int], float], scale: float) -> Callable[[int], float]:
    return lambda step: scale * fraction(step)
