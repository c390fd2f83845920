"""`itpn predict`: what a checkpoint predicts for images, by its task, or features of any checkpoint."""

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from itpn.checkpoints.paths import check_file
from itpn.commands.options import Checkpoint, Members, TaskFile, of_data, shown
from itpn.data.files import find_images
from itpn.errors import UserError
from itpn.system.checks import Fraction, NonNegativeInt, PositiveInt, Side
from itpn.system.console import print_note
from itpn.system.text import either
from itpn.system.writing import make_folder, writing_to
from itpn.tasks.spec import all_tasks, find_task


@dataclass(frozen=True)
class Predict:
    """Write what a checkpoint predicts for images, or features of the images."""

    checkpoint: Checkpoint
    """A checkpoint that `itpn inspect` knows."""
    images: Annotated[Positional[tuple[str, ...]], shown("IMAGE [IMAGE ...]", "(required)")]
    """Image files, tar shards or folders of either."""
    out: Annotated[Path | None, shown("DIR", "(default: the first new of predictions, predictions-2, ...)")] = None
    """Folder for the results."""
    seed: Annotated[NonNegativeInt | None, shown("N", "(default: 0)")] = None
    """Seed of what a prediction draws at random, as masks."""
    min_score: Annotated[Fraction | None, shown("SCORE", "(default: 0.5)")] = None
    """Lowest score of the objects that are written; above 0.05."""
    max_objects: Annotated[PositiveInt | None, shown("N", "(default: as in training)")] = None
    """Objects that are found in an image at most."""
    features: Annotated[Path | None, shown("FILE", "(optional)")] = None
    """Write features of the images to this .safetensors or .npy file, and no predictions."""
    members: Members = ()
    max_pixels: Annotated[
        PositiveInt | None, of_data("max-pixels", "N", "the checkpoint's setting", "Images of more pixels are skipped.")
    ] = None
    window_size: Annotated[
        Side | None, of_data("window-size", "PIXELS", "as the network was trained", "Cut larger images into tiles.")
    ] = None
    window_overlap: Annotated[
        NonNegativeInt | None, of_data("window-overlap", "PIXELS", "a quarter of the tiles", "What tiles share.")
    ] = None
    task_file: TaskFile = None

    def run(self) -> None:
        """Write what the checkpoint predicts; unreadable images are named and skipped."""
        source = find_images(self.images, self.members)
        check_file(self.checkpoint)
        if self.features is not None and self.features.suffix not in (".safetensors", ".npy"):
            raise UserError(f"--features {self.features} must end in .safetensors or .npy")
        if self.features is not None and (self.out is not None or self._given()):
            raise UserError("--features writes no predictions: give it without --out and options of these")
        from itpn.checkpoints.files import read_checkpoint
        from itpn.checkpoints.load import check_finite, load_found
        from itpn.data.decode import MAX_PIXELS
        from itpn.data.shards import check_shards
        from itpn.models.spec import spec_of
        from itpn.tasks.features import write_features
        from itpn.tasks.pixels import stored_read_settings
        from itpn.tasks.prediction import PredictionOptions, read_batches, read_preprocessing

        checkpoint = read_checkpoint(self.checkpoint)
        check_finite(checkpoint)
        trained = checkpoint.settings.get("data", {})
        if source.images and trained.get("bands"):
            source = find_images(self.images, self.members, trained["bands"])
        for note in [*source.notes, *(check_shards(source.shards, source.members) if source.shards else ())]:
            print_note(note)
        model, notes = load_found(checkpoint)
        for note in notes:
            print_note(note)
        limit = self.max_pixels or trained.get("max_pixels") or MAX_PIXELS
        options = self._given()
        if self.features is not None:
            crop, normalize = read_preprocessing(checkpoint, model)
            reading = stored_read_settings(checkpoint, limit)
            write_features(model, normalize, read_batches(source, crop, reading), self.features)
            return
        head = spec_of(model).head
        if head is None:
            raise UserError(
                f"checkpoint {self.checkpoint} has no head of any task, and predicts nothing: give --features FILE"
            )
        task = find_task(head)
        for name in options.keys() - {*task.prediction_options}:
            users = [other.name for other in all_tasks() if name in other.prediction_options]
            raise UserError(f"--{name.replace('_', '-')} is for checkpoints of {either(users)}, not of {task.name}")
        out = self.out or find_new_folder("predictions")
        make_folder(out)
        with writing_to(out):
            task.predict(model, checkpoint, source, PredictionOptions(out, limit, **options))

    def _given(self) -> dict[str, Any]:
        """Options that not every task goes by, where they were given."""
        options = {"seed": self.seed, "min_score": self.min_score, "max_objects": self.max_objects}
        options |= {"window_size": self.window_size, "window_overlap": self.window_overlap}
        return {name: value for name, value in options.items() if value is not None}


def find_new_folder(name: str) -> Path:
    """The first of NAME, NAME-2, NAME-3 ... that is not there, or empty: results of two checkpoints do not mix."""
    paths = (Path(name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
    return next(path for path in paths if not os.path.lexists(path) or (path.is_dir() and not os.listdir(path)))
