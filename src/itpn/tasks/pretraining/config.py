"""Settings of a pre-training run."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from itpn.errors import UserError
from itpn.system.checks import (
    Channel,
    Depth,
    Fraction,
    NonNegativeFloat,
    NumHeads,
    PatchSize,
    PositiveInt,
    Range,
    Side,
    Width,
)
from itpn.teachers import AUTO
from itpn.training.config import (
    CropsConfig,
    Mean,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    Settings,
    Std,
    check_crops,
    check_images,
    check_size,
    check_types,
    image_size,
)


@dataclass
class PretrainingModelConfig(ModelConfig):
    """The network and its masked objective."""

    name: str = "itpn_base"
    """Backbone, one of the models of `itpn list`."""
    patch_size: PatchSize = 16
    """Side of a patch in pixels, divisible by 4."""
    pos_embed: Literal["fixed", "learned"] = "fixed"
    """Keep the sine-cosine position table of the backbone, or train it."""
    rel_pos_bias: bool | None = None
    """A relative position bias in each attention block; None for the model's own."""
    weight_init: Literal["xavier", "trunc_normal"] = "xavier"
    """Initial weights: Xavier uniform, or normal of std 0.02 with smaller ones in deep blocks."""
    mask: Literal["random", "block"] = "random"
    """Mask single patches, or rectangular blocks of them."""
    mask_ratio: Fraction = 0.75
    """Fraction of the patches of an image that are masked."""
    masked_patches: Literal["dropped", "mask_token"] = "dropped"
    """Drop masked patches from the backbone, or compute all, with a mask token in their place from stage 3 on."""
    masked_laterals: bool = False
    """With mask tokens: the pyramid takes stages 1 and 2 of masked patches too, although these see them (published for
    CLIP)."""
    pixel_weight: NonNegativeFloat = 1.0
    """Weight of the loss on masked pixels; 0 leaves it out, as with every weight."""
    feature_weight: NonNegativeFloat = 0.0
    """Weight of the loss on the teacher's features, predicted from all pyramid levels together."""
    auxiliary_weight: NonNegativeFloat = 0.0
    """Weight of the same loss on a second head after three quarters of stage 3."""
    pyramid_weights: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (0.0, 0.0, 0.0)
    """Weights of masked feature modelling, a head of its own for each pyramid level, finest first."""
    feature_loss: Literal["smooth_l1", "cosine", "cross_entropy"] = "smooth_l1"
    """Measure of the error in features; cross_entropy repeats a published setting and is not recommended."""
    feature_patches: Literal["all", "masked"] = "masked"
    """Patches whose features are compared."""
    norm_pix_loss: bool = True
    """Predict pixels normalized by the mean and standard deviation of their patch (He et al. 2022)."""
    norm_pix_per: Literal["patch", "channel", "auto"] = "patch"
    """One mean and standard deviation for all channels of a patch, as published, or one of each for each channel: where
    a patch is flat, those of all channels leave little to predict but the channels' offsets. `auto`: of each channel,
    with a floor and the data's own mean and standard deviation, if many patches of the images are flat; with these
    statistics alone if all are grey."""
    norm_pix_floor: NonNegativeFloat | None = None
    """Floor of that standard deviation, added in quadrature, as a multiple of --data.std: what varies less in a patch
    becomes a small target instead of amplified noise. None for 0, or for what --model.norm-pix-per auto chooses."""
    init_values: NonNegativeFloat | None = None
    """Initial layer scale of the backbone; None for no layer scale."""
    migrate_ratio: float = 0.0
    """Fraction of the tokens that skip the last blocks of stage 3 (token migration): faster, for a little accuracy."""
    migrate_from: Depth | None = None
    """First block that they skip, counted from 0; None for the middle of stage 3."""
    gather_window: Annotated[int, Range(0, 1024)] = 0
    """Side of the windows that attention stays in, in tokens, with gathering tokens between windows. 0 for global
    attention, which is also used where masked patches are dropped."""
    gather_side: int = 1
    """Gathering tokens of a window's side; a divisor of --model.gather-window."""
    pyramid_width: Width | None = None
    """Channels of the pyramid; None for the model's own."""
    pyramid_depth: Depth | None = None
    """Blocks per pyramid level; None for the model's own."""
    decoder_embed_dim: Width = 512
    """Channels of the decoder, divisible by 16 and by its heads."""
    decoder_depth: Depth = 6
    """Transformer blocks of the decoder."""
    decoder_num_heads: NumHeads = 16
    """Attention heads of the decoder."""
    pyramid_head_width: Width = 256
    """Channels of the heads of single pyramid levels, divisible by 64."""
    pyramid_head_depth: Depth = 1
    """Transformer blocks of the heads of single pyramid levels."""


