"""Images as small and as smooth as tests want them."""

import numpy as np
from PIL import Image


def draw_photo(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth as photographs are: blurred noise."""
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)
