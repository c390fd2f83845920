"""Settings of a detector's run."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from itpn.errors import UserError
from itpn.system.checks import Factor, Fraction, Range, Side, Width
from itpn.tasks.finetuning.config import (
    FineTuningConfig,
    LabelledDataConfig,
    NetworkConfig,
    check_fine_tuning,
)
from itpn.training.config import EvaluationConfig, ImagesConfig, RunConfig

Proposals = Annotated[int, Range(1, 10**6)]  # for an image
Detections = Annotated[int, Range(1, 10**5)]  # in an image


@dataclass
class DetectionModelConfig(NetworkConfig):
    """The network: torchvision's Mask R-CNN on the pre-trained pyramid."""

    neck: Literal["pyramid", "random", "fpn"] = "pyramid"
    """The pre-trained pyramid; the same pyramid randomly initialized, to compare with; or a randomly initialized FPN,
    for backbones without a pyramid."""
    masks: bool | None = None
    """Predict masks (Mask R-CNN) or boxes alone (Faster R-CNN); None for masks where most objects have one."""
    head_width: Width = 256
    """Channels of the heads."""
    rpn_post_nms_top_n_train: Proposals = 2000
    """Proposals of the RPN for an image in training; half as many in evaluation."""
    box_batch_size_per_image: Proposals = 512
    """Proposals of an image that the heads are trained on."""


@dataclass
class DetectionDataConfig(LabelledDataConfig, ImagesConfig):
    """Images with boxes, classes and masks of objects."""

    root: str = "data/coco"
    """A folder of COCO's layout (`train2017`, `val2017`, `annotations/instances_*.json`, or a folder for each set with
    its JSON inside), of YOLO's (`data.yaml`), of Pascal VOC's (`JPEGImages`, `Annotations`, `ImageSets/Main`), or of
    label images (`images` and `masks`, where each object has a number of its own); or a JSON file of COCO's form."""
    val_root: str | None = None
    """Where the images to evaluate on are, if they are not below --data.root: a folder or a JSON file likewise."""
    invalid_annotations: Literal["summary", "skip", "error"] = "summary"
    """Invalid annotations are left out, with a summary of every kind or a line that counts them; or they are an
    error."""
    empty_images: bool = False
    """Train on images without objects as well; COCO's are left out as is usual."""
    window_min_visible: Fraction = 0.3
    """Fraction of an object that must be visible in a window of --data.window-size, of the area of its mask, or else of
    its box; it is left out of the window otherwise."""
    img_size: Side = 800
    """Short side of the images in evaluation, and the largest in training, in pixels."""
    max_size: Side | None = None
    """Longest side; None for 5/3 of --data.img-size (1333 of 800)."""
    scales: tuple[Factor, Factor] = (0.6, 1.0)
    """Short sides in training, as fractions of --data.img-size, of which there are eleven (480, 512, ... 800)."""
    crop_prob: Fraction = 0.5
    """Fraction of the training images that are cropped before: resized to 1/2, 5/8 or 3/4 of --data.img-size, of which
    a crop with sides of 0.48 to 0.75 is taken (384 to 600 px of 800)."""
    large_scale_jitter: tuple[Factor, Factor] | None = None
    """Instead of scales and crops, resize by a factor between these of a square of --data.img-size, and crop to it
    (Ghiasi et al. 2021: 0.1 2.0, of 1024 px)."""

    @property
    def longest(self) -> int:
        """Longest side of the images in pixels."""
        return self.img_size * 5 // 3 if self.max_size is None else self.max_size


@dataclass
class DetectionEvaluationConfig(EvaluationConfig):
    """Evaluation of a detector."""

    max_detections: Detections | None = None
    """Objects that the network finds in an image at most, which AP counts. None for what the checkpoint has; in
    training for 100, or the most objects of a training image where that is more."""


@dataclass
class DetectionConfig(RunConfig):
    """Settings of a detector's run."""

    task: ClassVar[str] = "detection"
    from_images: ClassVar[Mapping[str, Collection[str]]] = {
        **RunConfig.from_images,
        "evaluation": ("max_detections",),
    }
    model: DetectionModelConfig = field(default_factory=DetectionModelConfig)
    data: DetectionDataConfig = field(default_factory=DetectionDataConfig)
    optimizer: FineTuningConfig = field(default_factory=FineTuningConfig)
    evaluation: DetectionEvaluationConfig = field(default_factory=DetectionEvaluationConfig)

    def check(self) -> None:
        super().check()
        data = self.data
        if data.longest < data.img_size:
            raise UserError(f"--data.max-size must be at least --data.img-size {data.img_size}, not {data.max_size}")
        for option, factors in {"scales": data.scales, "large-scale-jitter": data.large_scale_jitter}.items():
            if factors is not None and not 0 < factors[0] <= factors[1]:
                raise UserError(f"--data.{option} needs two factors above 0, from small to large, not {factors}")
        check_fine_tuning(self)