@dataclass
class TeacherConfig(Settings):
    """Whose features are predicted."""

    name: str | None = None
    """A timm model, e.g. vit_base_patch16_clip_quickgelu_224.openai; `auto` for the model that --teacher.checkpoint
    says it holds, a folder of transformers or timm or a CLIP ViT of OpenAI's; `ema` for an EMA of the network itself;
    None for no teacher, with --teacher.checkpoint for `auto`."""
    checkpoint: str | None = None
    """Weights of the teacher: a file in timm's, OpenAI CLIP's or open_clip's form or the authors' own, or a folder with
    config.json and model.safetensors; None fetches them from timm's hub."""
    sha256: str | None = None
    """SHA-256 of the file of the teacher's weights: others are refused. None takes it from the file."""
    width: Width | None = None
    """Channels of the teacher's features: read from the teacher, and kept for when it is not there."""
    channels: tuple[Channel, Channel, Channel] | None = None
    """Channels of the images, counted from 0, that a teacher of photographs sees as red, green and blue, scaled from
    the images' range of values to that of photographs; of grey images 0 0 0. None for images of three channels."""
    normalize: bool = True
    """Normalize each feature by its own mean and standard deviation."""
    momentum: Fraction = 0.996
    """ema: momentum of the EMA, lower in the first thousands of steps."""
    momentum_end: Fraction = 1.0
    """ema: momentum at the end of the run, reached along half a cosine."""
    min_std: NonNegativeFloat = 0.05
    """Warn of a collapse when the standard deviation of the targets over a batch is smaller."""

    def __post_init__(self) -> None:
        if self.name is None and self.checkpoint is not None:
            self.name = AUTO


@dataclass
class PretrainingDataConfig(CropsConfig):
    """The images."""

    root: tuple[str, ...] = ("data/imagenet",)
    """Folders of images of any depth, or tar shards, or several of either; of folders that are divided into `train`,
    `val` and the like, the training part alone."""
    members: tuple[str, ...] = ()
    """Tar shards: endings of the images to read, as `jpg` or `rgb.png`, or `all`; by default the plain one of each
    sample (`x.jpg`), not what describes it (`x.seg.png`)."""
    img_size: Side | tuple[Side, Side] = 224
    """Pixels of a side, or height and width."""
    mean: tuple[Mean, ...] | None = None
    """Mean subtracted from each channel, of pixels in [0, 1]; None for ImageNet's of photographs, for that of the
    images of others."""
    std: tuple[Std, ...] | None = None
    """Standard deviation that each channel is divided by; None as for the mean."""
    decode: Literal["workers", "gpu"] = "workers"
    """Where JPEGs are decoded, cropped and augmented: in the workers, or on the GPU by nvJPEG, for machines with few
    cores for each GPU."""
    shuffle_buffer: PositiveInt = 1000
    """Tar shards: images held back per worker for shuffling."""
    samples_per_epoch: PositiveInt | None = None
    """Tar shards: images in an epoch; None counts them once at the start."""


@dataclass
class ProbeConfig(Settings):
    """Evaluation of the features on labelled images during the run: k-NN and a linear classifier."""

    root: str | None = None
    """Labelled images as of a classifier's run, with a train and a val set; None for no probe."""
    every_n_epochs: PositiveInt = 10
    """Epochs between probes; there is one at the end as well."""
    max_images: PositiveInt = 5000
    """Images used of either set, evenly from all classes; at least one of each."""


