"""An image of which each band is a file of its own."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from itpn.data.decode import UnreadableImage, decoder_errors
from itpn.data.formats.arrays import Axes
from itpn.data.formats.image_file import ImageFile, Window
from itpn.data.formats.reader import open_file


class BandsFile:
    """See :class:`itpn.data.formats.image_file.ImageFile`: the channels of files of one size and type.

    Pixels without data have the value that the first file declares for them.

    Args:
        paths: of the files, in the order of the channels.
        axes: of arrays, see :class:`itpn.data.formats.arrays.ArrayImage`.

    Raises:
        UnreadableImage: a file cannot be read, or is of another size or type than the first.
    """

    grey_or_rgb = False

    def __init__(self, paths: Sequence[Path], axes: Axes | None = None) -> None:
        self._files = [_open(path, axes) for path in paths]
        first = self._files[0]
        for path, file in zip(paths, self._files, strict=True):
            if _describe(file) != _describe(first):
                raise UnreadableImage(
                    f"{paths[0].name} has {_describe(first)}, and {path.name} {_describe(file)}: resample the bands to "
                    "one size and type"
                )
        self.channels = sum(file.channels for file in self._files)
        self.height, self.width, self.dtype = first.height, first.width, first.dtype
        self.pages = max(file.pages for file in self._files)
        self.nodata = next((file.nodata for file in self._files if file.nodata is not None), None)
        self.by_region = all(file.by_region for file in self._files)

    def read(self, page: int = 0, window: Window | None = None) -> np.ndarray:
        """See :meth:`itpn.data.formats.image_file.ImageFile.read`."""
        bands = []
        for file in self._files:
            pixels = file.read(page, window)
            if file.nodata not in (None, self.nodata):
                pixels = np.where(pixels == file.nodata, np.array(self.nodata).astype(pixels.dtype), pixels)
            bands.append(pixels)
        return np.concatenate(bands)


def _open(path: Path, axes: Axes | None) -> ImageFile:
    try:
        with decoder_errors():
            return open_file(path, axes)
    except UnreadableImage as error:
        raise UnreadableImage(f"band {path.name}: {error}") from None


def _describe(file: ImageFile) -> str:
    return f"{file.width}x{file.height} pixels of {file.dtype.name}"
