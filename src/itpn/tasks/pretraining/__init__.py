"""Masked image modelling: backbone and pyramid learn to predict what is masked (Tian et al. 2023, section 3)."""

from itpn.tasks.pretraining.config import PretrainingConfig
from itpn.tasks.pretraining.early import find_images
from itpn.tasks.spec import TaskSpec, lazy

HERE = "itpn.tasks.pretraining"

TASK = TaskSpec(
    name="pretraining",
    config=PretrainingConfig,
    head=lazy(f"{HERE}.network:MaskedHead"),
    check_data=find_images,
    find_data=lazy(f"{HERE}.data:find_data"),
    resolve=lazy(f"{HERE}.build:resolve"),
    build_model=lazy(f"{HERE}.build:build_model"),
    build_recipe=lazy(f"{HERE}.network:build_recipe"),
    build_module=lazy(f"{HERE}.build:build_module"),
    build_visualization=lazy(f"{HERE}.visualization:build_visualization"),
    build_evaluator=lazy(f"{HERE}.build:build_evaluator"),
    evaluation_prefix="probe_",
    describe_data=lazy(f"{HERE}.build:describe_data"),
    describe=lazy(f"{HERE}.info:describe"),
    predict=lazy(f"{HERE}.prediction:predict"),
    cache_features=lazy(f"{HERE}.caching:cache_features"),
)
