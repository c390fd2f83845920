"""`itpn.read_image`: every format, all channels, the stored depth, and any window without the rest."""

import os
import re
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pillow_heif
import pydicom
import pytest
import rasterio
import tifffile
import torch
from PIL import Image

import itpn
import itpn.data.formats.tiff
from itpn.data.decode import UnreadableImage, decoder_errors
from itpn.data.formats.arrays import HDF5
from itpn.data.formats.reader import JPEG2000, open_file
from itpn.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
RNG = np.random.default_rng(0)


def draw(shape: tuple[int, ...], dtype: str = "uint16") -> np.ndarray:
    """Random values over the whole range of a type."""
    kind = np.dtype(dtype).kind
    if kind == "f":
        return RNG.normal(size=shape).astype(dtype)
    if kind == "c":
        return (RNG.normal(size=shape) + 1j * RNG.normal(size=shape)).astype(dtype)
    limits = np.iinfo(dtype)
    return RNG.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


def forget_tiff(monkeypatch):
    """Import the module anew for a test, and give the others back the one that they know."""
    monkeypatch.setattr(itpn.data.formats, "tiff", itpn.data.formats.tiff)
    monkeypatch.delitem(sys.modules, "itpn.data.formats.tiff")


def check(path: Path, expected: np.ndarray, pages: int = 1, page: int = 0, regions: bool | None = None) -> None:
    """The whole image, a window in it, and both from the file's content, are ``expected`` [C, H, W]."""
    found = itpn.read_image(path, page)
    assert np.array_equal(found.numpy(), expected)
    assert found.numpy().dtype == expected.dtype
    for source in (path, path.read_bytes()):
        image = open_file(source)
        assert (image.channels, image.height, image.width) == expected.shape
        assert (image.pages, image.dtype) == (pages, expected.dtype)
        if regions is not None and isinstance(source, Path):
            assert image.by_region == regions
        for top, left, height, width in (
            (0, 0, 1, 1),
            (3, 5, 20, 17),
            (expected.shape[1] - 2, 0, 2, expected.shape[2]),
        ):
            window = image.read(page, (top, left, height, width))
            assert np.array_equal(window, expected[:, top : top + height, left : left + width])


TIFFS = {
    "strips": {"compression": "lzw", "rowsperstrip": 7},
    "tiles": {"tile": (16, 32), "compression": "zlib", "predictor": True},
    "zstd": {"tile": (16, 16), "compression": "zstd"},
    "uncompressed": {},
    "uncompressed tiles": {"tile": (32, 16)},
    "big-endian": {"byteorder": ">", "compression": "lzw"},
    "bigtiff": {"bigtiff": True},
    "white is zero": {"photometric": "miniswhite"},
}


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64"]
)
def test_depths_of_tiff(tmp_path, dtype):
    pixels = draw((40, 50), dtype)
    tifffile.imwrite(tmp_path / "a.tif", pixels, compression="zlib")
    check(tmp_path / "a.tif", pixels[None], regions=True)


@pytest.mark.parametrize("name", TIFFS)
def test_forms_of_tiff(tmp_path, name):
    pixels = draw((40, 50))
    tifffile.imwrite(tmp_path / "a.tif", pixels, **TIFFS[name])
    check(tmp_path / "a.tif", pixels[None], regions=True)


@pytest.mark.parametrize("channels", [2, 3, 4, 7])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_channels_of_tiff(tmp_path, channels, planar, tile):
    pixels = draw((channels, 40, 50), "int16")
    stored = pixels if planar == "separate" else pixels.transpose(1, 2, 0)
    options = {"photometric": "minisblack", "planarconfig": planar, "tile": tile, "compression": "zlib"}
    tifffile.imwrite(tmp_path / "a.tif", stored, metadata=None, **options)
    check(tmp_path / "a.tif", pixels, regions=True)