@dataclass
class PretrainingConfig(RunConfig):
    """Settings of a pre-training run."""

    task: ClassVar[str] = "pretraining"
    visualizations: ClassVar[str] = "reconstructions"
    free: ClassVar[Mapping[str, frozenset[str]]] = {
        **RunConfig.free,
        "teacher": frozenset({"checkpoint", "min_std"}),
        "probe": frozenset({"root", "every_n_epochs", "max_images"}),
    }
    from_images: ClassVar[Mapping[str, Collection[str]]] = {
        **RunConfig.from_images,
        "model": (*RunConfig.from_images["model"], "norm_pix_per", "norm_pix_floor"),
        "teacher": ("sha256",),
    }
    model: PretrainingModelConfig = field(default_factory=PretrainingModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: PretrainingDataConfig = field(default_factory=PretrainingDataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    @property
    def evaluation_interval(self) -> int:
        return self.probe.every_n_epochs

    def sharding_problem(self) -> str | None:
        if self.teacher.name == "ema":
            return "keeps no EMA: choose another --teacher.name"
        return "cannot probe: leave out --probe.root" if self.probe.root is not None else None

    def check(self) -> None:
        super().check()
        check_model(self.model, self.teacher)
        model, data = self.model, self.data
        check_crops(data)
        if not self.trainer.max_epochs:
            raise UserError("--trainer.max-epochs must be at least 1, not 0")
        check_images(data, model.in_chans)
        check_patches(model, image_size(data))


def check_model(model: PretrainingModelConfig, teacher: TeacherConfig) -> None:
    """Find settings that no network can be built from, or that would train only a part of it.

    Raises:
        UserError: the first that is found, with what to do.
    """
    check_types(model, "model.")
    check_types(teacher, "teacher.")
    if not 0 <= model.migrate_ratio < 1:
        raise UserError(f"--model.migrate-ratio must be at least 0 and below 1, not {model.migrate_ratio}")
    if model.gather_side < 1 or model.gather_window % model.gather_side:
        raise UserError(
            f"--model.gather-side must divide --model.gather-window {model.gather_window}, not {model.gather_side}"
        )
    if model.migrate_from is not None and not model.migrate_ratio:
        raise UserError("--model.migrate-from has no effect without --model.migrate-ratio")
    if model.pyramid_head_width < 1 or model.pyramid_head_width % 64:
        raise UserError(f"--model.pyramid-head-width must be divisible by 64, not {model.pyramid_head_width}")
    if model.decoder_embed_dim % 16 or (model.decoder_depth and model.decoder_embed_dim % model.decoder_num_heads):
        raise UserError(
            "--model.decoder-embed-dim must be divisible by 16 and by --model.decoder-num-heads "
            f"{model.decoder_num_heads}, not {model.decoder_embed_dim}"
        )
    if model.norm_pix_floor and not model.norm_pix_loss:
        raise UserError("--model.norm-pix-floor has no effect with --model.no-norm-pix-loss: leave one of them out")
    check_losses(model)
    check_teacher(teacher, any([model.feature_weight, model.auxiliary_weight, *model.pyramid_weights]))
    check_masked_patches(model)


def check_patches(model: PretrainingModelConfig, img_size: tuple[int, int]) -> None:
    """Raise :class:`UserError` for images that are not whole patches, of which some are masked and some visible."""
    if model.patch_size % 4:
        raise UserError(f"--model.patch-size must be divisible by 4, not {model.patch_size}")
    check_size(img_size, model.patch_size)
    patches = (img_size[0] // model.patch_size) * (img_size[1] // model.patch_size)
    if not 0 < int(patches * (1 - model.mask_ratio)) < patches:
        raise UserError(
            f"--model.mask-ratio {model.mask_ratio} leaves no visible or no masked patch of the {patches} "
            "of an image; choose one between 0 and 1, a larger --data.img-size or a smaller --model.patch-size"
        )


def check_losses(model: PretrainingModelConfig) -> None:
    """Raise :class:`UserError` where the losses leave a part of the network untrained."""
    if not any([model.pixel_weight, model.feature_weight, model.auxiliary_weight, *model.pyramid_weights]):
        raise UserError("nothing is predicted: set --model.pixel-weight, --model.feature-weight or another above 0")
    if not (model.pixel_weight or model.feature_weight or all(model.pyramid_weights)):
        raise UserError(
            "a part of the network would stay untrained: set --model.pixel-weight, --model.feature-weight or all three "
            "of --model.pyramid-weights above 0"
        )


def check_masked_patches(model: PretrainingModelConfig) -> None:
    """Raise :class:`UserError` where masked patches cannot be predicted, or can be copied."""
    if model.masked_patches == "mask_token":
        if model.masked_laterals and model.pixel_weight:
            raise UserError("--model.masked-laterals shows the pixels that --model.pixel-weight has predicted: use one")
        return
    if model.masked_laterals:
        raise UserError("--model.masked-laterals needs --model.masked-patches mask_token")
    alone = {
        "--model.decoder-depth": (model.pixel_weight or model.feature_weight) and not model.decoder_depth,
        "--model.pyramid-head-depth": any(model.pyramid_weights) and not model.pyramid_head_depth,
    }
    for option, wrong in alone.items():
        if wrong:
            raise UserError(
                f"{option} 0 leaves masked patches without attention to the others; give it a block or more, or "
                "--model.masked-patches mask_token"
            )


def check_teacher(teacher: TeacherConfig, features: bool) -> None:
    """Raise :class:`UserError` for a teacher that is missing or not needed, or without weights.

    Args:
        features: whether features are predicted.
    """
    if features and teacher.name is None:
        raise UserError(
            "a loss on features needs a teacher: give --teacher.name, `ema` or a model of timm, or --teacher.checkpoint"
        )
    if teacher.name is not None and not features:
        raise UserError(
            f"teacher {teacher.name} has nothing to do: set --model.feature-weight or --model.pyramid-weights above 0"
        )
    if teacher.channels is not None and teacher.name in (None, "ema"):
        raise UserError("--teacher.channels is for a teacher of photographs; the EMA of the network sees all channels")
    if teacher.checkpoint is not None:
        if teacher.name == "ema":
            raise UserError("--teacher.checkpoint has no meaning for the teacher `ema`, an EMA of the network")
        if not Path(teacher.checkpoint).exists():
            raise UserError(f"--teacher.checkpoint {teacher.checkpoint} does not exist")
    if teacher.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", teacher.sha256):
        raise UserError(f"--teacher.sha256 must have 64 digits from 0 to f, not {teacher.sha256!r}")
    if not 0 <= teacher.momentum <= teacher.momentum_end <= 1:
        raise UserError(
            f"--teacher.momentum {teacher.momentum} and --teacher.momentum-end {teacher.momentum_end} must lie between "
            "0 and 1, in this order"
        )
