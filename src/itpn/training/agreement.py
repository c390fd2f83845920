"""What the processes of a run agree on before they train: one of them resolves the settings, and all have the same.

Images are read for the settings that they decide on. Where each process read them by itself, one that could not read
a file would train with other numbers, and nobody would see it.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from itpn.distributed import gather, of_first
from itpn.errors import UserError
from itpn.training.config import AnyConfig, RunConfig, Settings, to_dict
from itpn.training.launch import choose_devices, launch_processes, make_fabric, quieten_libraries, read_launch

RESOLVED = "ITPN_RESOLVED"  # variable by which a process hands what it has resolved to those that Lightning starts
MAX_CHARACTERS = 100_000  # characters in it: Linux refuses 128 KiB
# what each process may have of its own: places of files on its machine, and what it has of devices
LOCAL = frozenset(
    {
        *("output_dir", "name", "model.checkpoint", "teacher.checkpoint", "probe.root"),
        *(f"data.{name}" for name in ("root", "val_root", "masks", "val_masks", "num_workers")),
        *(f"trainer.{name}" for name in ("accelerator", "devices", "num_nodes")),
    }
)


def resolve_together(
    config: AnyConfig, resolve: Callable[[AnyConfig], tuple[AnyConfig, Any]]
) -> tuple[AnyConfig, list[str]]:
    """Settings as one process resolves them: of those that torchrun or Slurm has started, the first, while the others
    wait; of those that Lightning starts later, the one that starts them.

    Args:
        resolve: what the settings leave open is filled in, and what is remarkable, a sentence each.

    Raises:
        UserError, MachineError: as ``resolve``, in all processes; or they have other settings than one another.
    """
    launch = read_launch()
    if launch.started_by_first and RESOLVED in os.environ:
        return change(config, json.loads(os.environ[RESOLVED])), []
    if launch.processes is not None:
        quieten_libraries()
        launch_processes(make_fabric(config.trainer, launch))

    def resolve_here() -> tuple[dict[str, Any], list[str]]:
        found, notes = resolve(config)
        return find_changes(config, found), list(notes)

    changes, notes = of_first(resolve_here)
    os.environ.pop(RESOLVED, None)
    if launch.processes is None and choose_devices(config.trainer, launch).several:
        text = json.dumps(changes)
        os.environ |= {RESOLVED: text} if len(text) <= MAX_CHARACTERS else {}
    config = change(config, changes)
    check_agreement(config)  # here, where they are together already: a refusal leaves nothing behind
    return config, notes


def find_changes(before: Settings, after: Settings) -> dict[str, Any]:
    """The settings that differ, section by section, with the later value."""
    changes = {}
    for field in fields(after):  # type: ignore[arg-type]
        old, new = getattr(before, field.name), getattr(after, field.name)
        if isinstance(new, Settings):
            if own := find_changes(old, new):
                changes[field.name] = own
        elif new != old:
            changes[field.name] = new
    return changes


def change(settings: AnyConfig, changes: Mapping[str, Any]) -> AnyConfig:
    """Settings with the values that :func:`find_changes` has found."""
    own = {name: getattr(settings, name) for name in changes}
    new = {
        name: change(own[name], value) if isinstance(own[name], Settings) else value for name, value in changes.items()
    }
    return replace(settings, **new)


def check_agreement(config: RunConfig) -> None:
    """Raise :class:`UserError` in all processes where one has other settings than the first, but for places of files.

    A collective operation.
    """
    settings = gather(to_dict(config))

    def refuse_others() -> None:
        for rank, own in enumerate(settings):
            for option, first, other in _compare(settings[0], own):
                raise UserError(
                    f"the processes of this run have different settings: --{option} is {first} in the first and "
                    f"{other} in that of rank {rank}; start all with the same options, on machines that read the same "
                    "images"
                )

    of_first(refuse_others)


def _compare(first: Mapping[str, Any], own: Mapping[str, Any], section: str = "") -> list[tuple[str, str, str]]:
    """Option and both values of each setting that differs."""
    found = []
    for key, value in first.items():
        if isinstance(value, dict):
            found += _compare(value, own.get(key) or {}, f"{key}.")
        elif section + key not in LOCAL and value != own.get(key):
            found.append((f"{section}{key}".replace("_", "-"), _shorten(value), _shorten(own.get(key))))
    return found


def _shorten(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
