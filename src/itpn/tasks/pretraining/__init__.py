"""Masked image modelling: backbone and pyramid learn to predict what is masked (Tian et al. 2023, section 3)."""

from itpn.data.files import ImageSource, find_training_images
from itpn.tasks.pretraining.config import PretrainingConfig
from itpn.tasks.spec import TaskSpec, lazy, parts_in


def check_data(config: PretrainingConfig) -> ImageSource:
    """The images of a run.

    Raises:
        UserError: a folder is missing or without images.
    """
    return find_training_images(config.data.root, config.data.members, config.data.bands)


TASK = TaskSpec(
    **parts_in(__name__),
    name="pretraining",
    config=PretrainingConfig,
    head=lazy(f"{__name__}.head:MaskedHead"),
    describe=lazy(f"{__name__}.info:describe"),
    check_data=check_data,
    evaluation_prefix="probe_",
    prediction_options=("seed",),
    cache_features=lazy(f"{__name__}.caching:cache_features"),
)
