"""Boxes, classes and masks of objects: Mask R-CNN on the pre-trained pyramid (Tian et al. 2023, section 4.2)."""

from itpn.tasks.detection.config import DetectionConfig
from itpn.tasks.spec import TaskSpec, lazy, parts_in

TASK = TaskSpec(
    **parts_in(__name__),
    name="detection",
    config=DetectionConfig,
    head=lazy(f"{__name__}.network:DetectorHead"),
    describe=lazy(f"{__name__}.network:describe"),
    prediction_options=("min_score", "max_objects", "window_size", "window_overlap"),
    evaluation_options=(
        *("--data.root", "--data.val-root", "--data.invalid-annotations", "--data.img-size", "--data.max-size"),
        *("--data.window-size", "--data.window-overlap"),
    ),
    resolve_evaluation=lazy(f"{__name__}.evaluation:resolve_evaluation"),
    find_evaluation_data=lazy(f"{__name__}.evaluation:find_evaluation_data"),
    export=lazy(f"{__name__}.export:export"),
)
