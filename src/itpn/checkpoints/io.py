"""Weight files: reading any of them without running what is in it, and writing ours."""

import json
import os
import pickle
import re
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from itpn.checkpoints.torchscript import read_script
from itpn.errors import ACCIDENTS, FORBIDDEN, RunStopped, UserError, refusal
from itpn.system.writing import write_whole

MOST_SHARED = 4  # times a checkpoint's own size that its tensors may have: weights that are shared count again


class _Shell:
    """Stands for what is not needed to read the weights: takes any data, and does nothing with it."""

    def __init__(self, *data: Any) -> None:
        pass

    def __setstate__(self, data: Any) -> None:
        pass


NUMPY = (
    "dtype",
    "ndarray",
    *(f"{core}.multiarray.{f}" for core in ("core", "_core") for f in ("scalar", "_reconstruct")),
)
# what training code stores beside weights: options of a command line, NumPy's numbers, mmengine's record of losses. The
# real classes of NumPy must not be had: an array of objects over a file's bytes is a pointer of the file's choice
HARMLESS: list[Any] = [
    Namespace,
    (_Shell, "mmengine.logging.history_buffer.HistoryBuffer"),
    *((_Shell, f"numpy.{name}") for name in NUMPY),
]


def unwrap(state: dict[str, Any], keys: Iterable[str]) -> tuple[dict[str, Any], str]:
    """The dict of tensors inside a checkpoint of many things, by the first of ``keys`` that holds one; and that key."""
    for key in keys:
        if isinstance(state.get(key), dict) and any(isinstance(t, Tensor) for t in state[key].values()):
            return state[key], key
    return state, ""


def read_state(
    path: str | Path, what: str, wanted: str, scripts: bool = False
) -> tuple[dict[str, Any], dict[str, str] | None]:
    """Read a checkpoint file of any form without running what is in it.

    Args:
        what: the file as a message names it.
        wanted: what to give instead.
        scripts: read TorchScript archives too, as OpenAI publishes CLIP: their tensors alone.

    Returns:
        What it holds, and what the header of a safetensors file says beside; None of another file.

    Raises:
        UserError: not there, corrupt, no checkpoint, or with code or Python objects in it.
    """
    try:
        if not Path(path).is_file():
            raise UserError(f"{what} does not exist")
        state, header = _read_file(str(path), what, wanted, scripts)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of whatever class: corrupt files are corrupt in many ways
        if isinstance(error, OSError) and error.errno in ACCIDENTS | FORBIDDEN:
            raise refusal(f"{what} cannot be read", error) from error
        if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
            raise
        raise UserError(f"{what} {_why_unreadable(error)}; give {wanted}") from error
    if not isinstance(state, dict):
        raise UserError(f"{what} holds a {type(state).__name__}, not a dict of weights; give {wanted}")
    _check_tensors(state, os.path.getsize(path), what)
    return state, header


def _check_tensors(state: Any, size: int, what: str) -> None:
    """Refuse tensors that their file cannot hold: a few bytes may declare any shape, and a copy would take its memory.

    Args:
        size: bytes of the file.

    Raises:
        UserError: such a tensor, or one that is not dense or not in memory.
    """
    left, seen, declared = [state], set(), 0
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            plain = value.layout == torch.strided and value.device.type == "cpu"
            if not plain or value.is_quantized or value.is_nested:
                raise UserError(f"{what} has a tensor that is not dense: save plain tensors in it")
            declared += value.numel() * value.element_size()
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            left.extend(value.values() if isinstance(value, dict) else value)
    _check_declared(declared, size, what)


def _check_declared(declared: int, size: int, what: str) -> None:
    """Refuse a file of ``size`` bytes that declares far more."""
    if declared > MOST_SHARED * size + 2**26:
        raise UserError(
            f"{what} declares {declared / 2**30:,.1f} GiB in a file of {size / 2**20:,.1f} MiB: it is corrupt, or made "
            "to exhaust memory"
        )


def _why_unreadable(error: Exception) -> str:
    # torch refuses Python objects, which could run code, with this error, and what is no pickle at all
    found = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if found:
        return (
            f"has a Python object in it ({found[1]}), which could run code, and is not read (if you trust it, save its "
            "tensors alone with torch.save)"
        )
    if isinstance(error, CompressedParts):
        return "has compressed parts, which torch does not read: save it again with torch.save"
    return "is corrupt or no checkpoint"


def _read_file(path: str, what: str, wanted: str, scripts: bool) -> tuple[Any, dict[str, str] | None]:
    if path.endswith(".safetensors"):
        with safe_open(path, "pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}, tensors.metadata() or {}  # noqa: SIM118
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
            _check_declared(unpacked, os.path.getsize(path), what)
            if any(member.endswith("/constants.pkl") for member in archive.namelist()):
                if not scripts:
                    raise UserError(f"{what} is a TorchScript archive, which is code, and is not read; give {wanted}")
                return read_script(path), None
            check_stored(archive)
    # weights_only: a checkpoint must not be able to run code
    with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on pickles that torch did not write: an error follows
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped), None


class CompressedParts(zipfile.BadZipFile):
    """Of a checkpoint, as torch never has them: they could take any memory, and mapped be weights."""


def check_stored(archive: zipfile.ZipFile) -> None:
    """Raise :class:`CompressedParts` where there are some."""
    if any(member.compress_type for member in archive.infolist()):
        raise CompressedParts("its parts are compressed, and could take any memory")


def count_nonfinite(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Tensors with infinite values or NaN, and how many values."""
    # in a network's precision, where a large float64 is infinite
    counts = {n: int((~torch.isfinite(t.float())).sum()) for n, t in tensors.items() if t.is_floating_point()}
    return {name: count for name, count in counts.items() if count}


def describe_nonfinite(nonfinite: Mapping[str, int]) -> str:
    """What :func:`count_nonfinite` found, in words."""
    count, first = sum(nonfinite.values()), next(iter(nonfinite))
    return f"{count} infinite numbers or NaN in {len(nonfinite)} tensors, {first} first: it is of no use"


def describe_error(error: BaseException) -> str:
    """Class and message of an error in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write our file: whole, or not at all."""
    # a copy each: safetensors takes neither views nor tensors that share memory
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    write_whole(path, serialize(tensors, {**texts, "format": "itpn"}))


class _Sink:
    """Takes what torch.save writes; an error waits until it is done, for which torch would raise one of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass  # whoever opened the file does


def save_to(file: IO[bytes], content: dict[str, Any]) -> None:
    """Do what torch.save does; raises the OSError of a file that cannot be written."""
    sink = _Sink(file)
    try:
        torch.save(content, sink)  # type: ignore[arg-type]
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None:  # a signal in the middle of it, which torch calls a failure to write
            if isinstance(cause, KeyboardInterrupt | RunStopped):
                raise cause from None
            cause = cause.__context__
        raise
    if sink.error is not None:
        raise sink.error


def hold_the_same(ours: Path, other: Path) -> bool:
    """Whether another safetensors file has the very tensors of ours, in whichever order."""
    try:
        with safe_open(ours, "pt") as one, safe_open(other, "pt") as two:
            if sorted(one.keys()) != sorted(two.keys()):
                return False
            return all(torch.equal(one.get_tensor(name), two.get_tensor(name)) for name in one.keys())  # noqa: SIM118
    except (OSError, SafetensorError):  # not there, or corrupt
        return False
