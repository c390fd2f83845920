"""What a run is: typed settings that a recipe fills in and every command line option overrides.

Light on purpose: nothing here imports torch, so that a mistake in an option is answered at once.
"""

import dataclasses
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from itpn.errors import UserError

HUB = "hf-hub:"  # before the name of a repository, as timm writes it


@dataclass
class ModelConfig:
    """The network and its masked objective."""

    name: str = "itpn_base"
    """Backbone, one of the models of `itpn list`."""
    checkpoint: str | None = None
    """Start from the weights of any file that `itpn inspect` knows, or of hf-hub:OWNER/NAME; what it lacks starts
    fresh and is said."""
    patch_size: int = 16
    """Side of a unit in pixels, divisible by 4."""
    in_chans: int = 3
    """Channels of the images: 3 for colour, 1 for grey."""
    pos_embed: Literal["fixed", "learned"] = "fixed"
    """Keep the sine-cosine position table of the backbone, or train it."""
    rel_pos_bias: bool | None = None
    """A relative position bias in each attention block; None for the model's own."""
    weight_init: Literal["xavier", "trunc_normal"] = "xavier"
    """Initial weights: Xavier uniform, or normal of deviation 0.02 with smaller ones in deep blocks."""
    mask: Literal["random", "block"] = "random"
    """Hide units one by one, or in rectangular blocks."""
    mask_ratio: float = 0.75
    """Share of units hidden in each image."""
    hidden_units: Literal["dropped", "mask_token"] = "dropped"
    """Leave hidden units out of the backbone, or compute all with a mask token in their place from stage 3 on."""
    hidden_laterals: bool = False
    """With mask tokens: let stages 1 and 2 of hidden units, which see them, into the pyramid (published for CLIP)."""
    pixel_weight: float = 1.0
    """Weight of the loss on hidden pixels; 0 leaves it out, as with every weight."""
    feature_weight: float = 0.0
    """Weight of the loss on the teacher's features, predicted from all pyramid levels together."""
    auxiliary_weight: float = 0.0
    """Weight of the same loss on a second head after three quarters of stage 3."""
    pyramid_weights: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Weights of masked feature modelling, a head of its own for each pyramid level, finest first."""
    feature_loss: Literal["smooth_l1", "cosine", "cross_entropy"] = "smooth_l1"
    """Measure of the error in features; cross_entropy repeats a published setting and is not recommended."""
    feature_units: Literal["all", "hidden"] = "hidden"
    """Units whose features are compared."""
    normalize_target: bool = True
    """Predict pixels normalised by the mean and deviation of their unit."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last backbone block; it grows from 0 block by block."""
    init_values: float | None = None
    """Initial layer scale of the backbone; None for no layer scale."""
    migrate_ratio: float = 0.0
    """Share of the units that skip the last blocks of stage 3 (token migration): faster, for a little accuracy."""
    migrate_from: int | None = None
    """First block that they skip, counted from 0; None for the middle of stage 3."""
    gather_window: int = 0
    """Units of a side of the windows that attention stays in, with gathering tokens between them; 0 for global
    attention, which is also what there is where hidden units are dropped."""
    gather_side: int = 1
    """Gathering tokens of a window's side; a divisor of --model.gather-window."""
    pyramid_width: int | None = None
    """Channels of the pyramid; None for the model's own."""
    pyramid_depth: int | None = None
    """Blocks per pyramid level; None for the model's own."""
    decoder_width: int = 512
    """Channels of the decoder, divisible by 16 and by its heads."""
    decoder_depth: int = 6
    """Transformer blocks of the decoder."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""
    pyramid_head_width: int = 256
    """Channels of the heads of single pyramid levels, divisible by 64."""
    pyramid_head_depth: int = 1
    """Transformer blocks of the heads of single pyramid levels."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, slower."""


