"""`itpn export`: what a checkpoint holds, as a file that runs without this package."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import DisallowNone, arg

from itpn.checkpoints.paths import check_file
from itpn.commands.options import Checkpoint, Flag, NumHeads, TaskFile, shown
from itpn.errors import UserError
from itpn.system.checks import Side
from itpn.system.console import print_note
from itpn.system.text import either
from itpn.tasks.spec import all_tasks, find_task


@dataclass(frozen=True)
class Export:
    """Write a network to a file that runs without itpn: ONNX or torch.export."""

    checkpoint: Checkpoint
    """A checkpoint that `itpn inspect` knows."""
    out: Annotated[Path, shown("FILE")]
    """The file to write: .onnx, or .pt2 for torch.export."""
    task: Annotated[str | None, shown("TASK", "(default: the first of the checkpoint that can be exported)")] = None
    """What the file computes: a task's outputs, or the maps of `pyramid` or `backbone`."""
    levels: Annotated[
        DisallowNone[Literal["pyramid", "pooled", "joined"] | None], arg(help_behavior_hint="(optional)")
    ] = None
    """Maps: `pyramid` strides 4 to 16, `pooled` 4 to 64 (detectors), `joined` with the stages 4 to 32 (segmenters)."""
    img_size: Annotated[Side | tuple[Side, Side] | None, shown("PX [PX]", "(default: the checkpoint's)")] = None
    """Side of the input images, or height and width."""
    dynamic_size: Flag = False
    """The file takes images of any height and width, in whole patches; the batch size is always free."""
    num_heads: NumHeads = None
    task_file: TaskFile = None

    def run(self) -> None:
        """Export a network, with its preprocessing in the file, and print what was written."""
        check_file(self.checkpoint)
        if self.levels and self.task not in (None, "pyramid"):
            raise UserError(f"--levels is for --task pyramid, not {self.task}")
        from itpn.checkpoints.contents import HEADLESS
        from itpn.checkpoints.files import read_checkpoint
        from itpn.checkpoints.load import load_found
        from itpn.tasks.export import check_out, export, print_exported

        check_out(self.out)
        checkpoint = read_checkpoint(self.checkpoint)
        name = choose("pyramid" if self.levels else self.task, checkpoint.contents.names, HEADLESS, self.checkpoint)
        overrides: dict[str, Any] = {"levels": self.levels, "num_heads": self.num_heads}
        model, notes = load_found(
            checkpoint, name, **{key: value for key, value in overrides.items() if value is not None}
        )
        for note in notes:
            print_note(note)
        metadata = {"source": Path(self.checkpoint).name, "task": name}
        metadata |= {
            n: json.dumps(checkpoint.metadata[n]) for n in ("preprocessing", "classes") if n in checkpoint.metadata
        }
        size = (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size
        write = export if name in HEADLESS else find_task(name).export
        assert write is not None
        print_exported(write(model, checkpoint, self.out, size, self.dynamic_size, metadata))


def choose(wanted: str | None, names: Sequence[str], headless: Collection[str], source: str) -> str:
    """Which of a file's networks is exported.

    Args:
        wanted: by name; None for the first that can be.
        names: what the file has, the richest first.
        headless: the names among them that are no tasks.

    Raises:
        UserError: the file has no such network, or it cannot be exported.
    """
    if wanted is None:
        return next(name for name in names if name in headless or find_task(name).export is not None)
    exported = {task.name for task in all_tasks() if task.export is not None}
    able = [name for name in names if name in headless or name in exported]
    if wanted not in able:
        raise UserError(f"checkpoint {source} cannot be exported as {wanted}; give --task {either(able)}")
    return wanted
