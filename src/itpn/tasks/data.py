"""The images of a run, and the loader of those to train on."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from itpn.data.batches import Transform
from itpn.data.evaluation import read_some
from itpn.data.files import ImageSource
from itpn.data.formats.reader import REMEDY
from itpn.data.loader import TrainingLoader
from itpn.data.readers import Reader
from itpn.data.windows import Windows, cut_windows
from itpn.system.console import print_note
from itpn.system.environment import is_main_process
from itpn.tasks.large import Tiling, decode_middle
from itpn.tasks.pixels import make_read_settings
from itpn.training.config import RunConfig

NO_IMAGES = "there are no images to evaluate on: give --data.val-root or --data.val-fraction"


@dataclass(frozen=True)
class RunData:
    """Images to train on, and to evaluate on if there are any.

    Attributes:
        train, val: readers of images with what is known of them (:class:`itpn.data.readers.Reader`).
        notes: what is left out or missing, a sentence each.
    """

    train: Any
    val: Any = None
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int | None:
        """Files to train on, of which only a fraction may be corrupt; None where it is not known beforehand."""
        return len(self.train)

    @property
    def samples(self) -> Any:
        """The set that sample images are taken from."""
        return self.train if self.val is None else self.val


def print_once(line: str) -> None:
    """Print a line beside the results, once for all processes."""
    if is_main_process():
        print_note(line)


def find_windows(
    config: Any, files: Reader, annotated: np.ndarray | None = None
) -> tuple[Windows | None, tuple[str, ...]]:
    """The windows that images are cut into where the settings say so, and what is remarkable about them.

    Args:
        annotated: as of :func:`itpn.data.windows.cut_windows`.
    """
    data = config.data
    if data.window_size is None:
        return None, ()
    windows, whole = cut_windows(
        files, data.window_size, data.window_overlap, make_read_settings(config, files), annotated
    )
    notes = [f"{len(windows):,} windows of {len(files):,} image{'s' * (len(files) != 1)}"]
    if whole:
        notes.append(
            f"{len(whole):,} large images are decoded as a whole for each window, the first is {whole[0]}: {REMEDY}"
        )
    return windows, tuple(notes)


def read_samples(config: RunConfig, data: RunData, count: int, tiling: Tiling) -> list[Tensor]:
    """Some readable images to show, evenly spaced over their set, [C, height, width] as they are stored.

    Args:
        tiling: of an image that it cuts, the middle is read.
    """
    reading = make_read_settings(config, data.train)
    decode = functools.partial(decode_middle, tiling, reading)
    return [image for _, image in read_some(data.samples, count, reading, decode)]


def make_training_loader(
    config: RunConfig,
    source: ImageSource | Reader,
    transform: Transform,
    rank: int,
    world_size: int,
    batch_size: int | None = None,
    **own: Any,
) -> TrainingLoader:
    """The training loader of any run.

    Args:
        batch_size: None for that of the settings.
        own: what only some kinds of runs have, as of :class:`TrainingLoader`.
    """
    return TrainingLoader(
        source,
        transform,
        batch_size=batch_size or config.data.batch_size,
        num_workers=config.data.num_workers,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        reading=make_read_settings(config, source),
        pin_memory=torch.cuda.is_available(),
        **own,
    )
