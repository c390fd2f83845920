"""Rasters by rasterio, which is GDAL: JPEG 2000 and ENVI."""

from pathlib import Path

import numpy as np
import rasterio
from rasterio.enums import ColorInterp
from rasterio.io import MemoryFile
from rasterio.windows import Window as RasterWindow

from itpn.data.decode import UnreadableImage
from itpn.data.formats.image_file import CUT_OFF, Window, keep_storable, plain_dtype, to_plain

RGB = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)


class RasterImage:
    """See :class:`itpn.data.formats.image_file.ImageFile`.

    Args:
        driver: GDAL's name of the format. Some of its others read from the network.
    """

    by_region = True
    pages = 1

    def __init__(self, source: Path | bytes, driver: str) -> None:
        self._memory = MemoryFile(source) if isinstance(source, bytes) else None
        self._raster = rasterio.open(self._memory or source, driver=driver)
        self.channels, self.height, self.width = self._raster.count, self._raster.height, self._raster.width
        self.dtype = plain_dtype(np.result_type(*self._raster.dtypes))
        size = sum(np.dtype(dtype).itemsize for dtype in self._raster.dtypes) * self.height * self.width
        packed = "file_compression" in self._raster.tags(ns="ENVI")
        if driver == "ENVI" and isinstance(source, Path) and not packed and source.stat().st_size < size:
            raise UnreadableImage(CUT_OFF)  # GDAL reads zeros
        self.grey_or_rgb = self.channels == 1 or self._raster.colorinterp == RGB
        self.nodata = keep_storable(self._raster.nodata, self.dtype)

    def read(self, page: int = 0, window: Window | None = None) -> np.ndarray:
        """See :meth:`itpn.data.formats.image_file.ImageFile.read`."""
        part = None
        if window is not None:
            top, left, height, width = window
            part = RasterWindow(left, top, width, height)
        return to_plain(self._raster.read(window=part))
