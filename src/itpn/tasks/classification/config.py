"""Settings of a classifier's run: fine-tuning, training from scratch, or a probe of frozen features."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from itpn.errors import UserError
from itpn.system.checks import BatchSize, Fraction, PositiveFraction, PositiveInt, Range, Side
from itpn.tasks.finetuning.config import (
    FineTuningConfig,
    LabelledDataConfig,
    NetworkConfig,
    check_fine_tuning,
)
from itpn.training.config import (
    CropsConfig,
    EvaluationConfig,
    RunConfig,
    check_crops,
    check_size,
    image_size,
)


@dataclass
class ClassificationModelConfig(NetworkConfig):
    """The network."""

    freeze: bool = False
    """Train a linear classifier on features that stay as they are, computed once, and nothing else."""
    drop_rate: Fraction = 0.0
    """Dropout before the classifier."""
    migrate_ratio: float | None = None
    """Fraction of the tokens that skip the last blocks of stage 3 (token migration): faster, for a little accuracy.
    None for the checkpoint's, or none."""
    gather_window: Annotated[int, Range(0, 1024)] | None = None
    """Side of the windows that attention stays in, in tokens, with a gathering token each; 0 for global attention, None
    for the checkpoint's, or global."""
    ema_decay: Fraction | None = None
    """Decay of an EMA of the weights; the EMA is evaluated as well, and written if it is better. None for no EMA."""


@dataclass
class ClassificationDataConfig(LabelledDataConfig, CropsConfig):
    """Images with classes."""

    root: tuple[str, ...] = ("data/imagenet",)
    """A folder with `train` and `val` of a folder for each class, or of tar shards with .cls, or of parquet files; or
    one of class folders alone."""
    val_root: tuple[str, ...] | None = None
    """The images to evaluate on, if they are not beside those of --data.root."""
    members: tuple[str, ...] = ()
    """Tar shards: endings of the images to read, as `jpg` or `rgb.png`, or `all`; by default the plain one of each
    sample (`x.jpg`), not what describes it (`x.seg.png`)."""
    val_fraction: Fraction = 0.1
    """Where there is no val set: fraction of the images of each class that is held out as one."""
    img_size: Side | tuple[Side, Side] | None = None
    """Pixels of a side, or height and width; None for the checkpoint's, or 224."""
    test_size: Side | tuple[Side, Side] | None = None
    """Pixels of the images that are evaluated; None for --data.img-size."""
    crop_pct: PositiveFraction | None = None
    """Evaluation: the centre crop's side as a fraction of the resized image's, as timm does it; None for the
    checkpoint's, or 0.875."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's name of an automatic augmentation; this one is RandAugment of magnitude 9 with std 0.5."""
    erase: Fraction = 0.25
    """Probability that a rectangle of an image is replaced by noise."""
    mixup: Annotated[float, Range(0, 1000)] = 0.8
    """Parameter of the beta distribution that two images are mixed by; 0 for no mixup."""
    cutmix: Annotated[float, Range(0, 1000)] = 1.0
    """The same for pasting a rectangle of one image into another; with mixup, each batch draws one of the two."""
    label_smoothing: Fraction = 0.1
    """Label smoothing."""


@dataclass
class ClassificationEvaluationConfig(EvaluationConfig):
    """Evaluation, of a network in training and of a checkpoint."""

    batch_size: BatchSize = 256
    """Images per process and forward pass."""
    knn_k: PositiveInt = 20
    """`itpn evaluate --knn`: k, the number of nearest neighbours."""


@dataclass
class ClassificationConfig(RunConfig):
    """Settings of a classifier's run."""

    task: ClassVar[str] = "classification"
    free: ClassVar[Mapping[str, frozenset[str]]] = {
        **RunConfig.free,
        "evaluation": RunConfig.free["evaluation"] | {"knn_k"},
    }
    model: ClassificationModelConfig = field(default_factory=ClassificationModelConfig)
    data: ClassificationDataConfig = field(default_factory=ClassificationDataConfig)
    optimizer: FineTuningConfig = field(default_factory=FineTuningConfig)
    evaluation: ClassificationEvaluationConfig = field(default_factory=ClassificationEvaluationConfig)

    def check(self) -> None:
        super().check()
        model, data = self.model, self.data
        if data.window_size is not None:
            raise UserError("--data.window-size is not for classifiers, as a class is of a whole image: leave it out")
        check_crops(data)
        if data.val_fraction == 1:
            raise UserError("--data.val-fraction must be below 1: nothing would be left to train on")
        if data.color_jitter and data.auto_augment is not None:
            raise UserError(
                "--data.color-jitter has no effect beside --data.auto-augment, which changes colours itself: give "
                "--data.auto-augment None, or --data.color-jitter 0"
            )
        if (data.mixup or data.cutmix) and data.batch_size % 2:
            raise UserError(
                f"--data.batch-size must be even to mix images in pairs, not {data.batch_size}; or give --data.mixup 0 "
                "--data.cutmix 0"
            )
        if model.migrate_ratio is not None and not 0 <= model.migrate_ratio < 1:
            raise UserError(f"--model.migrate-ratio must be at least 0 and below 1, not {model.migrate_ratio}")
        if model.freeze and self.patience is not None:
            raise UserError("--evaluation.patience is not for --model.freeze, which does not evaluate meanwhile")
        check_fine_tuning(self)

    def check_sizes(self) -> None:
        """What :meth:`check` can only see once the checkpoint's patches and size are known."""
        patch = self.model.patch_size
        assert patch is not None
        check_size(image_size(self.data), patch)
        if self.data.test_size is not None:
            size = self.data.test_size
            check_size(size if isinstance(size, tuple) else (size, size), patch, "--data.test-size")
