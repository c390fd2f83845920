"""Settings that all runs have, as dataclasses, dicts and YAML files, and the checks of settings of any kind.

Nothing here imports torch, so that a mistake in an option is answered at once.
"""

import contextlib
import dataclasses
import difflib
import os
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from tyro.conf import Suppress

from itpn.checkpoints.older_settings import NAMES, update_settings
from itpn.checkpoints.paths import check_file
from itpn.data.bands import check_bands
from itpn.data.image_type import DTYPES, PHOTO, check_value_range
from itpn.errors import UserError
from itpn.system.checks import (
    BatchSize,
    Channel,
    ChannelMap,
    Channels,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    NumDevices,
    NumWorkers,
    PatchSize,
    PositiveFraction,
    PositiveInt,
    Range,
    check_range,
    check_type,
)
from itpn.system.writing import write_whole
from itpn.system.yaml_files import load_yaml


class Settings:
    """Base of all settings: they can be changed until :func:`freeze`."""

    _frozen = False

    def __setattr__(self, name: str, value: Any) -> None:
        if self._frozen:
            raise dataclasses.FrozenInstanceError(f"{name} cannot be changed: settings are resolved once")
        known = list(self.__dataclass_fields__)  # type: ignore[attr-defined]
        if name not in known:  # a recipe file may assign anything
            near = [names[name] for names in NAMES.values() if names.get(name) in known]
            near = near or difflib.get_close_matches(name, known, n=1)
            raise AttributeError(f"there is no setting {name}" + (f"; did you mean {near[0]}?" if near else ""))
        super().__setattr__(name, tuple(value) if isinstance(value, list) else value)  # as in YAML


Mean = Annotated[float, Range(-1e6, 1e6)]  # of pixels in [0, 1], and far beyond
Std = Annotated[float, Range(1e-6, 1e6)]
AspectRatio = Annotated[float, Range(0.001, 1000)]
NumNodes = Annotated[int, Range(1, 100_000)]  # more than the largest clusters have
AnySettings = TypeVar("AnySettings", bound=Settings)
AnyConfig = TypeVar("AnyConfig", bound=Any)


def freeze(settings: AnySettings) -> AnySettings:
    """A copy that cannot be changed."""
    own = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    copy = type(settings)(**{name: freeze(v) if isinstance(v, Settings) else v for name, v in own.items()})
    object.__setattr__(copy, "_frozen", True)
    return copy


@dataclass
class ModelConfig(Settings):
    """The network, of whichever task: what commands and the loop ask for."""

    name: str | None = None
    """Backbone, one of the models of `itpn list`; None for that of --model.checkpoint."""
    checkpoint: str | None = None
    """Start from the weights of any file that `itpn inspect` knows, or of hf-hub:OWNER/NAME. What it lacks is randomly
    initialized, and named."""
    channel_map: ChannelMap | None = None
    """For each channel of the images the channel of --model.checkpoint, counted from 0, that the first layer and the
    prediction of pixels take over; `-` for none, whose weights begin at zero. None repeats the channels as timm
    does."""
    patch_size: PatchSize | None = None
    """Side of a patch in pixels, divisible by 4; None for the checkpoint's, or 16."""
    in_chans: Channels | None = None
    """Channels of the network's input; None for those of the images: 3 of photographs."""
    drop_path_rate: Fraction = 0.0
    """Stochastic depth of the last backbone block; it grows from 0 block by block."""
    grad_checkpointing: bool | Literal["selective"] = False
    """Recompute activations in the backward pass, for less memory: all of them, or with `selective` what is cheap,
    norms and activation functions of feed-forward layers, while results of matrix products are kept."""

    def of_checkpoint(self, path: str) -> "ModelConfig":
        """These settings with the network of a checkpoint."""
        return dataclasses.replace(self, checkpoint=path, channel_map=None)


@dataclass
class EvaluationConfig(Settings):
    """Evaluation, of a network in training and of a checkpoint."""

    every_n_epochs: PositiveInt = 1
    """Epochs between evaluations; there is one at the end as well."""
    patience: PositiveInt | None = None
    """Evaluations without a better validation metric (top-1 accuracy, box AP or mIoU) after which training stops; None
    trains to the end."""
    batch_size: BatchSize = 1
    """Images per process and forward pass."""


