"""What `itpn info` says of a segmenter's recipe."""

from itpn.checkpoints.files import Checkpoint
from itpn.models.segmenter import Segmenter
from itpn.tasks.describing import Rows, describe_headed
from itpn.tasks.segmentation.config import SegmentationConfig
from itpn.tasks.segmentation.network import build_recipe


def describe(name: str, config: SegmentationConfig, found: Checkpoint | None) -> Rows:
    model = build_recipe(config, None, found)[0]
    assert isinstance(model, Segmenter)
    step = model.backbone.backbone.patch_size
    side = -(-config.data.img_size // step) * step
    return describe_headed(model, model.num_classes, (side, side))
