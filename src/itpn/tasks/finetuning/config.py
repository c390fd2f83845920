"""What all fine-tuning has: a network that comes from a checkpoint, learning rates by layer."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from itpn.errors import UserError
from itpn.system.checks import NonNegativeFloat, NumHeads, PositiveFraction, PositiveInt
from itpn.training.config import Mean, ModelConfig, OptimizerConfig, Settings, Std, check_images


@dataclass
class NetworkConfig(ModelConfig):
    """The network, with a checkpoint's weights or without."""

    scratch: bool = False
    """Start from random weights instead."""
    num_heads: NumHeads | None = None
    """Attention heads, where the checkpoint cannot tell them."""
    pos_embed: Literal["fixed", "learned"] = "learned"
    """Keep the position table as it is, or train it."""
    rel_pos_bias: bool | None = None
    """A relative position bias in each attention block, beginning at zero where the checkpoint has none; None for the
    checkpoint's, or the model's own."""
    init_values: NonNegativeFloat | None = None
    """From scratch: initial layer scale; None for no layer scale. A checkpoint's own stays."""

    def of_checkpoint(self, path: str) -> "NetworkConfig":
        return replace(self, checkpoint=path, channel_map=None, scratch=False)


@dataclass
class LabelledDataConfig(Settings):
    """Which of the labelled images are used, and how their pixels become inputs of the network."""

    label_fraction: PositiveFraction = 1.0
    """Fraction of the training images that is used, of each class where images have classes; the same images for the
    same seed, and those of a smaller fraction among them."""
    mean: tuple[Mean, ...] | None = None
    """Mean subtracted from each channel, of pixels in [0, 1]; None for the checkpoint's; without one ImageNet's of
    photographs, for that of the images of others."""
    std: tuple[Std, ...] | None = None
    """Standard deviation that each channel is divided by; None as for the mean."""


@dataclass
class FineTuningConfig(OptimizerConfig):
    """AdamW with learning rates that fall from the head to the first layer; linear warm-up, then a cosine or steps."""

    layer_decay: PositiveFraction | None = None
    """Factor of the learning rate from layer to layer, towards the input; None for the same everywhere."""
    layer_decay_over: PositiveInt | None = 13
    """Layers that --optimizer.layer-decay is meant for: a network of L layers takes its power 13 / L at each, as the
    official code does. None takes it as it is."""


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


def check_fine_tuning(config: Any) -> None:
    """Find impossible settings among those that all runs of fine-tuning have.

    Raises:
        UserError: the first that is found, with what to do.
    """
    model, data = config.model, config.data
    check_images(data, model.in_chans)
    if model.patch_size is not None and model.patch_size % 4:
        raise UserError(f"--model.patch-size must be divisible by 4, not {model.patch_size}")
    if model.checkpoint is not None:
        if model.scratch:
            raise UserError("both --model.scratch and --model.checkpoint: choose one, or give --model.no-scratch")
    elif not model.scratch:
        raise UserError("give the weights to start from as --model.checkpoint FILE, or --model.scratch for none")
    elif model.name is None:
        raise UserError("--model.scratch needs a --model.name of `itpn list`")