@dataclass
class TeacherConfig:
    """Whose features are predicted."""

    name: str | None = None
    """A timm model, e.g. vit_base_patch16_clip_quickgelu_224.openai; `clip` for a CLIP tower of whatever size in
    --teacher.checkpoint; `ema` for a moving average of the network itself; None for no teacher."""
    checkpoint: str | None = None
    """Weights of the teacher, in timm, OpenAI CLIP or open_clip form; None fetches them from timm's hub."""
    width: int | None = None
    """Numbers of a unit's feature: read from the teacher, and kept for when it is not there."""
    normalize: bool = True
    """Normalise each feature by its own mean and deviation."""
    momentum: float = 0.996
    """ema: share of the average that is kept at each step, less in the first thousands."""
    momentum_end: float = 1.0
    """ema: the same at the end of the run, reached by half a cosine."""
    min_std: float = 0.05
    """Warn of a collapse when the deviation of the targets over a batch is smaller."""


@dataclass
class DataConfig:
    """The images."""

    root: tuple[str, ...] = ("data/imagenet",)
    """Folders of images of any depth, or tar shards, or several of either; of a folder with `train` in it, that."""
    img_size: int | tuple[int, int] = 224
    """Pixels of a side, or height and width."""
    batch_size: int = 512
    """Images per process and forward pass."""
    num_workers: int = 8
    """Processes that read images, for each training process; 0 reads in the training process."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of a random crop as a share of the image."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    """Aspect ratio (width over height) of a random crop."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How crops are resized."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean subtracted from each channel, of pixels in [0, 1]."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Deviation that each channel is divided by."""
    max_broken: float = 0.05
    """Share of unreadable images above which the run stops."""
    max_pixels: int = 2**27  # as itpn.data.decode.MAX_PIXELS
    """Images that declare more pixels than this are refused as decompression bombs."""
    shuffle_buffer: int = 1000
    """Tar shards: images held back per worker for shuffling."""
    samples_per_epoch: int | None = None
    """Tar shards: images in an epoch; None counts them once at the start."""


@dataclass
class OptimizerConfig:
    """AdamW and its schedule: linear warm-up, then cosine, step by step."""

    base_lr: float = 1.5e-4
    """Learning rate for a global batch of 256 images; the true one scales with the global batch."""
    lr: float | None = None
    """Peak learning rate as it is; overrides --optimizer.base-lr."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's averages."""
    weight_decay: float = 0.05
    """Decay of everything but norms, biases, position embeddings and mask tokens."""
    warmup_epochs: float = 40
    """Epochs of linear warm-up, at most a tenth of the run."""
    warmup_start: float = 1e-4
    """Share of the peak learning rate at the first step."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    clip_grad: float | None = None
    """Largest norm of the gradient; None does not clip."""


@dataclass
class TrainerConfig:
    """How long, on what, and what is written meanwhile."""

    max_epochs: int = 800
    """Passes over the images."""
    max_steps: int | None = None
    """Optimiser steps at which the run ends, if epochs do not end it before; the schedule follows."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU that has it, fp16 with loss scaling on one that has not, 32 bits on a CPU."""
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """What to train on."""
    devices: int | None = None
    """Devices of this machine; None for all GPUs (or one CPU process), or what torchrun or Slurm started."""
    num_nodes: int | None = None
    """Machines; None for what torchrun or Slurm started, else one."""
    accumulate_grad_batches: int = 1
    """Forward passes per optimiser step; the global batch grows with it."""
    compile: bool = False
    """Compile the network, and its moving average, with torch.compile: minutes at the start, faster steps."""
    checkpoint_every_n_steps: int = 500
    """Optimiser steps between checkpoints: what a crash loses at most."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept, beside the best."""
    log_every_n_steps: int = 10
    """Optimiser steps between entries of metrics.csv and TensorBoard."""
    picture_every_n_steps: int | None = None
    """Optimiser steps between reconstruction pictures; None for ten in a run."""


