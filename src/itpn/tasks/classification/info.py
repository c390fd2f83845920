"""What `itpn info` says of a classifier's recipe."""

from itpn.checkpoints.files import Checkpoint
from itpn.models.backbone import find_backbone
from itpn.tasks.classification.config import ClassificationConfig
from itpn.tasks.classification.network import build_recipe
from itpn.tasks.describing import Rows, count_parameters, describe_backbone, describe_stages


def describe(name: str, config: ClassificationConfig, found: Checkpoint | None) -> Rows:
    backbone = find_backbone(build_recipe(config, None, found)[0])
    size = (backbone.image_shape[1], backbone.image_shape[2])
    return [
        ("parameters", f"{count_parameters(backbone):.2f} M with a classifier of {backbone.num_classes} classes"),
        *describe_backbone(backbone, size),
        ("", ""),
        *describe_stages(backbone, size),
    ]
