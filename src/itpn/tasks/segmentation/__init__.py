"""Classes of pixels: UPerNet on the pre-trained pyramid (Tian et al. 2023, section 4.2)."""

from itpn.tasks.segmentation.config import SegmentationConfig
from itpn.tasks.spec import TaskSpec, lazy

HERE = "itpn.tasks.segmentation"

TASK = TaskSpec(
    name="segmentation",
    config=SegmentationConfig,
    head=lazy(f"{HERE}.network:SegmenterHead"),
    find_data=lazy(f"{HERE}.data:find_data"),
    resolve=lazy(f"{HERE}.build:resolve"),
    build_model=lazy(f"{HERE}.build:build_model"),
    build_recipe=lazy(f"{HERE}.network:build_recipe"),
    build_module=lazy(f"{HERE}.build:build_module"),
    build_visualization=lazy(f"{HERE}.visualization:build_visualization"),
    build_evaluator=lazy(f"{HERE}.build:build_evaluator"),
    describe_data=lazy(f"{HERE}.build:describe_data"),
    describe=lazy(f"{HERE}.info:describe"),
    evaluation_options=(
        *("--data.root", "--data.masks", "--data.val-root", "--data.val-masks", "--data.classes"),
        *("--data.reduce-zero-label", "--data.no-reduce-zero-label", "--data.ignore", "--data.invalid-annotations"),
        *("--data.img-size", "--data.short-side", "--data.interpolation", "--data.mean", "--data.std"),
    ),
    resolve_evaluation=lazy(f"{HERE}.evaluation:resolve_evaluation"),
    find_evaluation_data=lazy(f"{HERE}.evaluation:find_evaluation_data"),
    predict=lazy(f"{HERE}.prediction:predict"),
    export=lazy(f"{HERE}.export:export"),
)
