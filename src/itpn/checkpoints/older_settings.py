"""Settings in files of older versions, under today's names."""

from collections.abc import Mapping
from typing import Any

# by section, what settings were called before
NAMES = {
    "model": {
        "hidden_units": "masked_patches",
        "hidden_laterals": "masked_laterals",
        "feature_units": "feature_patches",
        "normalize_target": "norm_pix_loss",
        "decoder_width": "decoder_embed_dim",
        "decoder_heads": "decoder_num_heads",
        "proposals": "rpn_post_nms_top_n_train",
        "samples": "box_batch_size_per_image",
    },
    "data": {
        "max_broken": "max_corrupt",
        "mistakes": "invalid_annotations",
        "val_share": "val_fraction",
        "label_share": "label_fraction",
        "max_class_share": "max_class_fraction",
    },
    "evaluation": {"neighbours": "knn_k"},
    "trainer": {"picture_every_n_steps": "visualize_every_n_steps"},
}
VALUES = {("feature_patches", "hidden"): "masked", ("neck", "fresh"): "random"}


def update_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run by section, under today's names; those of today's version are returned as they are."""
    return {
        section: _update(values, NAMES.get(section, {})) if isinstance(values, Mapping) else values
        for section, values in settings.items()
    }


def _update(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    renamed = {names.get(name, name): value for name, value in values.items()}
    # what else a corrupt file may hold in the place of a value cannot be looked up
    return {n: VALUES.get((n, value), value) if isinstance(value, str) else value for n, value in renamed.items()}
