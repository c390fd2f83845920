"""What others wrote: weights in files of any form, what timm says while it loads them, and the hub."""

import contextlib
import io
import logging
import pickle
import re
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor

from itpn.errors import UserError

FILE_FORMS = "a .safetensors or .pt file in timm, OpenAI CLIP or open_clip form"


def read_tensors(path: str) -> dict[str, Tensor]:
    """The tensors of a file; of a model of images and text, those of the image tower."""
    if not Path(path).is_file():
        raise UserError(f"teacher checkpoint {path} does not exist")
    try:
        state = _read_file(path)
        for key in ("state_dict_ema", "model_ema", "state_dict", "model"):  # as timm and open_clip wrap them
            if isinstance(state.get(key), dict):
                state = state[key]
        tensors = {key: t for key, t in state.items() if isinstance(t, Tensor)}
    except Exception as error:  # of whatever class: damaged files are damaged in many ways
        # torch raises this for Python objects, which could run code, and for what is no pickle at all
        unpickling = isinstance(error, pickle.UnpicklingError)
        reason = "is no checkpoint or has Python objects in it" if unpickling else "is damaged or no checkpoint"
        raise UserError(f"teacher checkpoint {path} {reason}; give {FILE_FORMS}") from error
    if not tensors:
        raise UserError(f"teacher checkpoint {path} has no weights in it; give {FILE_FORMS}")
    tensors = clean_state_dict(tensors)  # "module." and the like
    visual = {key: t for key, t in tensors.items() if key.startswith("visual.")}
    return visual or tensors


def _read_file(path: str) -> dict[str, Any]:
    if path.endswith(".safetensors"):
        return load_file(path)
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            if any(member.endswith("/constants.pkl") for member in archive.namelist()):
                # TorchScript, as OpenAI publishes CLIP. Its code is a language of its own that cannot import Python
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # deprecated, and yet what those files need
                    return torch.jit.load(path, map_location="cpu").state_dict()
    # weights_only: a checkpoint must not be able to run code. Many store the options of their command line beside
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


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