@pytest.mark.parametrize("axes", ["TCYX", "CTYX", "ZCYX", "TZCYX", "ZYX", "CYX", "TZCYXS"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_axes_of_ome(tmp_path, axes, compression):
    """Axes of planes and of moments are pages; those of channels and of samples are channels."""
    sizes = {"T": 2, "Z": 3, "C": 4, "Y": 40, "X": 50, "S": 3}
    pixels = draw(tuple(sizes[axis] for axis in axes), "uint8")
    photometric = "rgb" if "S" in axes else "minisblack"
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, pixels, metadata={"axes": axes}, compression=compression, photometric=photometric)
    order = [axes.index(axis) for axis in "TZCSYX" if axis in axes]
    if axes == "CTYX":
        order = [1, 0, 2, 3]
    outer = [axis for axis in axes if axis in "TZ"]
    pages = int(np.prod([sizes[axis] for axis in outer]))
    flat = pixels.transpose(order).reshape(pages, -1, 40, 50)
    for page in range(pages):
        check(path, flat[page], pages, page)


TURNS = {
    1: lambda p: p,
    2: np.fliplr,
    3: lambda p: np.rot90(p, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda p: np.rot90(p, -1),  # clockwise
    7: lambda p: np.rot90(p.T, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("form", ["uncompressed", "strips", "tiles", "planes"])
def test_tiff_is_turned_upright(tmp_path, orientation, form):
    """Windows are those of the turned image."""
    pixels = draw((3, 40, 61))
    separate = {"planarconfig": "separate", "photometric": "minisblack", "metadata": None}
    options = {"planes": {**separate, "compression": "zlib"}, "uncompressed": separate}.get(form) or TIFFS[form]
    stored = pixels if form in ("planes", "uncompressed") else pixels.transpose(1, 2, 0)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, stored, extratags=[(274, "H", 1, orientation, True)], **options)
    check(path, np.stack([TURNS[orientation](plane) for plane in pixels]), regions=True)


@pytest.mark.parametrize("orientation", TURNS)
def test_deep_png_is_turned_upright(tmp_path, orientation):
    """Of 16 bits, which older versions of torch do not flip."""
    pixels, exif = draw((40, 61), "uint16"), Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    check(tmp_path / "a.png", TURNS[orientation](pixels)[None])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("orientation", [0, 9])
def test_no_orientation_of_tiff(tmp_path, orientation):
    pixels = draw((40, 50))
    tifffile.imwrite(tmp_path / "a.tif", pixels, extratags=[(274, "H", 1, orientation, True)])
    check(tmp_path / "a.tif", pixels[None])


def test_a_pyramid_is_its_largest_level(tmp_path):
    pixels = draw((64, 96))
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as file:
        file.write(pixels, subifds=1, tile=(16, 16), metadata={"axes": "YX"})
        file.write(pixels[::2, ::2], subfiletype=1, tile=(16, 16))
    check(tmp_path / "a.ome.tif", pixels[None], regions=True)


def test_a_window_reads_its_tiles_alone(tmp_path, monkeypatch):
    """Bytes of the other tiles are not even touched."""
    pixels = draw((256, 256))
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, tile=(16, 16), compression="zlib")
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        spoilt = [(page.dataoffsets[i], page.databytecounts[i]) for i in range(256) if i not in (17, 18, 33, 34)]
    content = bytearray(path.read_bytes())
    for offset, size in spoilt:
        content[offset : offset + size] = bytes(size)
    path.write_bytes(content)
    assert np.array_equal(open_file(path).read(0, (20, 20, 20, 20)), pixels[None, 20:40, 20:40])
    with pytest.raises(UserError, match=r"a\.tif: "):
        itpn.read_image(path)


def test_tiles_without_bytes_have_no_data(tmp_path):
    """GDAL leaves out tiles that hold nothing."""
    path = tmp_path / "a.tif"
    profile = {"driver": "GTiff", "width": 64, "height": 64, "count": 2, "dtype": "int16", "nodata": -9999}
    with rasterio.open(path, "w", tiled=True, blockxsize=32, blockysize=32, sparse_ok=True, **profile) as file:
        file.write(np.ones((2, 32, 32), "int16"), window=rasterio.windows.Window(0, 0, 32, 32))
    image = open_file(path)
    assert image.nodata == -9999
    expected = np.full((2, 64, 64), -9999, "int16")
    expected[:, :32, :32] = 1
    check(path, expected, regions=True)


def test_complex_numbers_become_magnitudes(tmp_path):
    pixels = draw((40, 50), "complex64")
    tifffile.imwrite(tmp_path / "a.tif", pixels, compression="zlib")
    check(tmp_path / "a.tif", np.abs(pixels)[None])
    np.save(tmp_path / "a.npy", pixels)
    check(tmp_path / "a.npy", np.abs(pixels)[None])


def test_arrays_of_python_objects_are_no_images(tmp_path):
    objects = np.array([{"a": 1}, None], dtype=object)
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "a.npz", image=objects)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(UserError, match=rf"{name}: an array of Python objects is no image$"):
            itpn.read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((3, 5000, 5000), "cut off: it ends before its last values"), ((-3, 8, 8), "an array of -3x8x8 is no image")],
)
def test_arrays_whose_header_says_more_than_the_file_holds(tmp_path, shape, words):
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": shape})
        file.write(bytes(100))
    with pytest.raises(UserError, match=rf"a\.npy: {words}$"):
        itpn.read_image(tmp_path / "a.npy")
    with pytest.raises(UnreadableImage, match=rf"^{words}$"):
        open_file((tmp_path / "a.npy").read_bytes())


