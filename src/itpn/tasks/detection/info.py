"""What `itpn info` says of a detector's recipe."""

from itpn.checkpoints.files import Checkpoint
from itpn.models.detector import Detector
from itpn.tasks.describing import Rows, describe_headed
from itpn.tasks.detection.config import DetectionConfig
from itpn.tasks.detection.network import build_recipe


def describe(name: str, config: DetectionConfig, found: Checkpoint | None) -> Rows:
    model = build_recipe(config, None, found)[0]
    assert isinstance(model, Detector)
    step = model.transform.size_divisible  # as torchvision pads an image whose sides are 3:5
    height, width = (-(-side // step) * step for side in (model.transform.min_size[-1], model.transform.max_size))
    return describe_headed(model, model.num_classes - 1, (height, width))