@dataclass
class ImagesConfig(Settings):
    """How images are read and augmented."""

    batch_size: BatchSize = 512
    """Images per process and forward pass."""
    num_workers: NumWorkers = 8
    """Processes that read images, for each training process; 0 reads in the training process."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How images are resized."""
    hflip: Fraction = 0.5
    """Probability of a horizontal flip."""
    rotate90: bool = False
    """Turn images by 0, 1, 2 or 3 quarters of a circle, for those that have no top: from above, or of a microscope."""
    channel_jitter: Fraction = 0.0
    """Largest relative change of brightness and contrast, drawn for each channel, of images of any channels."""
    channel_drop: Fraction = 0.0
    """Probability of each channel to be filled with its mean; one channel stays at least."""
    max_corrupt: Fraction = 0.05
    """Fraction of corrupt images above which the run stops."""
    max_pixels: PositiveInt = 2**27  # as itpn.data.decode.MAX_PIXELS
    """Images that declare more pixels than this are refused as decompression bombs."""
    window_size: PositiveInt | None = None
    """Side of windows in pixels, which large images are cut into: each counts as an image. None for whole images."""
    window_overlap: NonNegativeInt = 64
    """Pixels that neighbouring windows have in common at least."""
    bands: tuple[str, ...] = ()
    """Of images in one file a band, the ends of the files' names in the order of the channels, as `B02.tif B03.tif`:
    files of a folder whose names begin alike make an image."""
    axes: Literal["CHW", "HWC"] | None = None
    """Order of the axes of arrays (.npy, .npz, HDF5); None where the axis of channels is shorter than both others."""
    dtype: Suppress[str | None] = None  # no option: it is what the images are
    """Type of number of the stored pixels, as uint16, or `photo` for photographs of 8 bits; None for that of the first
    image. All images need the same."""
    value_range: tuple[str, ...] = ()
    """Values that become 0 and 1, beyond which pixels are clipped: `dtype` for all that the type can hold; LOW HIGH; or
    PLOW% PHIGH%, percentiles of each channel over the data set. By default `dtype` of 8 bits, 0.1% 99.9% of others."""
    show_channels: tuple[Channel, ...] | None = None
    """Channels that visualizations show as red, green and blue, counted from 0, or one that is shown in colours; None
    for the first three."""
    value_range_per_image: bool = False
    """Percentiles of --data.value-range are those of each image: for images whose values cannot be compared, as X-rays
    of several machines."""
    nodata: float | None = None
    """Value of pixels without data; None for what GeoTIFFs declare. NaN is always without data."""


@dataclass
class CropsConfig(ImagesConfig):
    """Random crops of one size."""

    crop_scale: tuple[PositiveFraction, PositiveFraction] = (0.2, 1.0)
    """Area of a random crop as a fraction of the image's."""
    crop_ratio: tuple[AspectRatio, AspectRatio] = (0.75, 1.3333333333333333)
    """Aspect ratio (width over height) of a random crop."""
    color_jitter: Fraction = 0.0
    """Largest relative change of brightness, contrast and saturation, of RGB photographs."""


@dataclass
class OptimizerConfig(Settings):
    """AdamW and its schedule: linear warm-up, then a cosine, a line or steps."""

    base_lr: NonNegativeFloat = 1.5e-4
    """Learning rate for a global batch of 256 images; the true one scales with the global batch."""
    lr: NonNegativeFloat | None = None
    """Peak learning rate as it is; overrides --optimizer.base-lr."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's beta 1 and beta 2."""
    weight_decay: NonNegativeFloat = 0.05
    """Decay of everything but norms, biases, position embeddings and mask tokens."""
    warmup_epochs: NonNegativeFloat = 40
    """Epochs of linear warm-up."""
    max_warmup: Fraction = 0.1
    """Largest fraction of the run that the warm-up may take, for short runs."""
    warmup_steps: NonNegativeInt | None = None
    """Steps of linear warm-up; overrides --optimizer.warmup-epochs."""
    warmup_start: NonNegativeFloat = 1e-4
    """Learning rate of the first step, as a fraction of the peak."""
    schedule: Literal["cosine", "linear", "step"] = "cosine"
    """After the warm-up: half a cosine or a line down to --optimizer.min-lr, or a tenth at each of
    --optimizer.milestones."""
    milestones: tuple[Fraction, ...] = (9 / 12, 11 / 12)
    """Fractions of the run after which the step schedule lowers the learning rate to a tenth."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the cosine or the line."""
    clip_grad: NonNegativeFloat | None = None
    """Largest norm of the gradient; None does not clip."""


