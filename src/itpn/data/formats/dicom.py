"""DICOM by pydicom: stored values, or those of the modality, as Hounsfield units, where the file says how."""

import io
from pathlib import Path

import numpy as np
import pydicom
from pydicom.pixels import apply_modality_lut, pixel_array

from itpn.data.decode import UnreadableImage
from itpn.data.formats.image_file import Window, cut

RESCALED = ("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence")
SIZES = ("Rows", "Columns", "BitsAllocated")


class DicomImage:
    """See :class:`itpn.data.formats.image_file.ImageFile`; the frames of a file are its pages."""

    by_region = False
    nodata: float | None = None

    def __init__(self, source: Path | bytes) -> None:
        self._source = source
        header = pydicom.dcmread(self._open(), stop_before_pixels=True, force=True)
        if missing := [name for name in SIZES if name not in header]:
            raise UnreadableImage(f"DICOM without pixels: it has no {' and no '.join(missing)}")
        self.height, self.width = int(header.Rows), int(header.Columns)
        self.channels = int(header.get("SamplesPerPixel", 1))
        self.rgb = self.channels == 3  # YBR is converted
        self.pages = int(header.get("NumberOfFrames") or 1)
        self._rescaled = any(name in header for name in RESCALED)
        bits, signed = int(header.BitsAllocated), bool(header.get("PixelRepresentation"))
        stored = np.dtype(f"{'i' if signed else 'u'}{max(bits // 8, 1)}")
        self.dtype = np.dtype(np.float32) if self._rescaled else stored

    def read(self, page: int = 0, window: Window | None = None) -> np.ndarray:
        """See :meth:`itpn.data.formats.image_file.ImageFile.read`."""
        dataset = pydicom.dcmread(self._open(), force=True)
        if "PixelData" not in dataset:
            raise UnreadableImage("DICOM without pixels")
        pixels = pixel_array(dataset, index=page)
        if self._rescaled:
            pixels = apply_modality_lut(pixels, dataset)
        pixels = pixels[None] if self.channels == 1 else np.moveaxis(pixels, -1, 0)
        return np.ascontiguousarray(cut(pixels, window), self.dtype)

    def _open(self) -> Path | io.BytesIO:
        return io.BytesIO(self._source) if isinstance(self._source, bytes) else self._source


def is_dicom(head: bytes) -> bool:
    """Whether the first 132 bytes are those of DICOM's file format."""
    return head[128:132] == b"DICM"