def test_of_many_arrays_a_few_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", **{f"array{number}": np.zeros((8, 8)) for number in range(1000)})
    words = "it holds arrays array0, array1, array2, array3 and 996 more: name that of the image `image`$"
    with pytest.raises(UserError, match=words):
        itpn.read_image(tmp_path / "a.npz")


def test_bits_become_zeros_and_ones(tmp_path):
    pixels = draw((40, 50), "uint8") > 128
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", pixels)
    for name in ("a.tif", "a.png", "a.npy"):
        check(tmp_path / name, pixels[None].astype(np.uint8))


@pytest.mark.parametrize(
    ("shape", "axes"), [((40, 50), ""), ((7, 40, 50), "CHW"), ((40, 50, 7), "HWC"), ((3, 7, 40, 50), "NCHW")]
)
def test_arrays(tmp_path, shape, axes):
    pixels = draw(shape, "int16")
    np.save(tmp_path / "a.npy", pixels)
    np.savez(tmp_path / "a.npz", image=pixels, mask=pixels[0])
    np.savez_compressed(tmp_path / "b.npz", whatever=pixels)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["group/image"] = pixels
        file["image"] = pixels
    images = {"": pixels[None, None], "HWC": pixels.transpose(2, 0, 1)[None] if axes == "HWC" else None}
    pages = images.get(axes, pixels if axes == "NCHW" else pixels[None])
    for name in ("a.npy", "a.npz", "b.npz", "a.h5"):
        for number, page in enumerate(pages):
            check(tmp_path / name, page, len(pages), number, regions=None if name.endswith("z") else True)


def test_axes_that_are_not_clear_are_asked_for(tmp_path):
    np.save(tmp_path / "a.npy", draw((40, 40, 40)))
    with pytest.raises(UserError, match=r"a\.npy: an array of 40x40x40 does not show .*: CHW or HWC has to be given"):
        itpn.read_image(tmp_path / "a.npy")
    assert open_file(tmp_path / "a.npy", "HWC").channels == 40


@pytest.mark.parametrize(("bits", "dtype"), [(8, "uint8"), (16, "uint16")])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png(tmp_path, bits, dtype, channels):
    """Pillow reads the upper 8 of 16 bits alone."""
    import imagecodecs

    pixels = draw((40, 50, channels), dtype)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(pixels))
    check(tmp_path / "a.png", pixels.transpose(2, 0, 1))


def test_photographs(tmp_path):
    pixels = np.asarray(Image.fromarray(draw((5, 6, 3), "uint8")).resize((50, 40)))
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[274] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    check(tmp_path / "turned.png", np.rot90(pixels, -1).transpose(2, 0, 1))
    Image.fromarray(deep := draw((40, 50))).save(tmp_path / "deep.png", exif=exif)
    check(tmp_path / "deep.png", np.rot90(deep, -1)[None])
    image.convert("CMYK").save(tmp_path / "cmyk.tif")
    assert itpn.read_image(tmp_path / "cmyk.tif").shape == (4, 40, 50)
    palette = image.quantize(7)
    palette.save(tmp_path / "palette.png")
    check(tmp_path / "palette.png", np.asarray(palette.convert("RGB")).transpose(2, 0, 1))
    image.save(tmp_path / "a.avif", quality=95)
    pillow_heif.register_heif_opener()
    image.save(tmp_path / "a.heic", quality=95)
    for name in ("a.avif", "a.heic"):
        found = itpn.read_image(tmp_path / name).numpy()
        assert found.shape == (3, 40, 50)
        assert np.abs(found.astype(int) - pixels.transpose(2, 0, 1)).mean() < 8
    image.save(tmp_path / "a.jfif", format="JPEG")
    assert itpn.read_image(tmp_path / "a.jfif").shape == (3, 40, 50)


