"""DICOM by pydicom: stored values, or those of the modality, as Hounsfield units, where the file says how."""

import io
from pathlib import Path

import numpy as np
import pydicom
from pydicom.filereader import read_partial
from pydicom.pixels import apply_modality_lut, pixel_array

from itpn.data.decode import UnreadableImage
from itpn.data.formats.image_file import Window, cut

RESCALED = ("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence")
PIXELS = {0x7FE00008: np.float32, 0x7FE00009: np.float64, 0x7FE00010: None}  # tags, of which a file has one
SIZES = ("Rows", "Columns", "BitsAllocated")


class DicomImage:
    """See :class:`itpn.data.formats.image_file.ImageFile`; the frames of a file are its pages."""

    by_region = False
    nodata: float | None = None

    def __init__(self, source: Path | bytes) -> None:
        self._source = source
        header, pixels = self._read_header()
        if missing := [name for name in SIZES if name not in header]:
            raise UnreadableImage(f"DICOM without pixels: it has no {' and no '.join(missing)}")
        if pixels is None:
            raise UnreadableImage("DICOM without pixels")
        self.height, self.width = int(header.Rows), int(header.Columns)
        self.channels = int(header.get("SamplesPerPixel", 1))
        if min(self.height, self.width, self.channels) < 1:
            raise UnreadableImage(f"DICOM of {self.width}x{self.height} pixels and {self.channels} channels")
        self.grey_or_rgb = self.channels in (1, 3)  # YBR is converted
        self.pages = int(header.get("NumberOfFrames") or 1)
        self._rescaled = any(name in header for name in RESCALED)
        bits, signed = int(header.BitsAllocated), bool(header.get("PixelRepresentation"))
        stored = np.dtype(f"{'i' if signed else 'u'}{max(bits // 8, 1)}")
        self.dtype = np.dtype(np.float32) if self._rescaled else np.dtype(PIXELS[pixels] or stored)

    def read(self, page: int = 0, window: Window | None = None) -> np.ndarray:
        """See :meth:`itpn.data.formats.image_file.ImageFile.read`."""
        dataset = pydicom.dcmread(self._open(), force=True)
        pixels = pixel_array(dataset, index=page)
        if self._rescaled:
            pixels = apply_modality_lut(pixels, dataset)
        pixels = pixels[None] if self.channels == 1 else np.moveaxis(pixels, -1, 0)
        return np.ascontiguousarray(cut(pixels, window), self.dtype)

    def _read_header(self) -> tuple[pydicom.Dataset, int | None]:
        """What comes before the pixels, and their tag; None where there are none."""
        found: list[int] = []

        def stop(tag: int, vr: str | None, length: int) -> bool:
            found.extend(number for number in PIXELS if tag == number)
            return bool(found)

        with open(self._source, "rb") if isinstance(self._source, Path) else io.BytesIO(self._source) as file:
            header = read_partial(file, stop, force=True)
        return header, found[0] if found else None

    def _open(self) -> Path | io.BytesIO:
        return io.BytesIO(self._source) if isinstance(self._source, bytes) else self._source
