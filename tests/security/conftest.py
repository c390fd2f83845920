import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def photo(tmp_path):
    """Ten small photographs in ``photos``; the path of the first."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(10):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
    return folder / "0.jpg"
