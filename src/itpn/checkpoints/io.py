"""What others wrote: weights in files of any form, what timm says while it loads them, and the hub."""

import contextlib
import io
import logging
import os
import pickle
import re
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor

from itpn.checkpoints.torchscript import read_script
from itpn.errors import ACCIDENTS, FORBIDDEN, UserError, refusal

FILE_FORMS = "a .safetensors or .pt file in timm, OpenAI CLIP or open_clip form"

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


def read_tensors(path: str) -> dict[str, Tensor]:
    """The tensors of a teacher's file; of a model of images and text, those of the image tower."""
    what = f"teacher checkpoint {path}"
    state = unwrap(
        read_state(path, what, FILE_FORMS, scripts=True), ("state_dict_ema", "model_ema", "state_dict", "model")
    )[0]
    tensors = {key: t for key, t in state.items() if isinstance(t, Tensor)}
    if not tensors:
        raise UserError(f"{what} has no weights in it; give {FILE_FORMS}")
    tensors = clean_state_dict(tensors)  # "module." and the like
    visual = {key: t for key, t in tensors.items() if key.startswith("visual.")}
    return visual or tensors


def unwrap(state: dict[str, Any], keys: Iterable[str]) -> tuple[dict[str, Any], str]:
    """The dict of tensors inside a checkpoint of many things, by the first of ``keys`` that holds one; and that key."""
    for key in keys:
        if isinstance(state.get(key), dict) and any(isinstance(t, Tensor) for t in state[key].values()):
            return state[key], key
    return state, ""


def read_state(path: str | Path, what: str, wanted: str, scripts: bool = False) -> dict[str, Any]:
    """Read a checkpoint file of any form without running what is in it.

    Args:
        what: the file as a message names it.
        wanted: what to give instead.
        scripts: read TorchScript archives too, as OpenAI publishes CLIP: their tensors alone.

    Raises:
        UserError: not there, damaged, no checkpoint, or with code or Python objects in it.
    """
    try:
        if not Path(path).is_file():
            raise UserError(f"{what} does not exist")
        state = _read_file(str(path), what, wanted, scripts)
    except UserError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # of whatever class: damaged files are damaged in many ways
        if isinstance(error, OSError) and error.errno in ACCIDENTS | FORBIDDEN:
            raise refusal(f"{what} cannot be read", error) from error
        if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
            raise
        raise UserError(f"{what} {_describe_damage(error)}; give {wanted}") from error
    if not isinstance(state, dict):
        raise UserError(f"{what} holds a {type(state).__name__}, not a dict of weights; give {wanted}")
    check_tensors(state, os.path.getsize(path), what)
    return state


def check_tensors(state: Any, size: int, what: str) -> None:
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
    check_declared(declared, size, what)


def check_declared(declared: int, size: int, what: str) -> None:
    """Refuse a file of ``size`` bytes that declares far more."""
    if declared > MOST_SHARED * size + 2**26:
        raise UserError(
            f"{what} declares {declared / 2**30:,.1f} GiB in a file of {size / 2**20:,.1f} MiB: it is damaged, or made "
            "to exhaust memory"
        )


def _describe_damage(error: Exception) -> str:
    # torch refuses Python objects, which could run code, with this error, and what is no pickle at all
    found = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if found:
        return (
            f"has a Python object in it ({found[1]}), which could run code, and is not read (if you trust it, save its "
            "tensors alone with torch.save)"
        )
    return "is damaged or no checkpoint"


def _read_file(path: str, what: str, wanted: str, scripts: bool) -> Any:
    if path.endswith(".safetensors"):
        return load_file(path)
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
            check_declared(unpacked, os.path.getsize(path), what)
            if any(member.endswith("/constants.pkl") for member in archive.namelist()):
                if not scripts:
                    raise UserError(f"{what} is a TorchScript archive, which is code, and is not read; give {wanted}")
                return read_script(path)
            if is_compressed(archive):
                raise UserError(
                    f"{what} has compressed parts, which torch does not read: save it again with torch.save"
                )
    # weights_only: a checkpoint must not be able to run code
    with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on pickles that torch did not write: an error follows
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def is_compressed(archive: zipfile.ZipFile) -> bool:
    """Whether parts of a checkpoint are, as torch never does it: they could take any memory, and mapped be weights."""
    return any(member.compress_type for member in archive.infolist())


def check_hub(repository: str, filename: str | None) -> None:
    """Raise at once what is in the way to the hub: its own client retries for most of a minute, and says so often."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import HfHubHTTPError

    # timm prefers a safetensors twin of whatever file is named
    names = [*([filename] if filename else []), "model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin"]
    if any(isinstance(try_to_load_from_cache(repository, name), str) for name in names):
        return
    # the hub's answer, that a file is not there for example, is timm's to deal with
    with contextlib.suppress(HfHubHTTPError):
        get_hf_file_metadata(hf_hub_url(repository, names[0]), timeout=5)


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def quiet_timm() -> Iterator[list[str]]:
    """Take what timm logs while it loads weights, and what its converters print."""
    logger = logging.getLogger("timm.models._builder")
    handler = _Messages()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield handler.messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def describe_mismatch(error: Exception) -> str:
    """The first thing that does not fit, of all that torch lists."""
    text = str(error)
    if found := re.search(r"size mismatch for (\S+): .*?\[([\d, ]*)\].*?\[([\d, ]*)\]", text):
        there, here = (f"[{shape}]" for shape in found.groups()[1:])
        return f"{found[1]} is {there} there, {here} in the model"
    if found := re.search(r'Missing key\(s\) in state_dict: "(.*?)"', text):
        return f"it has no {found[1]}"
    if found := re.search(r'Unexpected key\(s\) in state_dict: "(.*?)"', text):
        return f"the model has no {found[1]}"
    return f"timm cannot convert it ({one_line(error)})"


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