@dataclass
class TrainerConfig(Settings):
    """How long, on what, and what is written meanwhile."""

    max_epochs: Annotated[int, Range(0, 10**9)] = 800
    """Passes over the images; 0 in fine-tuning to choose by the number of images."""
    max_steps: PositiveInt | None = None
    """Optimizer steps at which the run ends, if epochs do not end it before; the schedule follows."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU that has it, fp16 with loss scaling on one that has not, 32 bits on a CPU."""
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """What to train on."""
    devices: NumDevices | None = None
    """Devices of this machine; None for all GPUs (or one CPU process), or what torchrun or Slurm started."""
    num_nodes: NumNodes | None = None
    """Machines; None for what torchrun or Slurm started, else one."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """What several processes hold: ddp a copy of everything each, fsdp each a part of parameters, gradients and AdamW's
    moments (not for every task, and without visualizations)."""
    accumulate_grad_batches: BatchSize = 1
    """Forward passes per optimizer step; the global batch grows with it."""
    compile: bool | None = None
    """Compile the network, and the EMA of its weights, with torch.compile: a minute or more at the start, faster steps.
    None compiles on a GPU, where the task gains by it."""
    checkpoint_every_n_steps: PositiveInt = 500
    """Optimizer steps between checkpoints: what a crash loses at most."""
    keep_checkpoints: PositiveInt = 3
    """Newest checkpoints kept, beside the best."""
    log_every_n_steps: PositiveInt = 10
    """Optimizer steps between entries of metrics.csv and of --trainer.logger."""
    visualize_every_n_steps: PositiveInt | None = None
    """Optimizer steps between visualizations of predictions; None for ten in a run."""
    logger: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """What shows metrics and visualizations; wandb and mlflow get settings and final files too. Several may be given.
    wandb needs `pip install 'itpn[wandb]'`, mlflow `pip install 'itpn[mlflow]'`."""


@dataclass
class RunConfig(Settings):
    """Settings of a run, whatever is trained.

    Attributes:
        task: name of the task.
        visualizations: folder of a run that sample images go to.
        free: settings, by section, that may differ when a run resumes; any other would make it another run.
        from_images: settings, by section, that images or a checkpoint fill in where they are left open.
    """

    task: ClassVar[str]
    visualizations: ClassVar[str] = "predictions"
    free: ClassVar[Mapping[str, frozenset[str]]] = {
        "model": frozenset({"checkpoint", "channel_map", "grad_checkpointing"}),
        "data": frozenset({"num_workers", "max_corrupt", "show_channels"}),
        "evaluation": frozenset({"every_n_epochs", "batch_size", "patience"}),
        "trainer": frozenset(
            {
                *("max_epochs", "max_steps", "precision", "accelerator", "devices", "num_nodes", "compile"),
                *("checkpoint_every_n_steps", "keep_checkpoints", "log_every_n_steps", "visualize_every_n_steps"),
                "logger",
            }
        ),
    }

    from_images: ClassVar[Mapping[str, Collection[str]]] = {
        "model": ("in_chans",),
        "data": ("dtype", "value_range", "nodata", "mean", "std"),
    }

    model: ModelConfig
    data: Any
    optimizer: OptimizerConfig
    trainer: TrainerConfig = dataclasses.field(default_factory=TrainerConfig)
    seed: NonNegativeInt = 0
    """All randomness of the run follows from this."""
    name: str = "default"
    """Name of the run; the same name resumes it."""
    output_dir: str = "runs"
    """The run is written to OUTPUT_DIR/RECIPE/NAME."""

    def check(self) -> None:
        """Find impossible settings before anything heavy starts.

        Raises:
            UserError: the first that is found, with what to do.
        """
        check_types(self)
        if self.model.channel_map is not None and self.model.checkpoint is None:
            raise UserError("--model.channel-map says which channels of a checkpoint are kept: give --model.checkpoint")
        optimizer, name = self.optimizer, self.name
        if not all(0 <= beta < 1 for beta in optimizer.betas):
            raise UserError(f"--optimizer.betas must lie between 0 and 1, not {optimizer.betas}")
        milestones = optimizer.milestones
        if not all(0 < fraction < 1 for fraction in milestones) or list(milestones) != sorted({*milestones}):
            raise UserError(f"--optimizer.milestones must be rising fractions of the run, not {milestones}")
        if not self.output_dir:
            raise UserError("--output-dir is empty: give a folder, or leave it out")
        if not is_folder_name(name):
            raise UserError(f"--name must be a plain folder name, not {name!r}")

    @property
    def evaluation_interval(self) -> int:
        """Epochs between evaluations; 1 for settings without a section ``evaluation``."""
        own = getattr(self, "evaluation", None)
        return own.every_n_epochs if isinstance(own, EvaluationConfig) else 1

    @property
    def patience(self) -> int | None:
        """Evaluations without a better validation metric after which training stops; None for settings without such."""
        own = getattr(self, "evaluation", None)
        return own.patience if isinstance(own, EvaluationConfig) else None

    def sharding_problem(self) -> str | None:
        """Why the run cannot be sharded (`--trainer.strategy fsdp`); None where it can."""
        return f"is not for runs of {self.task}"


def check_start(config: RunConfig, recipe: str) -> None:
    """Find early that a logger is not installed, or that there is no file of start weights; a run that has begun needs
    no weights.

    Raises:
        UserError: so it is.
    """
    for name in {"wandb", "mlflow"} & {*config.trainer.logger}:
        found = find_spec(name)
        if found is None or found.origin is None:  # without an origin it is a mere folder of that name, as wandb makes
            raise UserError(f"--trainer.logger {name} needs the package {name}: pip install 'itpn[{name}]'")
    begun = os.path.isdir(Path(config.output_dir, recipe, config.name, "checkpoints"))
    if config.model.checkpoint is not None and not begun:
        check_file(config.model.checkpoint, "--model.checkpoint")


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict of JSON and YAML types."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def check_types(settings: Any, section: str = "") -> None:
    """A recipe file may assign anything; find what is not of its field's type, or outside of its range.

    Raises:
        UserError: the first that is found.
    """
    hints, ranges = (typing.get_type_hints(type(settings), include_extras=extras) for extras in (False, True))
    for field in dataclasses.fields(settings):
        value, path = getattr(settings, field.name, None), f"{section}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            if not isinstance(value, hints[field.name]):
                wanted, found = hints[field.name].__name__, type(value).__name__
                raise UserError(f"the section {path} must be of class {wanted}, not {found}")
            check_types(value, f"{path}.")
            continue
        check_type(value, hints[field.name], path)
        if any("\0" in text for text in (value if isinstance(value, tuple) else (value,)) if isinstance(text, str)):
            raise UserError(f"{path} holds a zero byte: {value!r}")
        check_range(value, ranges[field.name], f"--{path.replace('_', '-')}")


def image_size(config: Any) -> tuple[int, int]:
    """Height and width of the images that settings of data ask for."""
    return config.img_size if isinstance(config.img_size, tuple) else (config.img_size, config.img_size)


def describe_crops(size: tuple[int, int]) -> str:
    """Of height and width in pixels."""
    return f"crops of {size[0]}x{size[1]} px"


def check_crops(data: CropsConfig) -> None:
    """Raise :class:`UserError` for crops that cannot be."""
    if not 0 < data.crop_ratio[0] <= data.crop_ratio[1]:
        raise UserError(f"--data.crop-ratio needs two ratios above 0, from small to large, not {data.crop_ratio}")
    if not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1:
        raise UserError(
            f"--data.crop-scale needs two fractions of the area, from small to large, not {data.crop_scale}"
        )


def check_images(data: Any, in_chans: int | None) -> None:
    """Raise :class:`UserError` for numbers that do not normalize images.

    Args:
        data: settings with mean, std and those of :class:`ImagesConfig`.
    """
    if data.dtype == PHOTO and in_chans not in (None, 1, 3):
        raise UserError(f"--model.in-chans must be 1 (grey) or 3 (colour) of photographs, not {in_chans}")
    for option, values in {"--data.mean": data.mean, "--data.std": data.std}.items():
        if values is not None and not values:
            raise UserError(f"{option} needs one number or one per channel")
        if values and in_chans is not None and len(values) not in (1, in_chans):
            raise UserError(f"{option} needs one number or one per channel ({in_chans}), not {len(values)}")
    if not all(value > 0 for value in data.std or ()):
        raise UserError(f"--data.std must be above 0, not {data.std}")
    if data.dtype not in (None, PHOTO, *DTYPES):
        raise UserError(f"data.dtype must be {PHOTO} or one of {', '.join(DTYPES)}, not {data.dtype}")
    if data.show_channels is not None and len(data.show_channels) not in (1, 3):
        raise UserError(f"--data.show-channels needs one channel or three, not {len(data.show_channels)}")
    check_bands(data.bands)
    if data.window_size is not None and data.window_overlap >= data.window_size:
        raise UserError(
            f"--data.window-overlap must be below --data.window-size {data.window_size}, not {data.window_overlap}"
        )
    check_value_range(data.value_range)
    if data.value_range_per_image and data.value_range and not data.value_range[0].endswith("%"):
        raise UserError("--data.value-range-per-image needs percentiles as --data.value-range, or none")
    ranged = data.value_range not in ((), ("dtype",))
    given = {"value-range-per-image": data.value_range_per_image, "value-range": ranged}
    given["nodata"] = data.nodata is not None
    for name in [name for name in given if given[name] and data.dtype == PHOTO]:
        raise UserError(f"--data.{name} is not for photographs of 8 bits: leave it out")


def check_size(size: tuple[int, int], patch: int, option: str = "--data.img-size") -> None:
    """Raise :class:`UserError` for images that are not whole patches."""
    height, width = size
    if height < patch or width < patch or height % patch or width % patch:
        raise UserError(
            f"{option} {height}x{width} is not a multiple of --model.patch-size {patch}; "
            f"try {max(1, round(height / patch)) * patch}x{max(1, round(width / patch)) * patch}"
        )


def from_dict(settings: Mapping[str, Any], cls: Any) -> Any:
    """Undo :func:`to_dict`; settings that are not there keep their default, unknown ones are a :class:`UserError`."""

    def build(cls: Any, values: Mapping[str, Any], path: str) -> Any:
        types = typing.get_type_hints(cls)
        known = {field.name for field in dataclasses.fields(cls)}
        kwargs = {}
        for key, value in values.items():
            if key not in known:
                raise UserError(f"unknown setting {path}{key}")
            if dataclasses.is_dataclass(types[key]):
                if not isinstance(value, Mapping):
                    raise TypeError(f"the section {key} must hold settings, not {value!r}")
                value = build(types[key], value, f"{key}.")
            elif isinstance(value, str) and float in (types[key], *typing.get_args(types[key])):
                with contextlib.suppress(ValueError):  # it stays what it is, which check_types finds
                    value = float(value)  # YAML takes 1e-3 for text
            kwargs[key] = tuple(value) if isinstance(value, list) else value
        return cls(**kwargs)

    return build(cls, settings, "")


@dataclass(frozen=True)
class StoredSettings:
    """Settings of a run as they were written, whatever its task."""

    recipe: str
    task: str
    values: Mapping[str, Any]


def read_yaml(path: Path) -> StoredSettings:
    """A run's config.yaml.

    Raises:
        UserError: it is something else.
    """
    try:
        values = load_yaml(path)
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise not_settings(path, error) from error
    if not isinstance(values, dict):
        raise not_settings(path, "it is empty" if values is None else f"it holds a {type(values).__name__}")
    if "recipe" not in values:
        raise not_settings(path, "it names no recipe")
    return StoredSettings(values.pop("recipe"), values.pop("task", ""), update_settings(values))


def is_folder_name(name: str) -> bool:
    """Whether a name is that of a folder in its place, and not of one elsewhere."""
    return bool(name) and not set(name) & set("/\\\0") and name not in (".", "..")


def not_settings(path: Path, error: Exception | str) -> UserError:
    reason = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else error
    return UserError(f"{path} is not a run's config.yaml ({reason})")


def write_yaml(path: Path, recipe: str, config: RunConfig) -> None:
    """Write what repeats the run: `itpn train config.yaml`."""
    content = yaml.safe_dump({"recipe": recipe, "task": config.task, **to_dict(config)}, sort_keys=False)
    write_whole(path, content.encode())


def override_model(config: AnyConfig, overrides: dict[str, Any]) -> AnyConfig:
    """Settings with some of the network's replaced by name, ``img_size`` among the names.

    Raises:
        UserError: an unknown name, or a value that the setting cannot have.
    """
    known = [f.name for f in dataclasses.fields(config.model)] + ["img_size"]
    for name in overrides:
        if name not in known:
            raise UserError(f"no model setting {name!r}; there are {', '.join(known)}")
    settings = dict(overrides)
    data = dataclasses.replace(config.data, img_size=settings.pop("img_size", config.data.img_size))
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, **settings), data=data)
    check_types(changed)
    return changed
