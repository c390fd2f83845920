"""What tasks put on a backbone: each registers its head by name.

Without torch, which a head imports when it is made.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from itpn.errors import UserError
from itpn.models.spec import NetworkSpec, Options

if TYPE_CHECKING:
    from torch import Tensor, nn

    Tensors = Mapping[str, Tensor]


class UnknownTask(UserError):
    """A task of another package, or of a recipe file, which has not been imported."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"the task {name!r} is not known: install the package that registers it, or give the recipe file that does "
            "as --recipe FILE"
        )


class Head(ABC):
    """What a task puts on a backbone: how it is built, and what checkpoints have to know of it.

    Attributes:
        parts: titles of the head's parts by the beginning of their tensors' names, the first that fits. A part is
            loaded whole or not at all.
        joined: a file with none of the parts is said to lack the last title alone.
        classes: beginnings of names of the tensors that know the classes.
        pixels: beginnings of names of the tensors that predict a patch's pixels, (row, col, channel): other channels of
            images change them.
        arguments: what may be overridden by name; whatever else is overridden belongs to the backbone, and so does
            ``num_heads``, which commands set.
        pyramid: whether the head stands on a pyramid.
        levels: the maps that it takes from the pyramid.
        purpose: what the network is for, in a word or two.
        recipe: the recipe that trains such a head on any checkpoint; None where none is needed.
    """

    parts: Mapping[str, str]
    joined = False
    classes: tuple[str, ...] = ()
    pixels: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    pyramid = True
    levels = "pyramid"
    purpose: str
    recipe: str | None = None

    @abstractmethod
    def build(self, spec: NetworkSpec) -> "nn.Module":
        """The whole network, randomly initialized.

        Raises:
            TypeError, ValueError, RuntimeError: options that do not fit.
            UserError: an option is missing, and who can give it.
        """

    @abstractmethod
    def read(self, tensors: "Tensors") -> dict[str, Any] | None:
        """The options that a file's tensors tell; None where they are not of this head."""

    @abstractmethod
    def complete(self, spec: NetworkSpec) -> NetworkSpec:
        """A spec of this head for a file that has none: published values for what is missing."""

    @abstractmethod
    def summarize(self, spec: NetworkSpec) -> str:
        """What the network is, e.g. "a detector of 3 classes"."""

    def describe(self, options: Options) -> dict[str, str]:
        """Titles and lines of `itpn inspect` on a head of these options, beside :meth:`summarize`."""
        return {}

    def guess(self, options: Options) -> list[str]:
        """Which options of :meth:`read` no tensor shows, as "name=value (reason)"; the name is one of ``arguments``."""
        return []

    def adjust(self, options: Options, layout: str) -> dict[str, Any]:
        """Options of :meth:`read` with what the code of others does and no tensor shows.

        Args:
            layout: whose names the file has, one of :data:`itpn.checkpoints.adapters.Layout`.
        """
        return dict(options)

    def override(self, options: Options, arguments: Options) -> dict[str, Any]:
        """Options with others that a user gives.

        Args:
            arguments: by name, some of ``arguments``.

        Raises:
            UserError: a value that cannot be.
        """
        return {**options, **arguments}

    def adopt(self, preprocessing: Options) -> dict[str, Any]:
        """Options of a head without weights that follow from the images of the backbone's weights."""
        return {}

    def differ(self, options: Options, model: "nn.Module") -> dict[str, str]:
        """What makes parts of a file of this head unusable although all shapes agree, by title.

        Args:
            options: of the file.
            model: a network of this head.
        """
        return {}

    def command(self, source: str, spec: NetworkSpec) -> str | None:
        """The command that uses a file; None for the usual one.

        Args:
            spec: what the file has of a network with this head, without options where it has no such head.
        """
        return None

    def from_settings(self, settings: dict[str, Any], overrides: dict[str, Any]) -> NetworkSpec | None:
        """The network of a run's stored settings, with other values by name; None where settings do not tell."""
        return None

    def from_architecture(self, stored: dict[str, Any]) -> dict[str, Any] | None:
        """The options in the description that files had before :class:`NetworkSpec`; None for another head's."""
        return None


_HEADS: dict[str, Callable[[], Head]] = {}


def register_head(name: str, make: Callable[[], Head]) -> None:
    """Make a head known by name; ``make`` is called when the head is needed."""
    _HEADS[name] = make


def heads() -> dict[str, Head]:
    """All heads by name, the richest first: in the order of their registration."""
    return {name: make() for name, make in _HEADS.items()}


def find_head(name: str) -> Head:
    """A head by name.

    Raises:
        UnknownTask: none is registered by this name.
    """
    if name not in _HEADS:
        raise UnknownTask(name)
    return _HEADS[name]()
