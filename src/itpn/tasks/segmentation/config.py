"""Settings of a segmenter's run."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from itpn.errors import UserError
from itpn.system.checks import BatchSize, Factor, Fraction, NonNegativeFloat, PositiveFraction, Side, Width
from itpn.tasks.finetuning.config import (
    FineTuningConfig,
    LabelledDataConfig,
    NetworkConfig,
    check_fine_tuning,
)
from itpn.training.config import EvaluationConfig, ImagesConfig, RunConfig


@dataclass
class SegmentationModelConfig(NetworkConfig):
    """The network: UPerNet on the pre-trained pyramid."""

    neck: Literal["pyramid", "random"] = "pyramid"
    """The pre-trained pyramid, or the same pyramid randomly initialized, to compare with."""
    head_width: Width | None = None
    """Channels of the head; None for as many as its coarsest map has (768 for base, 1024 for large)."""
    auxiliary_weight: NonNegativeFloat = 0.4
    """Weight of the loss of the auxiliary head; 0 leaves it out."""
    head_drop_rate: Fraction = 0.1
    """Dropout of channels before pixels are classified."""


@dataclass
class SegmentationDataConfig(LabelledDataConfig, ImagesConfig):
    """Images with a class for each pixel."""

    root: str = "data/ade20k"
    """A folder of ADE20K's layout (`images` and `annotations`, each with `training` and `validation`), of `images` and
    `masks` alone, a folder for each set with these inside; or, with --data.masks, a folder of images."""
    masks: str | None = None
    """The folder of the masks, of the same names as the images, or with _mask or the like after them."""
    val_root: str | None = None
    """Where the images to evaluate on are, if they are not below --data.root."""
    val_masks: str | None = None
    """Where the masks of --data.val-root are, if they are not below it."""
    classes: str | None = None
    """A file with the name of a class a line, the first for label 0 (1 with --data.reduce-zero-label), or `NAME R G B`
    where masks are in colours; None for classes.txt beside the images, or for numbers."""
    reduce_zero_label: bool = False
    """Label 0 is of no class, and the first class is 1, as in ADE20K."""
    ignore: tuple[int, ...] = (255,)
    """Labels that are of no class: neither trained nor counted."""
    val_fraction: Fraction = 0.0
    """Fraction of the images that is held out where there are none to evaluate on."""
    invalid_annotations: Literal["summary", "skip", "error"] = "summary"
    """Images with invalid masks are left out, with a summary of every kind or a line that counts them; or they are an
    error."""
    img_size: Side = 512
    """Side of the crops in training, and of the windows that slide in evaluation, in pixels."""
    short_side: Side | None = None
    """Short side of an image of scale 1, in training and evaluation; None for --data.img-size."""
    scales: tuple[Factor, Factor] = (0.5, 2.0)
    """Smallest and largest scale in training."""
    max_class_fraction: Fraction = 0.75
    """Largest fraction of a crop that is of one class; a crop is drawn ten times at most to find one."""
    photometric: bool = True
    """Change brightness, contrast, saturation and hue."""

    @property
    def short(self) -> int:
        """Short side of an image of scale 1 in pixels."""
        return self.img_size if self.short_side is None else self.short_side


@dataclass
class SegmentationEvaluationConfig(EvaluationConfig):
    """Evaluation, of a network in training and of a checkpoint."""

    batch_size: BatchSize = 1
    """Images that a process reads at a time; each is segmented by itself."""
    mode: Literal["whole", "slide"] = "slide"
    """The image as a whole, or windows of --data.img-size that slide over it."""
    stride: PositiveFraction = 2 / 3
    """Stride of the windows as a fraction of their side: 341 of 512 px."""
    scales: tuple[Factor, ...] = (1.0,)
    """Scales whose probabilities are averaged."""
    flip: bool = False
    """Average over the mirror image as well."""


@dataclass
class SegmentationConfig(RunConfig):
    """Settings of a segmenter's run."""

    task: ClassVar[str] = "segmentation"
    model: SegmentationModelConfig = field(default_factory=SegmentationModelConfig)
    data: SegmentationDataConfig = field(default_factory=SegmentationDataConfig)
    optimizer: FineTuningConfig = field(default_factory=FineTuningConfig)
    evaluation: SegmentationEvaluationConfig = field(default_factory=SegmentationEvaluationConfig)

    def check(self) -> None:
        super().check()
        data, evaluation = self.data, self.evaluation
        if not 0 < data.scales[0] <= data.scales[1]:
            raise UserError(f"--data.scales needs two factors above 0, from small to large, not {data.scales}")
        if not evaluation.scales:
            raise UserError("--evaluation.scales needs a scale or more")
        if (data.val_masks is not None) and data.val_root is None:
            raise UserError("--data.val-masks needs --data.val-root, the folder of their images")
        check_fine_tuning(self)
