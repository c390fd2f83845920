"""What a task is: settings, and a builder for each of its parts. Commands look tasks up here."""

import functools
import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from itpn.errors import UserError
from itpn.models.heads import UnknownTask, register_head
from itpn.training.config import RunConfig

ENTRY_POINTS = "itpn.tasks"  # where installed packages name tasks of their own


@dataclass(frozen=True)
class TaskSpec:
    """A task. Builders of torch's things may be :func:`lazy`, so that settings are checked without importing it.

    Training a run:

    Attributes:
        name: as ``config.task``, in files and messages.
        config: class of its settings.
        head: () -> :class:`itpn.models.heads.Head`, which builds the network and knows its tensors.
        check_data: (config) -> anything, for ``find_data``: finds missing images without importing torch.
        find_data: (config) -> :class:`itpn.tasks.data.RunData`, the images to train on and to evaluate on.
        resolve: (config, checkpoint, data) -> (config, notes): what the settings leave to the checkpoint (None where
            there is none) and to the images is filled in. One process of a run calls it, the others take its settings.
        build_model: (config, data, checkpoint) -> (network, notes): with the checkpoint's weights, and what is not as
            there, a sentence each.
        build_recipe: (config, num_classes, checkpoint) -> (network, notes): the network of a recipe, without images;
            None for the number of classes that the checkpoint has, or a public data set.
        build_module: (network, config, recipe, data) -> :class:`itpn.training.module.TrainingModule`.
        build_visualization: (module, config, data) -> () -> image, what the network makes of sample images.
        describe_data: (config, data) -> rows of the table at the start, by title: "data", what the images are, "size",
            what is made of them, and others.
        evaluation_prefix: of the names of metrics while a run is trained.
        build_evaluator: (config, data) -> :class:`itpn.tasks.evaluation.Evaluator`, of data with images to evaluate on.
            It serves validation and `itpn evaluate`.
        train: (config, recipe, profile, given) -> run folder, for a task whose runs are not all composed of the above;
            as of :func:`itpn.tasks.run.train`.

    Using a checkpoint:

    Attributes:
        evaluation_options: beginnings of the options that `itpn evaluate` takes beside those of every task.
        evaluation_hints: what to say of an option that `itpn evaluate` does not take, where another is meant.
        resolve_evaluation: (config, request) -> (config, arguments of the network): as the checkpoint of the
            :class:`itpn.tasks.evaluation.EvaluationRequest` was trained, but for the settings of data that were given.
        find_evaluation_data: (config, network, request) -> (evaluator, which images it evaluates on).
        knn: whether it can evaluate features by k-NN, without a head (`itpn evaluate --knn`).
        predict: (network, checkpoint, source, options) for `itpn predict`; options are a
            :class:`itpn.tasks.prediction.PredictionOptions`.
        prediction_options: which of ``seed``, ``min_score``, ``max_objects``, ``window_size`` and ``window_overlap``
            it goes by; `itpn predict` refuses the others.
        export: (network, checkpoint, out, size, dynamic_size, metadata) -> :class:`itpn.tasks.export.Exported`;
            None where nothing is to be exported.
        describe: (config, checkpoint) -> rows of `itpn info`, see :mod:`itpn.tasks.info`.
        cache_features: (config, found early, out, views, half) for `itpn cache-features`; None without a teacher.
    """

    name: str
    config: type[RunConfig]
    head: Callable[[], Any]
    find_data: Callable[..., Any]
    resolve: Callable[..., Any]
    build_model: Callable[..., Any]
    build_recipe: Callable[..., Any]
    build_module: Callable[..., Any]
    describe: Callable[..., Any]
    predict: Callable[..., None]
    prediction_options: Collection[str] = ()
    build_visualization: Callable[..., Any] | None = None
    describe_data: Callable[..., dict[str, str]] | None = None
    build_evaluator: Callable[..., Any] | None = None
    evaluation_prefix: str = "val_"
    train: Callable[..., Any] | None = None
    check_data: Callable[..., Any] | None = None
    evaluation_options: Collection[str] = ()
    evaluation_hints: Mapping[str, str] = field(default_factory=dict)
    resolve_evaluation: Callable[..., Any] | None = None
    find_evaluation_data: Callable[..., Any] | None = None
    knn: bool = False
    export: Callable[..., Any] | None = None
    cache_features: Callable[..., None] | None = None


# in which file of its folder a task has which parts
PARTS = {
    "data": ("find_data", "describe_data"),
    "network": ("resolve", "build_model", "build_recipe"),
    "module": ("build_module",),
    "evaluation": ("build_evaluator",),
    "prediction": ("predict", "build_visualization"),
}


def parts_in(folder: str) -> dict[str, Any]:
    """The parts of a task whose package has the usual files: arguments of :class:`TaskSpec`."""
    return {name: lazy(f"{folder}.{file}:{name}") for file, names in PARTS.items() for name in names}


_TASKS: dict[str, TaskSpec] = {}
_MODULES: dict[str, str] = {}  # which registered them


def register_task(spec: TaskSpec) -> TaskSpec:
    """Make a task known: a line in a package, or in a recipe file of a task of one's own.

    An installed package may name a :class:`TaskSpec` as an entry point of the group ``itpn.tasks`` instead. A recipe
    file that is read again registers its task again.

    Raises:
        ValueError: its settings are of another name, or another module has registered a task of this name.
    """
    return _register(spec, sys._getframe(1).f_globals["__name__"])


def _register(spec: TaskSpec, module: str) -> TaskSpec:
    if spec.config.task != spec.name:
        raise ValueError(f"{spec.config.__name__}.task is {spec.config.task!r}, not {spec.name!r}")
    known = _TASKS.get(spec.name)
    if known == spec:
        return spec
    if known is not None and module != _MODULES[spec.name]:
        owner = getattr(sys.modules.get(_MODULES[spec.name]), "__file__", _MODULES[spec.name])
        raise ValueError(f"{owner} has registered a task {spec.name!r} already: choose another name")
    _TASKS[spec.name], _MODULES[spec.name] = spec, module
    register_head(spec.name, spec.head)
    return spec


class lazy:  # noqa: N801  # used as a function
    """A function by "module:name", whose module is imported when it is called."""

    def __init__(self, path: str) -> None:
        self.path = path

    def load(self) -> Callable[..., Any]:
        """The function itself."""
        module, _, name = self.path.partition(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.load()(*args, **kwargs)


def task_of(config: RunConfig) -> TaskSpec:
    """The task of some settings."""
    return find_task(config.task)


def find_task(name: str) -> TaskSpec:
    """A task by name.

    Raises:
        UnknownTask: no such task is registered.
    """
    if name not in _TASKS:
        load_installed_tasks()
    if name not in _TASKS:
        raise UnknownTask(name)
    return _TASKS[name]


def all_tasks() -> list[TaskSpec]:
    """Every known task, those of installed packages included."""
    load_installed_tasks()
    return list(_TASKS.values())


@functools.cache
def load_installed_tasks() -> None:
    """Register the tasks of installed packages.

    Raises:
        UserError: one of them cannot be imported, or is no task that can be registered.
    """
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            _register(entry.load(), entry.module)
        except Exception as error:  # whatever the code of others may raise
            package = entry.module if entry.dist is None else entry.dist.name
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"the installed package {package} cannot register its task {entry.name}; mend or uninstall it: {reason}"
            ) from error
