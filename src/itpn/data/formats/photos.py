"""Photographs by Pillow and torchvision, at the depth that is stored."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_png

from itpn.data.decode import EncodedImage, UnreadableImage, is_deep_png, load_image, open_image
from itpn.data.formats.image_file import Window, cut, keep_storable
from itpn.data.headers import NODATA, PHOTOMETRIC, SAMPLES, read_nodata
from itpn.data.orientation import turn_array

BANDS = {"1": 1, "L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4, "I": 1, "F": 1, "I;16": 1, "I;16B": 1}


class PhotoImage:
    """See :class:`itpn.data.formats.image_file.ImageFile`. A palette becomes its colours, except in TIFF.

    Args:
        indices: keep those of a palette.

    Attributes:
        has_palette: whether a palette becomes its colours.
    """

    by_region = False
    pages = 1

    def __init__(self, source: Path | bytes, max_pixels: int | None = None, indices: bool = False) -> None:
        self._data = source if isinstance(source, bytes) else source.read_bytes()
        opened = open_image(io.BytesIO(self._data), max_pixels)
        self._opened, image = opened, opened.image
        self.height, self.width = opened.height, opened.width
        self._deep = is_deep_png(self._data)  # Pillow reads the upper 8 bits alone
        self._mode = image.mode
        self.has_palette = image.mode in ("P", "PA") and image.format != "TIFF" and not indices
        if self.has_palette:
            self._mode = "RGBA" if image.has_transparency_data else "RGB"
        self.pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
        kinds = {"I": np.int32, "F": np.float32, "I;16": np.uint16, "I;16B": np.uint16}
        self.dtype = np.dtype(np.uint16 if self._deep else kinds.get(self._mode, np.uint8))
        tags: Any = getattr(image, "tag_v2", {})
        if tags.get(SAMPLES, 1) > len(image.getbands()):  # of planes of their own Pillow reads the first alone
            raise UnreadableImage("TIFF of bands that Pillow does not read")
        self.nodata = keep_storable(read_nodata(tags.get(NODATA)), self.dtype)
        self._inverted = tags.get(PHOTOMETRIC) == 0 and self._mode in ("1", "L")
        self.channels = {0: 1, 2: 3, 4: 2, 6: 4}[self._data[25]] if self._deep else BANDS.get(self._mode, 1)
        self.grey_or_rgb = self._mode in ("1", "L", "RGB") and not self._inverted

    def read(self, page: int = 0, window: Window | None = None) -> np.ndarray:
        """See :meth:`itpn.data.formats.image_file.ImageFile.read`."""
        if self._deep:
            encoded = torch.frombuffer(bytearray(self._data), dtype=torch.uint8)
            pixels = turn_array(decode_png(encoded, ImageReadMode.UNCHANGED).numpy(), self._opened.orientation)
            return np.ascontiguousarray(cut(pixels, window))
        image = load_image(self._opened)
        pixels = np.asarray(image if image.mode == self._mode else image.convert(self._mode))
        if self._inverted:
            pixels = ~pixels
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return np.ascontiguousarray(cut(pixels, window), self.dtype)


class DecodedPhoto:
    """See :class:`itpn.data.formats.image_file.ImageFile`: a photograph as a viewer shows it, in RGB."""

    channels, pages, dtype = 3, 1, np.dtype(np.uint8)
    grey_or_rgb = True
    nodata: float | None = None

    def __init__(self, image: EncodedImage) -> None:
        self._image, self.height, self.width, self.by_region = image, image.height, image.width, image.reads_windows

    def read(self, page: int = 0, window: Window | None = None) -> np.ndarray:
        """See :meth:`itpn.data.formats.image_file.ImageFile.read`."""
        if window is None:
            return self._image.decode().contiguous().numpy()
        return self._image.decode_crop(*window, window[2:]).contiguous().numpy()
