"""A run of any task, composed of what its :class:`TaskSpec` builds."""

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from itpn.checkpoints.files import Checkpoint, read_checkpoint
from itpn.errors import UserError
from itpn.seeding import derive_seed
from itpn.system.accidents import guard
from itpn.tasks.augmentation import replace_colours
from itpn.tasks.evaluation import Validation
from itpn.tasks.spec import TaskSpec, task_of
from itpn.training import profiling
from itpn.training.agreement import resolve_together
from itpn.training.config import RunConfig, freeze
from itpn.training.loop import fit
from itpn.training.run_folder import RunFolder
from itpn.training.state import Job


def train(
    config: RunConfig, recipe: str, found_early: Any = None, profile: bool = False, given: Collection[str] = ()
) -> Path:
    """Run, or resume, a run; see :func:`itpn.training.loop.fit`.

    Args:
        found_early: what the task's ``check_data`` returned, where it was called.
        profile: take a few steps instead; see :func:`itpn.training.profiling.profile`.
        given: names of settings of data that were given as options; the others are the recipe's.

    Raises:
        MachineError: an accident of the machine; the message says what is kept.
    """
    config.check()
    folder = RunFolder(config, recipe)
    spec = task_of(config)

    def kept() -> str:
        return f"the same command resumes from {folder.last}" if os.path.exists(folder.last) else ""

    with guard(f"run folder {folder.path}", kept):
        if spec.train is not None:
            return Path(spec.train(config, recipe, profile, given))
        return train_composed(spec, config, recipe, found_early, profile, given)


def train_composed(
    spec: TaskSpec,
    config: RunConfig,
    recipe: str,
    found_early: Any = None,
    profile: bool = False,
    given: Collection[str] = (),
) -> Path:
    """As :func:`train`, from the parts that the task builds."""
    folder = RunFolder(config, recipe)
    # nothing here holds the checkpoint: while it is mapped, its room is not free once it is removed
    job, notes = compose(spec, config, folder, found_early, profile, given)
    return profiling.profile(job) if profile else fit(job, folder, notes)


def compose(
    spec: TaskSpec, config: RunConfig, folder: RunFolder, found_early: Any, profile: bool, given: Collection[str] = ()
) -> tuple[Job, list[str]]:
    """What is trained, and what is remarkable about it, a sentence each."""
    begun = folder.begun and not profile
    if begun:
        config = folder.restore(config)
    start: Any = config.model.checkpoint
    if begun and start is not None:  # its own checkpoint knows all that it took from the start weights
        start, _ = folder.newest_checkpoint(main=False)
    checkpoint = None if start is None else read_checkpoint(start)
    data = spec.find_data(config) if found_early is None else spec.find_data(config, found_early)
    config, notes = resolve_together(config, lambda own: spec.resolve(own, checkpoint, data))
    config, replaced = replace_colours(config, given)
    config = freeze(profiling.without_learning(config) if profile else config)
    folder.check_same_run(config)
    torch.manual_seed(derive_seed(config.seed, "weights"))
    # the channels of its own checkpoint are those of the images already
    building: Any = replace(config, model=replace(config.model, channel_map=None)) if begun else config
    model, more = spec.build_model(building, data, checkpoint)
    if not begun:
        notes = [*data.notes, *notes, *replaced, *start_notes(checkpoint), *more]
    return make_job(spec, config, folder.recipe, data, model), list(notes)


def start_notes(checkpoint: Checkpoint | None) -> list[str]:
    """Whose weights a run starts from."""
    return [] if checkpoint is None else [f"starting from the weights of {checkpoint.source}"]


def make_job(spec: TaskSpec, config: RunConfig, recipe: str, data: Any, model: Any) -> Job:
    """What training needs, of the parts that the task builds."""
    module = spec.build_module(model, config, recipe, data)
    evaluator = None if spec.build_evaluator is None or data.val is None else spec.build_evaluator(config, data)
    validation = None
    if evaluator is not None:
        evaluator.train = data.train
        validation = Validation(module, evaluator, config.evaluation_interval, spec.evaluation_prefix)
    if config.patience is not None and (evaluator is None or evaluator.best is None):
        raise UserError("--evaluation.patience needs images to evaluate on, and there are none: leave it out")
    draw = None if spec.build_visualization is None else spec.build_visualization(module, config, data)
    rows = {} if spec.describe_data is None else dict(spec.describe_data(config, data))
    cut = getattr(config.data, "window_size", None) is not None
    if cut:
        rows["unit"] = "windows"
    if evaluator is not None:
        known = [rows["data"]] if "data" in rows else []
        rows["data"] = ", ".join([*known, f"{len(evaluator):,} {'whole images' if cut else 'more'} to evaluate on"])
    return Job(module, draw, rows, data.count, validation)
