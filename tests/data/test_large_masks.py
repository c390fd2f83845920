"""Masks of large images: windows of them are read alone, or of a mask that stays decoded."""

import random
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import itpn.data.formats.tiff
import itpn.data.mask_checks
import itpn.data.mask_files
from itpn.data.class_names import Names
from itpn.data.decode import UnreadableImage
from itpn.data.labelmaps import find_label_maps
from itpn.data.mask_checks import MaskRules, scan_mask
from itpn.data.mask_files import DecodedMask, open_mask, open_regions
from itpn.data.masks import IGNORED, make_table
from itpn.data.samples import open_sample
from itpn.data.segmentation_transform import SegmentationTransform
from itpn.data.stored import PLAIN
from itpn.data.windows import cut_windows
from itpn.errors import UserError
from itpn.tasks.segmentation.config import SegmentationConfig, SegmentationDataConfig
from itpn.tasks.segmentation.data import find_data

HEIGHT, WIDTH, TILE = 150, 210, 32
WINDOWS = [(0, 0, 48, 48), (40, 100, 48, 48), (102, 162, 48, 48), (30, 31, 1, 1), (0, 0, HEIGHT, WIDTH)]
COLOURS = [(0, 0, 0), (255, 0, 0), (0, 128, 255)]
NAMES: Names = [("ground", COLOURS[0]), ("road", COLOURS[1]), ("water", COLOURS[2])]
PLAIN_NAMES: Names = [(name, None) for name, _ in NAMES]
LABELS = ((np.mgrid[:HEIGHT, :WIDTH][0] // 40 + np.mgrid[:HEIGHT, :WIDTH][1] // 50) % 3).astype(np.uint8)
DEFLATE = {"tile": (TILE, TILE), "compression": "deflate"}


def write_palette(path: Path, labels: np.ndarray, colours: list[tuple[int, int, int]], **options) -> None:
    table = np.zeros((3, 256), np.uint16)
    table[:, : len(colours)] = 257 * np.array(colours, np.uint16).T
    tifffile.imwrite(path, labels, photometric="palette", colormap=table, **{**DEFLATE, **options})


def write_mask(path: Path, kind: str) -> None:
    if kind == "palette":
        write_palette(path, LABELS, COLOURS)
    elif kind == "colours":
        tifffile.imwrite(path, np.array(COLOURS, np.uint8)[LABELS], photometric="rgb", **DEFLATE)
    elif kind == "three equal channels":
        tifffile.imwrite(path, np.repeat(LABELS[..., None], 3, 2), photometric="rgb", **DEFLATE)
    elif kind == "turned":
        tags = [(274, "H", 1, 6, True)]  # a quarter to the right
        tifffile.imwrite(path, np.rot90(LABELS), photometric="minisblack", extratags=tags, **DEFLATE)
    elif kind == "mapped":
        tifffile.imwrite(path, LABELS, photometric="minisblack")
    elif kind == "strips":
        tifffile.imwrite(path, LABELS, photometric="minisblack", rowsperstrip=8, compression="lzw")
    elif kind == "big-endian":
        tifffile.imwrite(path, LABELS.astype(">u2"), photometric="minisblack", byteorder=">", **DEFLATE)
    else:
        tifffile.imwrite(path, LABELS.astype(kind), photometric="minisblack", **DEFLATE)


def test_shades_of_four_bits_are_decoded_as_a_whole(tmp_path):
    """Their colours are those of a table, by which a whole mask is read."""
    Image.fromarray(LABELS).save(tmp_path / "mask.tif")
    assert open_regions(str(tmp_path / "mask.tif")) is not None
    with tifffile.TiffFile(tmp_path / "mask.tif", mode="r+") as file:
        file.pages[0].tags["BitsPerSample"].overwrite(4)
        file.pages[0].tags["ImageWidth"].overwrite(2 * WIDTH)
    assert open_regions(str(tmp_path / "mask.tif")) is None


@pytest.mark.parametrize("names", [NAMES, PLAIN_NAMES])
@pytest.mark.parametrize(
    "kind",
    [
        *("uint8", "int16", "uint16", "int32", "uint32", "big-endian", "mapped", "strips", "turned"),
        *("palette", "colours", "three equal channels"),
    ],
)
def test_a_window_has_the_labels_of_the_whole(tmp_path, kind, names):
    """Whatever the encoding; the reader of windows and that of the whole are two libraries."""
    path = tmp_path / "mask.tif"
    write_mask(path, kind)
    table = make_table(names, False, (255,))
    file = open_regions(str(path))
    assert file is not None
    assert (file.height, file.width) == (HEIGHT, WIDTH)
    if kind == "colours" and names is PLAIN_NAMES:
        with pytest.raises(UnreadableImage, match="an image in colours"):
            table.read_window(file, WINDOWS[-1])
        return
    if kind == "three equal channels" and names is NAMES:  # greys that no class has
        with pytest.raises(UnreadableImage, match=r"colour \(\d, \d, \d\), which no class has"):
            table.read_window(file, WINDOWS[-1])
        return
    whole = table.read(str(path)).numpy()
    assert np.array_equal(whole, LABELS)
    for window in WINDOWS:
        top, left, height, width = window
        assert np.array_equal(table.read_window(file, window), LABELS[top : top + height, left : left + width])


@pytest.mark.parametrize("unnamed", [False, True])
def test_what_a_palette_means_is_decided_by_the_whole_mask(tmp_path, unnamed):
    """Its colours name classes in another order than its labels; but if one colour is unknown, its labels count."""
    labels = LABELS.copy()
    colours = [COLOURS[0], COLOURS[1], COLOURS[2] if not unnamed else (1, 2, 3)]
    if not unnamed:
        colours = colours[::-1]
    write_palette(tmp_path / "mask.tif", labels, colours)
    table = make_table(NAMES, False, (255,))
    whole = table.read(str(tmp_path / "mask.tif")).numpy()
    assert np.array_equal(whole, labels if unnamed else 2 - labels)
    file = open_regions(str(tmp_path / "mask.tif"))
    for top, left, height, width in WINDOWS:
        part = table.read_window(file, (top, left, height, width))
        assert np.array_equal(part, whole[top : top + height, left : left + width])


@pytest.mark.parametrize(
    "kind", ["png", "jpeg", "bits", "white is zero", "alpha", "pages", "float", "corrupt", "one strip"]
)
def test_what_is_decoded_as_a_whole(tmp_path, kind, monkeypatch):
    """Where windows of it could have other values than Pillow gives, or the format has no parts."""
    path = tmp_path / ("mask.png" if kind == "png" else "mask.tif")
    if kind == "png":
        Image.fromarray(LABELS).save(path)
    elif kind == "jpeg":
        tifffile.imwrite(path, LABELS, photometric="minisblack", tile=(TILE, TILE), compression="jpeg")
    elif kind == "bits":
        tifffile.imwrite(path, LABELS > 0, photometric="minisblack", tile=(TILE, TILE))
    elif kind == "white is zero":
        tifffile.imwrite(path, LABELS, photometric="miniswhite", **DEFLATE)
    elif kind == "alpha":
        both = np.stack([LABELS, np.full_like(LABELS, 255)], -1)
        tifffile.imwrite(path, both, photometric="minisblack", extrasamples=["unassalpha"], **DEFLATE)
    elif kind == "pages":
        tifffile.imwrite(path, np.stack([LABELS, LABELS]), photometric="minisblack", **DEFLATE)
    elif kind == "float":
        tifffile.imwrite(path, LABELS.astype(np.float32), photometric="minisblack", **DEFLATE)
    elif kind == "one strip":
        monkeypatch.setattr(itpn.data.formats.tiff, "CHUNK", HEIGHT * WIDTH - 1)
        tifffile.imwrite(path, LABELS, photometric="minisblack", rowsperstrip=HEIGHT, compression="deflate")
    else:
        path.write_bytes(b"II*\0" + bytes(50))
    assert open_regions(str(path)) is None
    if kind in ("png", "alpha", "pages", "one strip"):
        file, table = open_mask(str(path), 10**6), make_table(NAMES, False, (255,))
        for top, left, height, width in WINDOWS:
            part = table.read_window(file, (top, left, height, width))
            assert np.array_equal(part, LABELS[top : top + height, left : left + width])


@pytest.mark.parametrize("kind", ["uint8", "uint16", "palette", "colours", "three equal channels", "strips"])
@pytest.mark.parametrize("names", [NAMES, PLAIN_NAMES])
def test_a_large_mask_is_checked_part_by_part(tmp_path, kind, names, monkeypatch):
    """With the content that checking it as a whole finds; it is never decoded as a whole."""
    path, table = tmp_path / "mask.tif", make_table(names, False, (255,))
    write_mask(path, kind)
    rules = MaskRules()

    def scan():
        try:
            return scan_mask(str(path), rules, table)
        except UnreadableImage as error:
            return str(error)

    whole = scan()
    monkeypatch.setattr(itpn.data.mask_files, "BLOCK", 1000)
    monkeypatch.setattr(itpn.data.mask_files, "ROWS", 7)
    monkeypatch.setattr(itpn.data.mask_files, "load_image", pytest.fail)
    assert scan() == whole


def write_scene(root: Path, name: str, suffix: str = ".tif") -> None:
    """An image whose pixels tell where they are, and its mask."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(exist_ok=True)
    rows, cols = np.mgrid[:HEIGHT, :WIDTH]
    places = np.stack([rows, cols, 0 * rows], -1).astype(np.uint8)
    tifffile.imwrite(root / "images" / f"{name}.tif", places, photometric="rgb", **DEFLATE)
    if suffix == ".tif":
        tifffile.imwrite(root / "masks" / f"{name}.tif", LABELS, photometric="minisblack", **DEFLATE)
    else:
        Image.fromarray(LABELS).save(root / "masks" / f"{name}{suffix}")


def read_views(root: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Image and labels of all windows, in the order of their files."""
    maps, _ = find_label_maps(str(root), rules=MaskRules(log=lambda line: None))
    windows, _ = cut_windows(maps.files, 48, 0, PLAIN)
    maps = maps.cut(windows)
    still = {"scales": (1, 1), "max_fraction": 1, "hflip": 0, "photometric": False}
    transform = SegmentationTransform(maps.table, 48, 48, **still)
    views = []
    for index in range(len(maps)):
        _, data, mask = maps[index]
        view = transform(open_sample(data, PLAIN), random.Random(0), mask)
        views.append((view["image"].numpy(), view["target"].numpy()))
    return views


def test_a_window_of_a_tiled_mask_decodes_its_tiles_alone(tmp_path, monkeypatch):
    for name in "ab":
        write_scene(tmp_path, name)
    decoded: list[str] = []
    read_chunks = itpn.data.formats.tiff.read_chunks

    def count(file, page, numbers):
        for chunk in read_chunks(file, page, numbers):
            decoded.append(Path(file.filehandle.path).parent.name)
            yield chunk

    monkeypatch.setattr(itpn.data.formats.tiff, "read_chunks", count)
    real = DecodedMask.__init__

    def decode(self, path, max_pixels, parts=False):
        assert not parts, "a window decodes a whole mask"
        real(self, path, max_pixels, parts)  # the checks

    monkeypatch.setattr(DecodedMask, "__init__", decode)
    views = read_views(tmp_path)
    assert len(views) == 2 * 4 * 5
    assert decoded.count("masks") <= 9 * len(views)  # of 35
    for image, target in views:
        assert np.array_equal(target, LABELS[image[0], image[1]])


def test_a_mask_of_another_format_stays_decoded(tmp_path, monkeypatch):
    """Windows of one image, one after the other, decode its mask once."""
    for name in "ab":
        write_scene(tmp_path, name, ".png")
    decoded: list[str] = []
    real = DecodedMask.__init__

    def decode(self, path, max_pixels, parts=False):
        decoded.append(Path(path).name if parts else "checked")
        real(self, path, max_pixels, parts)

    monkeypatch.setattr(DecodedMask, "__init__", decode)
    for image, target in read_views(tmp_path):
        assert np.array_equal(target, LABELS[image[0], image[1]])
    assert decoded == ["checked", "checked", "a.png", "b.png"]


def test_a_mask_that_has_changed_is_read_again(tmp_path):
    table = make_table(PLAIN_NAMES, False, (255,))
    for suffix in (".png", ".tif"):
        path = tmp_path / f"mask{suffix}"
        for value in (1, 2):
            Image.fromarray(np.full((20, 20 + value), value, np.uint8)).save(path)  # of another size
            assert set(table.read_window(open_mask(str(path), 10**6), (5, 5, 4, 4)).unique().tolist()) == {value}


def settings(root: Path, **data) -> SegmentationConfig:
    return SegmentationConfig(data=SegmentationDataConfig(root=str(root), **{"num_workers": 0, **data}))


def test_masks_above_the_limit_are_for_windows(tmp_path, capsys, monkeypatch):
    """Those that are read in parts have none; others may have four times as many pixels, a byte each."""
    for name, suffix in {"a": ".tif", "b": ".png"}.items():
        write_scene(tmp_path, name, suffix)
    limit = HEIGHT * WIDTH // 4 + 1
    monkeypatch.setattr(itpn.data.mask_files, "BLOCK", 1000)
    with pytest.raises(
        UserError, match=rf"masks that cannot be read: 2 \(.*210x150 pixels, more than the {limit} allowed"
    ):
        find_data(settings(tmp_path, max_pixels=limit))
    windows = {"window_size": 48, "window_overlap": 0}
    data = find_data(settings(tmp_path, max_pixels=limit, **windows))
    assert len(data.train) == 2 * 20
    (note,) = [note for note in data.notes if note.startswith("1 mask")]
    assert note.startswith(
        "1 mask of a large image is decoded as a whole, and kept for its next windows; the first is "
    )
    assert "masks/b.png: convert it, as by gdal_translate" in note
    data = find_data(settings(tmp_path, max_pixels=limit - 2, **windows))
    assert len(data.train) == 20
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "b.png: 210x150 pixels, more than 4 times --data.max-pixels 7874, and it cannot be read in parts: convert"
        in said
    )


def test_ignored_and_unknown_labels_of_windows(tmp_path):
    labels = LABELS.copy()
    labels[:40, :40], labels[60:, 60:] = 255, 7
    tifffile.imwrite(tmp_path / "mask.tif", labels, photometric="minisblack", **DEFLATE)
    file, table = open_regions(str(tmp_path / "mask.tif")), make_table(PLAIN_NAMES, False, (255,))
    assert table.read_window(file, (0, 0, 20, 20)).eq(IGNORED).all()
    with pytest.raises(UnreadableImage, match="label 7, which no class has"):
        table.read_window(file, (55, 55, 20, 20))
