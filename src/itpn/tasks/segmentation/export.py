"""Segmenters as files: images to ``logits``."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from itpn.checkpoints.files import Checkpoint
from itpn.errors import UserError
from itpn.models.backbone import find_backbone
from itpn.models.segmenter import Segmenter
from itpn.tasks.export import Exported, Size, export_model


def export(
    model: Segmenter,
    checkpoint: Checkpoint,
    out: Path,
    size: Size | None,
    dynamic_size: bool,
    metadata: Mapping[str, str],
) -> Exported:
    """Write a segmenter for images of one size, by default that of the crops that it was trained on."""
    if dynamic_size:
        raise UserError("a segmenter is exported for images of one size, whose maps it pools: leave out --dynamic-size")
    height, width = size or checkpoint.preprocessing.get("size", find_backbone(model).image_shape[1:])
    return export_model(model, out, (height, width), metadata=metadata, outputs=name_logits)


def name_logits(model: Segmenter, images: Tensor) -> dict[str, Tensor]:
    return {"logits": model(images)["out"]}