def test_rasters(tmp_path):
    pixels = draw((5, 40, 50), "int16")
    profile = {"width": 50, "height": 40, "count": 5, "dtype": "int16", "nodata": -32768}
    with rasterio.open(tmp_path / "a.img", "w", driver="ENVI", **profile) as file:
        file.write(pixels)
    image = open_file(tmp_path / "a.img")
    assert (image.channels, image.nodata, image.by_region) == (5, -32768, True)
    assert np.array_equal(image.read(), pixels)
    assert np.array_equal(image.read(0, (3, 5, 20, 17)), pixels[:, 3:23, 5:22])
    few = pixels // 8  # a lossless transform needs more bits than it stores
    with rasterio.open(tmp_path / "a.jp2", "w", driver="JP2OpenJPEG", quality=100, reversible=True, **profile) as file:
        file.write(few)
    check(tmp_path / "a.jp2", few, regions=True)


def write_dicom(path: Path, pixels: np.ndarray, preamble: bool = True, **elements: Any) -> None:
    """An uncompressed DICOM of one frame [H, W] or several [N, H, W]."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = pydicom.uid.CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = pydicom.uid.generate_uid()
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, int(pixels.dtype.kind == "i")
    if pixels.ndim == 3:
        dataset.NumberOfFrames = len(pixels)
    dataset.PixelData = pixels.tobytes()
    for name, value in elements.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    if not preamble:
        path.write_bytes(path.read_bytes()[132:])


@pytest.mark.parametrize("name", ["a.dcm", "IM0001"])
@pytest.mark.parametrize("dtype", ["int16", "uint16"])
def test_dicom(tmp_path, name, dtype):
    """Recognized without a suffix too; frames are pages."""
    pixels = draw((3, 40, 50), dtype)
    write_dicom(tmp_path / name, pixels)
    for page in range(3):
        check(tmp_path / name, pixels[page][None], 3, page, regions=False)


def test_dicom_is_rescaled(tmp_path):
    """To float32, as of Hounsfield units; without a slope or intercept values are as they are stored."""
    pixels = draw((40, 50), "int16")
    write_dicom(tmp_path / "a.dcm", pixels, RescaleSlope="2", RescaleIntercept="-1024")
    check(tmp_path / "a.dcm", pixels[None].astype(np.float32) * 2 - 1024)
    write_dicom(tmp_path / "b.dcm", pixels, PhotometricInterpretation="MONOCHROME1")
    check(tmp_path / "b.dcm", pixels[None])


def test_dicom_without_its_file_format(tmp_path):
    pixels = draw((40, 50))
    write_dicom(tmp_path / "a.dcm", pixels, preamble=False)
    assert np.array_equal(itpn.read_image(tmp_path / "a.dcm").numpy(), pixels[None])


@pytest.mark.parametrize(("element", "dtype"), [("FloatPixelData", "float32"), ("DoubleFloatPixelData", "float64")])
def test_floats_of_dicom(tmp_path, element, dtype):
    pixels = draw((40, 50), dtype)
    bits = 8 * pixels.dtype.itemsize
    elements = {"PixelData": None, "PixelRepresentation": None, "BitsAllocated": bits, element: pixels.tobytes()}
    write_dicom(tmp_path / "a.dcm", pixels, **elements)
    check(tmp_path / "a.dcm", pixels[None])


@pytest.mark.parametrize("missing", ["PixelData", "Rows"])
def test_dicom_without_pixels(tmp_path, missing):
    write_dicom(tmp_path / "a.dcm", draw((40, 50)), **{missing: None})
    with pytest.raises(UserError, match=r"a\.dcm: DICOM without pixels"):
        itpn.read_image(tmp_path / "a.dcm")


def test_dicom_of_no_rows_is_refused_before_anything_is_drawn_of_it(tmp_path):
    write_dicom(tmp_path / "a.dcm", draw((40, 50)), Rows=0)
    with pytest.raises(UnreadableImage, match=r"^DICOM of 50x0 pixels and 1 channels$"):
        open_file(tmp_path / "a.dcm")


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [
        ("a.ome.tif", "tifffile", "science"),
        ("a.h5", "h5py", "science"),
        ("a.heic", "pillow_heif", "science"),
        ("a.dcm", "pydicom", "dicom"),
        ("a.jp2", "rasterio", "geo"),
        ("a.img", "rasterio", "geo"),
    ],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, name, library, extra):
    path = tmp_path / name
    content = {"a.h5": HDF5, "a.jp2": JPEG2000[0], "a.heic": b"\0\0\0\x18ftypheic", "a.dcm": bytes(128) + b"DICM"}
    path.write_bytes(content.get(name, bytes(100)))
    if name == "a.img":
        (tmp_path / "a.hdr").write_text("ENVI\n")
    if name == "a.ome.tif":
        tifffile.imwrite(path, draw((5, 40, 50)), metadata={"axes": "CYX"})
    monkeypatch.setitem(sys.modules, library, None)
    forget_tiff(monkeypatch)
    with pytest.raises(UserError, match=rf"{name}: .* is read by {library}: pip install 'itpn\[{extra}\]'"):
        itpn.read_image(path)


def test_plain_tiff_needs_no_extra(tmp_path, monkeypatch):
    pixels = draw((40, 50, 3), "uint8")
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    tifffile.imwrite(tmp_path / "b.tif", draw((40, 50)))
    tifffile.imwrite(tmp_path / "c.tif", pixels[..., 0], photometric="miniswhite")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    assert np.array_equal(itpn.read_image(tmp_path / "a.tif").numpy(), pixels.transpose(2, 0, 1))
    assert itpn.read_image(tmp_path / "b.tif").dtype == torch.uint16
    assert np.array_equal(itpn.read_image(tmp_path / "c.tif").numpy(), pixels[None, ..., 0])


@pytest.mark.parametrize("missing", ["tifffile", "imagecodecs"])
@pytest.mark.parametrize("compression", ["lzw", "zstd"])
def test_no_band_is_lost_for_want_of_an_extra(tmp_path, monkeypatch, missing, compression):
    """Pillow would read the first of planes that are compressed."""
    planes = {"photometric": "minisblack", "planarconfig": "separate", "compression": compression}
    tifffile.imwrite(tmp_path / "a.tif", draw((4, 40, 50)), **planes)
    assert itpn.read_image(tmp_path / "a.tif").shape == (4, 40, 50)
    forget_tiff(monkeypatch)
    for name in [name for name in sys.modules if re.match(r"tifffile|imagecodecs", name)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"TIFF of .* is read by {missing}: pip install 'itpn\[science\]'$"):
        itpn.read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("known", [True, False])
def test_faxes(tmp_path, monkeypatch, photometric, known):
    """As stored, by Pillow too, where imagecodecs lacks their compression."""
    pixels = draw((40, 50), "uint8") > 200
    Image.fromarray(pixels).save(tmp_path / "a.tif", compression="group4", tiffinfo={262: photometric})
    if not known:
        forget_tiff(monkeypatch)
        monkeypatch.setattr(tifffile.TIFF, "DECOMPRESSORS", {1: None})
    expected = pixels if photometric else ~pixels
    assert np.array_equal(itpn.read_image(tmp_path / "a.tif").numpy(), expected[None])


def test_images_that_are_too_large_take_no_memory(tmp_path):
    """They are refused by what their headers say."""
    header = b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (9, 99999, 99999), }"
    (tmp_path / "a.npy").write_bytes(header.ljust(127) + b"\n" + bytes(80))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", header.ljust(127) + b"\n" + bytes(2**20))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("image", (99999, 99999), "f8", chunks=(1000, 1000), compression="gzip")
    profile = {"width": 99999, "height": 99999, "count": 3, "dtype": "uint16", "sparse_ok": True, "bigtiff": "yes"}
    rasterio.open(tmp_path / "b.tif", "w", driver="GTiff", tiled=True, **profile).close()
    tracemalloc.start()
    for name in ("a.npy", "a.npz", "a.h5", "b.tif"):
        with pytest.raises(UserError, match=r"99999x99999 pixels, more than|cut off: it ends before its last values"):
            itpn.read_image(tmp_path / name)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
    with pytest.raises(UnreadableImage, match="cut off"), decoder_errors():
        open_file((tmp_path / "a.npy").read_bytes())


def test_headers_that_claim_too_much_take_no_memory(tmp_path):
    """A tile that is larger than its image, and text of a gigabyte in front of an array."""
    tifffile.imwrite(tmp_path / "a.tif", draw((64, 64)), tile=(32, 32), compression="zlib")
    content = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        for name in ("TileWidth", "TileLength"):
            tag = file.pages[0].tags[name]
            content[tag.valueoffset : tag.valueoffset + 2] = (60000).to_bytes(2, "little")
    (tmp_path / "a.tif").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", b"\x93NUMPY\x02\x00" + (2**28).to_bytes(4, "little") + bytes(2**28))
    tracemalloc.start()
    for name, reason in {"a.tif": "tiles of 3,600,000,000 pixels", "a.npz": "a header of so many bytes"}.items():
        with pytest.raises(UserError, match=reason):
            itpn.read_image(tmp_path / name)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def test_one_large_strip_is_not_read_by_region(tmp_path):
    """For each window all of it would be decoded, whatever its size."""
    for name, rows in {"a.tif": 6000, "b.tif": 16}.items():
        zeros = np.zeros((6000, 6000), np.uint16)
        tifffile.imwrite(tmp_path / name, zeros, compression="zlib", rowsperstrip=rows)
        assert open_file(tmp_path / name).by_region == (rows == 16)


def test_types_that_torch_does_not_have(tmp_path):
    """uint64 has a second name in C, which TIFF's pixels have; floats of 80 bits become those of 64."""
    tifffile.imwrite(tmp_path / "a.tif", draw((40, 50), "uint64"))
    assert itpn.read_image(tmp_path / "a.tif").dtype == torch.uint64
    np.save(tmp_path / "a.npy", draw((40, 50), "longdouble"))
    assert itpn.read_image(tmp_path / "a.npy").dtype == torch.float64


