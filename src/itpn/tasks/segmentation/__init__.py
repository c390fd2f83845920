"""Classes of pixels: UPerNet on the pre-trained pyramid (Tian et al. 2023, section 4.2)."""

from itpn.tasks.segmentation.config import SegmentationConfig
from itpn.tasks.spec import TaskSpec, lazy, parts_in

TASK = TaskSpec(
    **parts_in(__name__),
    name="segmentation",
    config=SegmentationConfig,
    head=lazy(f"{__name__}.network:SegmenterHead"),
    describe=lazy(f"{__name__}.network:describe"),
    prediction_options=("window_size", "window_overlap"),
    evaluation_options=(
        *("--data.root", "--data.masks", "--data.val-root", "--data.val-masks", "--data.classes"),
        *("--data.reduce-zero-label", "--data.no-reduce-zero-label", "--data.ignore", "--data.invalid-annotations"),
        *("--data.img-size", "--data.short-side", "--data.interpolation", "--data.mean", "--data.std"),
        *("--data.window-size", "--data.window-overlap"),
    ),
    resolve_evaluation=lazy(f"{__name__}.evaluation:resolve_evaluation"),
    find_evaluation_data=lazy(f"{__name__}.evaluation:find_evaluation_data"),
    export=lazy(f"{__name__}.export:export"),
)
