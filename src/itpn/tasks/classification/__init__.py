"""Classes of images: fine-tuning, training from scratch, or a linear classifier on frozen features."""

from itpn.tasks.classification.config import ClassificationConfig
from itpn.tasks.spec import TaskSpec, lazy

HERE = "itpn.tasks.classification"

TASK = TaskSpec(
    name="classification",
    config=ClassificationConfig,
    head=lazy(f"{HERE}.network:ClassifierHead"),
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
        *("--data.root", "--data.members", "--data.val-root", "--data.val-fraction", "--data.label-fraction"),
        *("--data.test-size", "--data.crop-pct", "--data.interpolation", "--data.mean", "--data.std"),
    ),
    resolve_evaluation=lazy(f"{HERE}.evaluation:resolve_evaluation"),
    find_evaluation_data=lazy(f"{HERE}.evaluation:find_evaluation_data"),
    predict=lazy(f"{HERE}.prediction:predict"),
    export=lazy(f"{HERE}.export:export"),
    knn=True,
    train=lazy(f"{HERE}.linear_probe:train"),
)
