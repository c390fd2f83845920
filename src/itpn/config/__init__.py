"""What a run is: typed settings that a recipe fills in and every command line option overrides.

Light on purpose: nothing here imports torch, so that a mistake in an option is answered at once.
"""

from itpn.config.classification import (
    ClassificationConfig,
    ClassifierConfig,
    EvaluationConfig,
    LabelledDataConfig,
)
from itpn.config.detection import DetectionConfig, DetectionEvaluationConfig, DetectorConfig, ObjectsConfig
from itpn.config.files import CONFIGS, FineTuningRun, RunConfig, from_dict, read_yaml, write_yaml
from itpn.config.finetuning import FineTuningConfig, NetworkConfig
from itpn.config.pretraining import (
    Config,
    DataConfig,
    ModelConfig,
    ProbeConfig,
    TeacherConfig,
    check_model,
    override_model,
)
from itpn.config.segmentation import (
    MasksConfig,
    SegmentationConfig,
    SegmentationEvaluationConfig,
    SegmenterConfig,
)
from itpn.config.training import (
    HUB,
    CropsConfig,
    ImagesConfig,
    OptimizerConfig,
    TrainerConfig,
    check_file,
    check_type,
    image_size,
    option_types,
    to_dict,
)

__all__ = [
    "CONFIGS",
    "HUB",
    "ClassificationConfig",
    "ClassifierConfig",
    "Config",
    "CropsConfig",
    "DataConfig",
    "DetectionConfig",
    "DetectionEvaluationConfig",
    "DetectorConfig",
    "EvaluationConfig",
    "FineTuningConfig",
    "FineTuningRun",
    "ImagesConfig",
    "LabelledDataConfig",
    "MasksConfig",
    "ModelConfig",
    "NetworkConfig",
    "ObjectsConfig",
    "OptimizerConfig",
    "ProbeConfig",
    "RunConfig",
    "SegmentationConfig",
    "SegmentationEvaluationConfig",
    "SegmenterConfig",
    "TeacherConfig",
    "TrainerConfig",
    "check_file",
    "check_model",
    "check_type",
    "from_dict",
    "image_size",
    "option_types",
    "override_model",
    "read_yaml",
    "to_dict",
    "write_yaml",
]
