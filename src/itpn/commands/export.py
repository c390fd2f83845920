"""`itpn export`: what a checkpoint holds, as a file that runs without this package."""

import json
from pathlib import Path
from typing import Any

from itpn.checkpoints.contents import HEADLESS, read_contents
from itpn.checkpoints.files import read_checkpoint
from itpn.checkpoints.load import load_found
from itpn.models.backbone import find_backbone
from itpn.system.console import print_aside
from itpn.tasks.exporting import Size, export_model, print_exported
from itpn.tasks.spec import find_task


def export_checkpoint(
    checkpoint: str, out: Path, name: str | None, size: Size | None, dynamic_size: bool, **overrides: Any
) -> None:
    """Export a network of a checkpoint, with its preprocessing in the file, and print what was written.

    Args:
        name: a task, "pyramid" or "backbone"; None for the first that the file has everything for and that can be
            exported.
        size: of the images; None for what the file's position table is made for.

    Raises:
        UserError: see :func:`itpn.load` and :func:`itpn.tasks.exporting.export_model`.
    """
    found = read_checkpoint(checkpoint)
    if name is None:
        names = read_contents(found).names
        name = next(name for name in names if name in HEADLESS or find_task(name).export is not None)
    model, notes = load_found(found, name, **overrides)
    for note in notes:
        print_aside(note)
    metadata = {"source": Path(checkpoint).name, "task": name}
    metadata |= {n: json.dumps(found.metadata[n]) for n in ("preprocessing", "classes") if n in found.metadata}
    export = None if name in HEADLESS else find_task(name).export
    if export is not None:
        print_exported(export(model, found, out, size, dynamic_size, metadata))
        return
    own = find_backbone(model).image_shape[1:]
    print_exported(export_model(model, out, size or (own[0], own[1]), dynamic_size, metadata))
