"""Silence while images are decoded."""

import functools
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from PIL import Image

# libjpeg and libtiff write their warnings to file descriptor 2, in the middle of a progress bar. It is redirected
# while any thread decodes.
_lock = threading.Lock()
_depth = 0
_saved_stderr = -1
_pillow_limit: int | None = None


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress what decoders print, and Pillow's limit of pixels; :func:`itpn.data.decode.open_image` has its own."""
    global _depth, _saved_stderr, _pillow_limit
    with _lock:
        _depth += 1
        if _depth == 1:
            _pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            with suppress(OSError):  # a process may run without stderr
                _saved_stderr = os.dup(2)
                os.dup2(_devnull(), 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                Image.MAX_IMAGE_PIXELS = _pillow_limit
                if _saved_stderr >= 0:
                    os.dup2(_saved_stderr, 2)
                    os.close(_saved_stderr)
                    _saved_stderr = -1


@functools.cache
def _devnull() -> int:
    return os.open(os.devnull, os.O_WRONLY)
