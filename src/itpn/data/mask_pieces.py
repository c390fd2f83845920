"""Masks without the empty rows and columns around them, so that memory grows with objects, not with images."""

from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval.core import mask as rle


class Piece(NamedTuple):
    """A mask, and where it is in its image.

    Attributes:
        pixels: bool [height, width].
    """

    top: int
    left: int
    pixels: np.ndarray


def encode_piece(piece: Piece, height: int, width: int) -> dict[str, Any]:
    """A mask as COCO's compressed run lengths of an image of this size, which is never drawn as a whole."""
    rows, cols = piece.pixels.shape
    framed = np.zeros((cols, rows + 2), np.int8)
    framed[:, 1:-1] = piece.pixels.T
    change = np.diff(framed, axis=1)  # 1 where a run begins in a column, -1 after its end
    first = (piece.left + np.arange(cols))[:, None] * height + piece.top + np.arange(rows + 1)
    return encode_runs(first[change == 1], first[change == -1], height, width)


def encode_runs(begins: np.ndarray, ends: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """COCO's compressed run lengths of a mask.

    Args:
        begins, ends: of its runs in each column, int64 [n], as positions in the order of columns.
    """
    apart = begins[1:] != ends[:-1]  # a run that ends with a column goes on in the next
    begins = np.concatenate([begins[:1], begins[1:][apart]])
    ends = np.concatenate([ends[:-1][apart], ends[-1:]])
    edges = np.stack([begins, ends], axis=1).reshape(-1)
    counts = np.diff(edges, prepend=0, append=height * width).tolist()
    counts = counts[:-1] if counts[-1] == 0 and len(counts) > 1 else counts
    encoded = rle.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]
    return {"size": [height, width], "counts": encoded.decode()}
