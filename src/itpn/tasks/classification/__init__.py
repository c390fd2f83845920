"""Classes of images: fine-tuning, training from scratch, or a linear classifier on frozen features."""

from itpn.tasks.classification.config import ClassificationConfig
from itpn.tasks.spec import TaskSpec, lazy, parts_in

TASK = TaskSpec(
    **parts_in(__name__),
    name="classification",
    config=ClassificationConfig,
    head=lazy(f"{__name__}.network:ClassifierHead"),
    describe=lazy(f"{__name__}.network:describe"),
    evaluation_options=(
        *("--data.root", "--data.members", "--data.val-root", "--data.val-fraction", "--data.label-fraction"),
        *("--data.test-size", "--data.crop-pct", "--data.interpolation", "--data.mean", "--data.std"),
    ),
    evaluation_hints={
        "--data.img-size": "images are evaluated at the checkpoint's size: give --data.test-size for another"
    },
    resolve_evaluation=lazy(f"{__name__}.evaluation:resolve_evaluation"),
    find_evaluation_data=lazy(f"{__name__}.evaluation:find_evaluation_data"),
    export=lazy("itpn.tasks.export:export"),
    knn=True,
    train=lazy(f"{__name__}.linear_probe:train"),
)
