"""A teacher's weights in a file, their SHA-256, and what timm says while it loads them."""

import contextlib
import hashlib
import io
import logging
from collections.abc import Iterable, Iterator
from logging.handlers import BufferingHandler
from pathlib import Path

from timm.models import clean_state_dict
from torch import Tensor

from itpn.checkpoints.io import read_state, unwrap
from itpn.errors import UserError

FILE_FORMS = "a .safetensors or .pt file in timm, OpenAI CLIP or open_clip form, or a folder of transformers"


def read_tensors(path: str) -> dict[str, Tensor]:
    """The tensors of a teacher's file; of a model of images and text, those of the image tower."""
    what = f"teacher checkpoint {path}"
    whole, _ = read_state(path, what, FILE_FORMS, scripts=True)
    state, _ = unwrap(whole, ("state_dict_ema", "model_ema", "state_dict", "model", "module"))
    tensors = {key: t for key, t in state.items() if isinstance(t, Tensor)}
    if not tensors:
        raise UserError(f"{what} has no weights in it; give {FILE_FORMS}")
    tensors = clean_state_dict(tensors)  # "module." and the like
    # of DINOv3's files: NaN until it is set, and a second name of the last norm
    tensors = {key: t for key, t in tensors.items() if not (key.endswith(".bias_mask") or key.startswith("norms."))}
    return {key: t for key, t in tensors.items() if key.startswith("visual.")} or tensors


def sha256_of(files: Iterable[Path]) -> str:
    """SHA-256 of a file as `sha256sum` has it; of a model in parts, of these one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def quiet_timm() -> Iterator[list[logging.LogRecord]]:
    """Take what timm logs while it loads weights, and what its converters print."""
    logger = logging.getLogger("timm.models._builder")
    handler = BufferingHandler(capacity=10**6)  # the messages that it keeps
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield handler.buffer
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
