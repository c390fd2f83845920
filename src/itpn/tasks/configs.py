"""Every setting, for recipe files: the config classes of all tasks and what they are made of."""

from itpn.tasks.classification.config import (
    ClassificationConfig,
    ClassificationDataConfig,
    ClassificationEvaluationConfig,
    ClassificationModelConfig,
)
from itpn.tasks.detection.config import (
    DetectionConfig,
    DetectionDataConfig,
    DetectionEvaluationConfig,
    DetectionModelConfig,
)
from itpn.tasks.finetuning.config import FineTuningConfig, NetworkConfig
from itpn.tasks.pretraining.config import (
    PretrainingConfig,
    PretrainingDataConfig,
    PretrainingModelConfig,
    ProbeConfig,
    TeacherConfig,
)
from itpn.tasks.segmentation.config import (
    SegmentationConfig,
    SegmentationDataConfig,
    SegmentationEvaluationConfig,
    SegmentationModelConfig,
)
from itpn.training.config import CropsConfig, ImagesConfig, OptimizerConfig, RunConfig, Settings, TrainerConfig

__all__ = [
    "ClassificationConfig",
    "ClassificationDataConfig",
    "ClassificationEvaluationConfig",
    "ClassificationModelConfig",
    "CropsConfig",
    "DetectionConfig",
    "DetectionDataConfig",
    "DetectionEvaluationConfig",
    "DetectionModelConfig",
    "FineTuningConfig",
    "ImagesConfig",
    "NetworkConfig",
    "OptimizerConfig",
    "PretrainingConfig",
    "PretrainingDataConfig",
    "PretrainingModelConfig",
    "ProbeConfig",
    "RunConfig",
    "SegmentationConfig",
    "SegmentationDataConfig",
    "SegmentationEvaluationConfig",
    "SegmentationModelConfig",
    "Settings",
    "TeacherConfig",
    "TrainerConfig",
]
