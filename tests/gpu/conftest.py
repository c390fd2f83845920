"""Tests of what only a GPU shows, marked ``gpu``: ``make test-gpu`` runs them. The same bodies run on the CPU in
``make test``, as far as they mean something there, so that they do not rot.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import draw_photo

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products, for the test of resuming


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """24 JPEGs of several sizes and kinds, and a PNG."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    kinds = [("RGB", {}), ("RGB", {"progressive": True}), ("L", {}), ("RGB", {"subsampling": 0}), ("RGB", {})]
    for number in range(24):
        mode, options = kinds[number % len(kinds)]
        image = draw_photo(rng, 240 + 8 * number, 200 + 5 * number).convert(mode)
        image.save(folder / f"{number:02d}.jpg", quality=90, **options)
    draw_photo(rng, 240, 200).save(folder / "24.png")
    return folder
