"""Classifiers as files: images to ``logits``."""

from collections.abc import Mapping
from pathlib import Path

from itpn.checkpoints.files import Checkpoint
from itpn.models.backbone import Backbone
from itpn.tasks.exporting import Exported, Size, export_model


def export(
    model: Backbone, found: Checkpoint, out: Path, size: Size | None, dynamic_size: bool, metadata: Mapping[str, str]
) -> Exported:
    return export_model(model, out, size or model.image_shape[1:], dynamic_size, metadata)
