"""Windows of large images: each is read alone, where the format allows it, and counts as an image."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from itpn.data.decode import UnreadableImage
from itpn.data.readers import Reader, locate
from itpn.data.samples import MixedImages, WindowRequest, measure
from itpn.data.stored import ReadSettings
from itpn.geometry import find_starts

THREADS = 8  # that read headers, of files which may be far away


@dataclass(frozen=True)
class Windows:
    """The windows of a reader's images, as a reader.

    Attributes:
        places: index of the image, top, left, height and width of each window, int64 [n, 5].
        sizes: height and width of each image, int64 [images, 2].
        fixed: windows are not to be moved, and the sizes are those of annotations.
    """

    files: Reader
    places: np.ndarray
    sizes: np.ndarray
    fixed: bool = False

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        number, top, left, _, _ = self.places[index].tolist()
        return f"{self.files.name(number)} at {left},{top}"

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        number, top, left, height, width = self.places[index].tolist()
        name, data, *_ = self.files[number]
        full_height, full_width = self.sizes[number].tolist()
        if self.fixed:
            window = WindowRequest(data, (top, left, height, width), whole=(full_height, full_width))
            return f"{name} at {left},{top}", window
        below, beside = full_height - top - height, full_width - left - width
        room = (min(top, height // 2), min(left, width // 2), min(below, height // 2), min(beside, width // 2))
        return f"{name} at {left},{top}", WindowRequest(data, (top, left, height, width), room)


def is_large(height: int, width: int, size: int) -> bool:
    """Whether decoding an image as a whole for each of its windows is worth a word."""
    return height * width > 4 * size**2


def cut_windows(
    files: Reader, size: int, overlap: int, reading: ReadSettings, annotated: np.ndarray | None = None
) -> tuple[Windows, list[str]]:
    """Windows that cover each image; of an image smaller than a window, the image.

    Args:
        size: of a window's sides in pixels.
        overlap: pixels that neighbours have in common at least.
        annotated: height and width of each image as its annotations say, int64 [images, 2], of windows that are not to
            be moved; None for the images' own.

    Returns:
        The windows, and the names of images whose windows cannot be read without decoding the whole.
    """

    def look(index: int) -> tuple[int, int, str]:
        if annotated is not None and not is_large(int(annotated[index, 0]), int(annotated[index, 1]), size):
            return size, size, ""  # there is nothing to be said about it
        name = files.name(index)
        try:
            height, width, in_parts = measure(locate(files, index), reading, name)
        except (UnreadableImage, MixedImages):  # said when it is to be read
            return size, size, ""
        return height, width, name if is_large(height, width, size) and not in_parts else ""

    with ThreadPoolExecutor(THREADS) as pool:
        measured = list(pool.map(look, range(len(files))))
    sizes = np.array([(height, width) for height, width, _ in measured], dtype=np.int64).reshape(-1, 2)
    sizes = sizes if annotated is None else annotated
    places = []
    for index, (height, width) in enumerate(sizes.tolist()):
        for top in find_starts(height, size, overlap):
            for left in find_starts(width, size, overlap):
                places.append((index, top, left, min(size, height), min(size, width)))
    windows = Windows(files, np.array(places, dtype=np.int64).reshape(-1, 5), sizes, annotated is not None)
    return windows, [name for *_, name in measured if name]