def test_no_data_that_the_pixels_cannot_have(tmp_path):
    """As of a GeoTIFF that was converted from floats."""
    for value, expected in {"-9999": None, "nan": None, "0.5": None, "7": 7}.items():
        tifffile.imwrite(tmp_path / "a.tif", draw((40, 50)), extratags=[(42113, "s", 0, value, True)])
        assert open_file(tmp_path / "a.tif").nodata == expected


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.npy")
    with pytest.raises(UserError, match=r"a\.npy: not a regular file"):
        itpn.read_image(tmp_path / "a.npy")


def test_many_channels_count(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("image", (500, 10000, 10000), "f4", chunks=(1, 1000, 1000))
    with pytest.raises(UserError, match=r"10000x10000 pixels of 500 channels take 186 GiB, more than the 4 allowed"):
        itpn.read_image(tmp_path / "a.h5")


def test_python_objects_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"a\.npy: "):
        itpn.read_image(tmp_path / "a.npy")


@pytest.mark.parametrize("name", ["a.tif", "a.npy", "a.npz", "a.h5", "a.dcm", "a.jp2", "a.png", "a.img"])
def test_a_file_that_is_cut_off(tmp_path, name):
    pixels = draw((200, 300))
    if name == "a.tif":
        tifffile.imwrite(tmp_path / name, pixels, compression="zlib")
    elif name == "a.npy":
        np.save(tmp_path / name, pixels)
    elif name == "a.npz":
        np.savez(tmp_path / name, pixels)
    elif name == "a.h5":
        with h5py.File(tmp_path / name, "w") as file:
            file["image"] = pixels
    elif name == "a.dcm":
        write_dicom(tmp_path / name, pixels)
    elif name == "a.jp2":
        profile = {"width": 300, "height": 200, "count": 1, "dtype": "uint16"}
        with rasterio.open(tmp_path / name, "w", driver="JP2OpenJPEG", quality=100, reversible=True, **profile) as file:
            file.write(pixels[None] // 2)
    elif name == "a.img":
        profile = {"width": 300, "height": 200, "count": 1, "dtype": "uint16"}
        with rasterio.open(tmp_path / name, "w", driver="ENVI", **profile) as file:
            file.write(pixels[None])
    else:
        Image.fromarray(pixels).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for size in (len(content) * 9 // 10, len(content) // 2, 140):
        (tmp_path / name).write_bytes(content[:size])
        with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path / name))}: ."):
            itpn.read_image(tmp_path / name)


def test_hdf5_with_pixels_in_another_file(tmp_path):
    """A hostile file could show any file of the machine."""
    (tmp_path / "secret").write_bytes(bytes(range(64)))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("image", (8, 8), "u1", external=[(str(tmp_path / "secret"), 0, 64)])
    with pytest.raises(UserError, match="its pixels are in other files"):
        itpn.read_image(tmp_path / "a.h5")


def test_pixels_of_a_mapped_file_can_be_changed(tmp_path):
    """Without a crash, and without changing the file."""
    pixels = RNG.integers(1, 60_000, (5, 40, 60)).astype(np.uint16)
    np.save(tmp_path / "a.npy", pixels)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", planarconfig="separate")
    for name in ("a.npy", "a.tif"):
        itpn.read_image(tmp_path / name).zero_()
        assert itpn.read_image(tmp_path / name).float().mean() > 0
