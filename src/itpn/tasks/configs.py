"""Every setting, for recipe files: the config classes of all tasks and what they are made of."""

# ruff: noqa: F401  # imported for others

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
from itpn.tasks.finetuning.config import FineTuningConfig, LabelledDataConfig, NetworkConfig
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
from itpn.training.config import (
    CropsConfig,
    EvaluationConfig,
    ImagesConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    Settings,
    TrainerConfig,
)
