"""The file of a run's checkpoint: reading it, whether it is whole, and what it says beside its tensors."""

import errno
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from itpn.checkpoints.io import check_stored
from itpn.checkpoints.older_settings import update_settings
from itpn.errors import MachineError
from itpn.training.config import StoredSettings

# what comes of bytes that are there but not those that were written; anything else may pass, as a read error does
CORRUPT = (
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, struct.error, EOFError, NotImplementedError),
    *(AssertionError, AttributeError, LookupError, TypeError, ValueError),
)
CHUNK = 2**24  # bytes
# what a run is restored from
PARTS: dict[str, type] = {
    "global_step": int,
    "epoch": int,
    "state_dict": dict,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}


class CorruptCheckpoint(Exception):
    """The file can be read, and is not a whole checkpoint."""


def read_state(path: Path, whole: bool = True) -> dict[str, Any]:
    """Everything that a checkpoint of a run holds; its tensors are mapped, not read.

    Args:
        whole: compare every byte with its checksum.

    Raises:
        CorruptCheckpoint: the file was cut off or changed, or is something else.
        MachineError: it cannot be read, now: no permission, no memory, a disk or network that fails.
    """
    try:
        try:
            with path.open("rb") as file:
                archive = zipfile.ZipFile(file)
                check_stored(archive)
                if whole and (member := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"wrong checksum of {member}")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            _check_parts(state)
        except Exception as error:
            if not _proves_corruption(error):
                raise
            _read_through(path)
            raise CorruptCheckpoint(str(error).partition("\n")[0] or type(error).__name__) from error
        return dict(state)
    except CorruptCheckpoint:
        raise
    except Exception as error:
        cause = _read_error(error) or error
        reason = getattr(cause, "strerror", None) or str(cause).partition("\n")[0] or type(cause).__name__
        raise MachineError(
            f"checkpoint {path} cannot be read: {reason}; it may be whole, and nothing was changed: once it can be "
            f"read, the same command resumes from {path}"
        ) from error


def _check_parts(state: Any) -> None:
    """Raise TypeError or ValueError for what is no checkpoint of a run, although torch can read it."""
    if not isinstance(state, dict):
        raise TypeError(f"it holds a {type(state).__name__}")
    for name, kind in PARTS.items():
        if not isinstance(state.get(name), kind):
            found = f"is a {type(state[name]).__name__}" if name in state else "is missing"
            raise TypeError(f"its {name} {found}")
    if state["global_step"] < 0:
        raise ValueError(f"its global_step is {state['global_step']}")
    for name, tensor in state["state_dict"].items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"its weight {name} is a {type(tensor).__name__}")


def _proves_corruption(error: Exception) -> bool:
    if _read_error(error) is not None:
        return False
    if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
        # torch raises it for whatever happens, so also where there is no memory
        return "PytorchStreamReader" in str(error) or "encrypted" in str(error)
    return isinstance(error, (OSError, *CORRUPT))


def _read_error(error: BaseException | None) -> OSError | None:
    """The error of a disk or a network, for which zipfile says that it is no zip; its own wrong seeks are none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            return error
        error = error.__context__
    return None


def _read_through(path: Path) -> None:
    """Raise the OSError of a file that cannot be read to its end: then its bytes say nothing of corruption."""
    with path.open("rb") as file:
        while file.read(CHUNK):
            pass


def find_settings(state: dict[str, Any]) -> StoredSettings | None:
    """Settings of the run that wrote a checkpoint; None where it does not say them.

    Raises:
        CorruptCheckpoint: it is no checkpoint of a run.
    """
    try:
        own = state.get("itpn", {})
        settings = own.get("settings", own.get("config"))
        if settings is None:
            return None
        if not isinstance(own["task"], str):
            raise TypeError(f"its task is a {type(own['task']).__name__}")
        return StoredSettings(own["recipe"], own["task"], update_settings(dict(settings)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptCheckpoint(f"its settings are none ({type(error).__name__}: {error})") from error