@dataclass
class Config:
    """Settings of a pre-training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    seed: int = 0
    """All randomness of the run follows from this."""
    name: str = "default"
    """Name of the run; the same name goes on where it was stopped."""
    output_dir: str = "runs"
    """The run is written to OUTPUT_DIR/RECIPE/NAME."""


def image_size(config: DataConfig) -> tuple[int, int]:
    """Height and width of the training images."""
    return config.img_size if isinstance(config.img_size, tuple) else (config.img_size, config.img_size)


def override_model(config: Config, overrides: dict[str, Any]) -> Config:
    """Settings with some of the network's replaced by name, ``img_size`` among the names.

    Raises:
        UserError: an unknown name.
    """
    known = [f.name for f in dataclasses.fields(ModelConfig)] + ["img_size"]
    for name in overrides:
        if name not in known:
            raise UserError(f"no model setting {name!r}; there are {', '.join(known)}")
    settings = dict(overrides)
    data = dataclasses.replace(config.data, img_size=settings.pop("img_size", config.data.img_size))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **settings), data=data)


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dict of JSON and YAML types."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def from_dict(settings: dict[str, Any]) -> Config:
    """Undo :func:`to_dict`; settings that are not there keep their default, unknown ones are a :class:`UserError`."""

    def build(cls: type, values: dict[str, Any], path: str) -> Any:
        types = typing.get_type_hints(cls)
        kwargs = {}
        for key, value in values.items():
            if key not in types:
                raise UserError(f"unknown setting {path}{key}")
            if dataclasses.is_dataclass(types[key]):
                value = build(types[key], value, f"{key}.")
            elif isinstance(value, str) and float in (types[key], *typing.get_args(types[key])):
                value = float(value)  # YAML takes 1e-3 for text
            kwargs[key] = tuple(value) if isinstance(value, list) else value
        return cls(**kwargs)

    return build(Config, settings, "")


def read_yaml(path: Path) -> tuple[str, Config]:
    """Recipe name and settings of a run's config.yaml."""
    try:
        settings = yaml.safe_load(path.read_text())
        recipe = settings.pop("recipe")
        return recipe, from_dict(settings)
    except (yaml.YAMLError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a run's config.yaml ({type(error).__name__}: {error})") from error


def write_yaml(path: Path, recipe: str, config: Config) -> None:
    """Write what repeats the run: `itpn train config.yaml`."""
    path.write_text(yaml.safe_dump({"recipe": recipe, **to_dict(config)}, sort_keys=False))


def option_names(cls: type = Config, prefix: str = "") -> list[str]:
    """Every setting as it is written on the command line, e.g. ``--data.batch-size``."""
    names = []
    for name, kind in typing.get_type_hints(cls).items():
        option = f"{prefix}{name.replace('_', '-')}"
        names += option_names(kind, f"{option}.") if dataclasses.is_dataclass(kind) else [f"--{option}"]  # type: ignore[arg-type]
    return names


def _check_types(cls: type, settings: Any, path: str) -> None:
    """A recipe file may assign anything; find what is not of its field's type."""
    for name, hint in typing.get_type_hints(cls).items():
        value = getattr(settings, name)
        if dataclasses.is_dataclass(hint):
            _check_types(hint, value, f"{name}.")  # type: ignore[arg-type]  # a dataclass is a type
            continue
        check_type(value, hint, f"{path}{name}")


def check_type(value: Any, hint: Any, what: str) -> None:
    """Raise :class:`UserError` if a value is not of the type of its annotation."""
    import typeguard

    try:
        typeguard.check_type(value, hint, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
    except typeguard.TypeCheckError:
        wanted = hint.__name__ if isinstance(hint, type) else re.sub(r"(\w+\.)+", "", str(hint))
        raise UserError(f"{what} must be {wanted}, not {value!r}") from None


def check(config: Config) -> None:
    """Find impossible settings before anything heavy starts.

    Raises:
        UserError: the first that is found, with what to do.
    """
    _check_types(Config, config, "")
    check_model(config.model, config.teacher)
    model, data, optimizer, trainer = config.model, config.data, config.optimizer, config.trainer
    counts: dict[str, int | None] = {
        "--data.batch-size": data.batch_size,
        "--data.max-pixels": data.max_pixels,
        "--data.shuffle-buffer": data.shuffle_buffer,
        "--data.samples-per-epoch": data.samples_per_epoch,
        "--model.patch-size": model.patch_size,
        "--model.pyramid-width": model.pyramid_width,
        "--model.decoder-width": model.decoder_width,
        "--model.decoder-heads": model.decoder_heads,
        "--teacher.width": config.teacher.width,
        "--trainer.max-epochs": trainer.max_epochs,
        "--trainer.max-steps": trainer.max_steps,
        "--trainer.devices": trainer.devices,
        "--trainer.num-nodes": trainer.num_nodes,
        "--trainer.accumulate-grad-batches": trainer.accumulate_grad_batches,
        "--trainer.checkpoint-every-n-steps": trainer.checkpoint_every_n_steps,
        "--trainer.keep-checkpoints": trainer.keep_checkpoints,
        "--trainer.log-every-n-steps": trainer.log_every_n_steps,
        "--trainer.picture-every-n-steps": trainer.picture_every_n_steps,
    }
    for option, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"{option} must be at least 1, not {value}")
    amounts: dict[str, float | None] = {
        "--data.num-workers": data.num_workers,
        "--model.pyramid-depth": model.pyramid_depth,
        "--model.decoder-depth": model.decoder_depth,
        "--model.init-values": model.init_values,
        "--model.pyramid-head-depth": model.pyramid_head_depth,
        "--model.pixel-weight": model.pixel_weight,
        "--model.feature-weight": model.feature_weight,
        "--model.auxiliary-weight": model.auxiliary_weight,
        "--model.pyramid-weights": min(model.pyramid_weights),
        "--teacher.min-std": config.teacher.min_std,
        "--optimizer.base-lr": optimizer.base_lr,
        "--optimizer.lr": optimizer.lr,
        "--optimizer.weight-decay": optimizer.weight_decay,
        "--optimizer.warmup-epochs": optimizer.warmup_epochs,
        "--optimizer.warmup-start": optimizer.warmup_start,
        "--optimizer.min-lr": optimizer.min_lr,
        "--optimizer.clip-grad": optimizer.clip_grad,
        "--seed": config.seed,
    }
    for option, amount in amounts.items():
        if amount is not None and not 0 <= amount < float("inf"):
            raise UserError(f"{option} must be at least 0, not {amount}")
    shares = {
        "--data.hflip": data.hflip,
        "--data.max-broken": data.max_broken,
        "--data.color-jitter": data.color_jitter,
        "--model.drop-path-rate": model.drop_path_rate,
    }
    for option, share in shares.items():
        if not 0 <= share <= 1:
            raise UserError(f"{option} must lie between 0 and 1, not {share}")
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        raise UserError(f"--optimizer.betas must lie between 0 and 1, not {optimizer.betas}")
    if model.patch_size % 4:
        raise UserError(f"--model.patch-size must be divisible by 4, not {model.patch_size}")
    if model.in_chans not in (1, 3):
        raise UserError(f"--model.in-chans must be 1 (grey) or 3 (colour) to train on images, not {model.in_chans}")
    height, width = image_size(data)
    patch = model.patch_size
    if height < patch or width < patch or height % patch or width % patch:
        raise UserError(
            f"--data.img-size {height}x{width} is not a multiple of --model.patch-size {patch}; "
            f"try {max(1, round(height / patch)) * patch}x{max(1, round(width / patch)) * patch}"
        )
    units = (height // patch) * (width // patch)
    if not 0 < int(units * (1 - model.mask_ratio)) < units:
        raise UserError(
            f"--model.mask-ratio {model.mask_ratio} leaves no visible or no hidden unit of the {units} of an image; "
            "choose one between 0 and 1, a larger --data.img-size or a smaller --model.patch-size"
        )
    if model.decoder_width % 16 or (model.decoder_depth and model.decoder_width % model.decoder_heads):
        raise UserError(
            f"--model.decoder-width must be divisible by 16 and by --model.decoder-heads {model.decoder_heads}, "
            f"not {model.decoder_width}"
        )
    for option, values in {"--data.mean": data.mean, "--data.std": data.std}.items():
        if len(values) not in (1, model.in_chans):
            raise UserError(f"{option} needs one number or one per channel ({model.in_chans}), not {len(values)}")
    if not all(deviation > 0 for deviation in data.std):
        raise UserError(f"--data.std must be above 0, not {data.std}")
    if not 0 < data.crop_ratio[0] <= data.crop_ratio[1]:
        raise UserError(f"--data.crop-ratio needs two ratios above 0, from small to large, not {data.crop_ratio}")
    if not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1:
        raise UserError(f"--data.crop-scale needs two shares of the area, from small to large, not {data.crop_scale}")
    if not config.name or any(c in config.name for c in "/\\") or config.name in (".", ".."):
        raise UserError(f"--name must be a plain folder name, not {config.name!r}")
    if model.checkpoint is not None:
        check_file(model.checkpoint, "--model.checkpoint")


def check_file(checkpoint: str, what: str = "checkpoint") -> None:
    """Find a missing file without having imported torch.

    Raises:
        UserError: it is not there.
    """
    if checkpoint.startswith(HUB):
        return
    if "://" in checkpoint:
        raise UserError(f"{what} {checkpoint} is an address: download the file and give its path, or {HUB}OWNER/NAME")
    if not checkpoint or not Path(checkpoint).exists():
        raise UserError(f"{what} {checkpoint or repr(checkpoint)} does not exist")


def check_model(model: ModelConfig, teacher: TeacherConfig) -> None:
    """Find settings that no network can be built from, or that would train only a part of it.

    Raises:
        UserError: the first that is found, with what to do.
    """
    _check_types(ModelConfig, model, "model.")
    _check_types(TeacherConfig, teacher, "teacher.")
    if not 0 <= model.migrate_ratio < 1:
        raise UserError(f"--model.migrate-ratio must be at least 0 and below 1, not {model.migrate_ratio}")
    if model.migrate_from is not None and model.migrate_from < 0:
        raise UserError(f"--model.migrate-from must be at least 0, not {model.migrate_from}")
    if model.gather_window < 0:
        raise UserError(f"--model.gather-window must be at least 0, not {model.gather_window}")
    if model.gather_side < 1 or model.gather_window % model.gather_side:
        raise UserError(
            f"--model.gather-side must divide --model.gather-window {model.gather_window}, not {model.gather_side}"
        )
    if model.migrate_from is not None and not model.migrate_ratio:
        raise UserError("--model.migrate-from has no effect without --model.migrate-ratio")
    if model.pyramid_head_width < 1 or model.pyramid_head_width % 64:
        raise UserError(f"--model.pyramid-head-width must be divisible by 64, not {model.pyramid_head_width}")
    features = any([model.feature_weight, model.auxiliary_weight, *model.pyramid_weights])
    if not features and not model.pixel_weight:
        raise UserError("nothing is predicted: set --model.pixel-weight, --model.feature-weight or another above 0")
    if not (model.pixel_weight or model.feature_weight or all(model.pyramid_weights)):
        raise UserError(
            "a part of the network would stay untrained: set --model.pixel-weight, --model.feature-weight or all three "
            "of --model.pyramid-weights above 0"
        )
    if features and teacher.name is None:
        raise UserError("a loss on features needs a teacher: give --teacher.name, `ema` or a model of timm")
    if teacher.name is not None and not features:
        raise UserError(
            f"teacher {teacher.name} has nothing to do: set --model.feature-weight or --model.pyramid-weights above 0"
        )
    if model.hidden_units == "dropped":
        if model.hidden_laterals:
            raise UserError("--model.hidden-laterals needs --model.hidden-units mask_token")
        if (model.pixel_weight or model.feature_weight) and not model.decoder_depth:
            raise UserError(
                "--model.decoder-depth 0 leaves dropped units without a view of the others; give it a block or more, "
                "or --model.hidden-units mask_token"
            )
        if any(model.pyramid_weights) and not model.pyramid_head_depth:
            raise UserError(
                "--model.pyramid-head-depth 0 leaves dropped units without a view of the others; give it a block or "
                "more, or --model.hidden-units mask_token"
            )
    elif model.hidden_laterals and model.pixel_weight:
        raise UserError("--model.hidden-laterals shows the pixels that --model.pixel-weight has predicted: use one")
    if teacher.checkpoint is not None:
        if teacher.name == "ema":
            raise UserError("--teacher.checkpoint has no meaning for the teacher `ema`, an average of the network")
        if not Path(teacher.checkpoint).is_file():
            raise UserError(f"--teacher.checkpoint {teacher.checkpoint} does not exist")
    if not 0 <= teacher.momentum <= teacher.momentum_end <= 1:
        raise UserError(
            f"--teacher.momentum {teacher.momentum} and --teacher.momentum-end {teacher.momentum_end} must lie between "
            "0 and 1, in this order"
        )
