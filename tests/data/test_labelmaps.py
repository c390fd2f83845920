"""Images with masks: layouts, encodings, invalid masks, image and mask through every augmentation."""

import errno
import os
import random
import re
import shutil
import struct
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stored_pixels import make_pixels

from itpn.data.class_names import read_names
from itpn.data.decode import UnreadableImage, decode_image
from itpn.data.image_type import PHOTOGRAPHS, Pixels
from itpn.data.invalid import InvalidAnnotations
from itpn.data.labelmaps import find_label_maps
from itpn.data.loader import TrainingLoader
from itpn.data.mask_checks import MaskRules, match_masks
from itpn.data.masks import IGNORED, make_table, name_labels
from itpn.data.scenes import CLASSES, GROUNDS
from itpn.data.segmentation_transform import SegmentationTransform
from itpn.data.shapes import write_shapes
from itpn.data.walk import list_images
from itpn.errors import MachineError, UserError

NAMES = (*GROUNDS, *CLASSES)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The sample set: 12 images to train on and 6 others."""
    return write_shapes(tmp_path_factory.mktemp("shapes"), train=12, val=6, img_size=(64, 80)).ade20k


@pytest.fixture
def root(shapes, tmp_path):
    """A copy of the sample set that tests may change."""
    return Path(shutil.copytree(shapes, tmp_path / "ade20k"))


RULES = ("classes", "reduce_zero_label", "ignore", "on_invalid", "log")


def find(root, **options):
    rules = {name: options.pop(name) for name in RULES if name in options}
    rules = MaskRules(**{"reduce_zero_label": True, "log": pytest.fail, **rules})
    return find_label_maps(str(root), rules=rules, **options)


def write_pair(folder: Path, name: str, mask: Image.Image, size: tuple[int, int] = (6, 4)) -> None:
    """An image and a mask in ``images`` and ``masks``."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "grey").save(folder / "images" / f"{name}.jpg")
    mask.save(folder / "masks" / f"{name}.png")


def labels_of(images, index: int = 0) -> np.ndarray:
    return images.table.read(images[index][2]).numpy()


# --- layouts


def test_ade20k(shapes):
    train, val = find(shapes)
    assert (len(train), len(val)) == (12, 6)
    assert train.classes == val.classes == NAMES
    for index in range(12):
        name, data, mask = train[index]
        raw = np.asarray(Image.open(mask))
        assert Path(mask).stem == Path(name).stem
        assert data == Path(name).read_bytes()
        assert np.array_equal(labels_of(train, index), np.where(raw == 0, IGNORED, raw.astype(int) - 1))
    assert any((np.asarray(Image.open(train[i][2])) == 0).any() for i in range(12))


def test_other_layouts(shapes, tmp_path):
    """A folder for each set, two folders of pairs, images and masks alone."""
    sets = tmp_path / "sets"
    for split, word in (("training", "train"), ("validation", "val")):
        shutil.copytree(shapes / "images" / split, sets / word / "images")
        shutil.copytree(shapes / "annotations" / split, sets / word / "labels")
    shutil.copy(shapes / "classes.txt", sets)
    train, val = find(sets)
    assert (len(train), len(val), train.classes) == (12, 6, NAMES)
    pair = {"masks": str(sets / "train" / "labels"), "classes": str(sets / "classes.txt")}
    train, val = find(sets / "train" / "images", **pair)
    assert (len(train), val) == (12, None)
    other = {"val_root": str(sets / "val" / "images"), "val_masks": str(sets / "val" / "labels")}
    train, val = find(sets / "train" / "images", **pair, **other)
    assert (len(train), len(val)) == (12, 6)
    shutil.copy(shapes / "classes.txt", sets / "train")
    train, val = find(sets / "train", val_fraction=0.25, seed=3)
    assert (len(train), len(val)) == (9, 3)
    assert not {train.name(i) for i in range(9)} & {val.name(i) for i in range(3)}
    again = find(sets / "train", val_fraction=0.25, seed=3)[1]
    assert [again.name(i) for i in range(3)] == [val.name(i) for i in range(3)]


def test_names_of_sets_in_other_spellings(shapes, tmp_path):
    for split, word in (("training", "Train"), ("validation", "val2017")):
        shutil.copytree(shapes / "images" / split, tmp_path / "a" / "images" / word)
        shutil.copytree(shapes / "annotations" / split, tmp_path / "a" / "masks" / word)
        shutil.copytree(shapes / "images" / split, tmp_path / "b" / word / "images")
        shutil.copytree(shapes / "annotations" / split, tmp_path / "b" / word / "masks")
    for name in "ab":
        (tmp_path / name / "classes.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*NAMES, "", ""]).encode())
        train, val = find(tmp_path / name)
        assert (len(train), len(val), train.classes) == (12, 6, NAMES)


def test_a_file_of_names_in_latin_1(root):
    (root / "classes.txt").write_bytes("café\nb\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"classes\.txt is not text in UTF-8 \(byte 0xe9 in line 1\)"):
        find(root)


@pytest.mark.parametrize("ending", ["_mask", "_L", "_labels"])
def test_names_of_masks(shapes, tmp_path, ending):
    root = Path(shutil.copytree(shapes, tmp_path / "ade20k"))
    for path in list((root / "annotations" / "training").iterdir()):
        path.rename(path.with_stem(path.stem + ending))
    assert len(find(root)[0]) == 12


# --- encodings


def test_masks_in_every_encoding(tmp_path):
    """Numbers with a palette, of 16 bits, in three equal channels, black and white; colours."""
    numbers = np.array([[0, 1, 2, 2, 1, 0]] * 4, dtype=np.uint8)
    palette = Image.fromarray(numbers, mode="P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    masks = {
        "palette": palette,
        "grey": Image.fromarray(numbers),
        "wide": Image.fromarray(numbers.astype(np.uint16)),
        "three": Image.fromarray(np.repeat(numbers[..., None], 3, axis=2)),
    }
    for name, mask in masks.items():
        write_pair(tmp_path / name, name, mask)
        train, _ = find(tmp_path / name, reduce_zero_label=False)
        assert train.classes == ("0", "1", "2")
        assert np.array_equal(labels_of(train), numbers), name
    write_pair(tmp_path / "two", "two", Image.fromarray(numbers > 0))
    train, _ = find(tmp_path / "two", reduce_zero_label=False)
    assert train.classes == ("0", "1")
    assert np.array_equal(labels_of(train), numbers > 0)

    write_pair(tmp_path / "far", "far", Image.fromarray(np.where(numbers == 2, 65535, numbers.astype(np.uint16))))
    train, _ = find(tmp_path / "far", reduce_zero_label=False, ignore=(65535,))
    assert train.classes == ("0", "1")
    assert np.array_equal(labels_of(train), np.where(numbers == 2, IGNORED, numbers))

    colours = np.array([[128, 0, 0], [0, 128, 0], [0, 0, 0]], dtype=np.uint8)[numbers]
    write_pair(tmp_path / "rgb", "rgb", Image.fromarray(colours))
    write_pair(tmp_path / "rgb", "void", Image.new("RGB", (6, 4)))  # grey, but of a colour all the same
    adaptive = Image.fromarray(colours).quantize(3)  # whose numbers follow the colours, not the classes
    assert not np.array_equal(np.asarray(adaptive), numbers)
    write_pair(tmp_path / "rgb", "palette", adaptive)
    for text in (
        "road 128 0 0\ntree 0 128 0\nvoid 0 0 0\n",
        "128 0 0 road\n0 128 0 tree\n0 0 0 void\n",
        "\ufeffname,r,g,b\nroad,128,0,0\ntree,0,128,0\nvoid,0,0,0\n",
    ):
        (tmp_path / "rgb" / "classes.txt").write_text(text, encoding="utf-8")
        train, _ = find(tmp_path / "rgb", reduce_zero_label=False, ignore=(2, 255))
        assert train.classes == ("road", "tree")
        assert train.table.colours == ((128, 0, 0), (0, 128, 0))
        wanted = np.array([0, 1, IGNORED])[numbers]
        for index, name in enumerate(("palette", "rgb", "void")):
            assert Path(train.name(index)).stem == name
            assert np.array_equal(labels_of(train, index), np.full_like(wanted, IGNORED) if name == "void" else wanted)


def write_png(path: Path, head: bytes, rows: bytes, palette: bytes = b"") -> None:
    chunks = [(b"IHDR", head), (b"PLTE", palette), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
        if data or name == b"IEND"
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def write_bits(path: Path, numbers: np.ndarray, bits: int, palette: bytes = b"") -> None:
    """Numbers of 1, 2 or 4 bits in a PNG or TIFF, stored as they are; Pillow writes none."""
    height, width = numbers.shape
    digits = (numbers[..., None] >> np.arange(bits)[::-1] & 1).reshape(height, -1)
    rows = [row.tobytes() for row in np.packbits(digits, axis=1)]
    if path.suffix == ".png":
        head = struct.pack(">IIBBBBB", width, height, bits, 3 if palette else 0, 0, 0, 0)
        write_png(path, head, b"".join(b"\0" + row for row in rows), palette)
        return
    data = b"".join(rows)
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = 8 + len(data) + len(data) % 2
    ifd = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    path.write_bytes((struct.pack("<2sHI", b"II", 42, start) + data).ljust(start, b"\0") + ifd)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_numbers_of_few_bits_are_those_that_are_stored(tmp_path, bits, suffix):
    """Beside a mask of 8 bits, with names of classes and without, a palette or none."""
    numbers = np.arange(28).reshape(4, 7) % 2**bits
    write_pair(tmp_path, "a", Image.fromarray(numbers.astype(np.uint8)), (7, 4))
    write_pair(tmp_path, "b", Image.new("L", (7, 4)), (7, 4))
    (tmp_path / "masks" / "b.png").unlink()
    write_bits(tmp_path / "masks" / f"b{suffix}", numbers, bits)
    if suffix == ".png":
        write_pair(tmp_path, "c", Image.new("L", (7, 4)), (7, 4))
        write_bits(tmp_path / "masks" / "c.png", numbers, bits, bytes(range(3 * 2**bits)))
    for names in (map(str, range(2**bits)), (f"class{i} 0 {i} {9 * (i > 0)}" for i in range(2**bits))):
        train, _ = find(tmp_path, reduce_zero_label=False)
        assert len(train.classes) == 2**bits
        assert len(train) == 2 + (suffix == ".png")
        for index in range(len(train)):
            assert np.array_equal(labels_of(train, index), numbers)
        (tmp_path / "classes.txt").write_text("\n".join(names))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_shades_of_few_bits_may_be_colours(tmp_path, bits):
    """Programs that shrink PNGs make fewer bits of 8; the file of classes says which shades they are."""
    shades = [255 * i // (2**bits - 1) for i in range(2**bits)]
    numbers = np.arange(28).reshape(4, 7) % 2**bits
    write_pair(tmp_path, "a", Image.fromarray(np.array(shades, dtype=np.uint8)[numbers]), (7, 4))
    write_pair(tmp_path, "b", Image.new("L", (7, 4)), (7, 4))
    write_bits(tmp_path / "masks" / "b.png", numbers, bits)
    write_pair(tmp_path, "c", Image.new("L", (7, 4)), (7, 4))
    write_bits(tmp_path / "masks" / "c.png", 0 * numbers, bits)
    (tmp_path / "classes.txt").write_text("".join(f"class{i} {i} {i} {i}\n" for i in reversed(shades)))
    train, _ = find(tmp_path, reduce_zero_label=False)
    for index, wanted in enumerate((numbers, numbers, 0 * numbers)):
        assert np.array_equal(labels_of(train, index), 2**bits - 1 - wanted)


def palette_of(numbers: np.ndarray, palette: list[int]) -> Image.Image:
    mask = Image.fromarray(numbers.astype(np.uint8), mode="P")
    mask.putpalette(palette)
    return mask


@pytest.mark.parametrize("filling", [[9, 9, 9] * 252 + [224, 224, 192], [0, 0, 0] * 253], ids=["grey", "black"])
@pytest.mark.parametrize(("order", "wanted"), [("bg red green", (0, 1, 2)), ("red green bg", (2, 0, 1))])
def test_a_palette_with_and_without_void(tmp_path, filling, order, wanted):
    """Both masks are read by colour, in whatever order the classes are; the label that is ignored has none."""
    whole = np.array([[0, 1, 2, 2, 1, 0]] * 4)
    colours = {"bg": "0 0 0", "red": "255 0 0", "green": "0 255 0"}
    for name, numbers in (("a", whole), ("b", np.where(whole == 2, 255, whole)), ("c", np.full_like(whole, 255))):
        write_pair(tmp_path, name, palette_of(numbers, [0, 0, 0, 255, 0, 0, 0, 255, 0, *filling]))
    (tmp_path / "classes.txt").write_text("".join(f"{name} {colours[name]}\n" for name in order.split()))
    logged: list[str] = []
    train, _ = find(tmp_path, reduce_zero_label=False, log=logged.append)
    assert logged == [f"{tmp_path}/masks: pixels of label 255 are ignored (--data.ignore)"]
    assert np.array_equal(labels_of(train, 0), np.array(wanted)[whole])
    assert np.array_equal(labels_of(train, 1), np.array([*wanted[:2], IGNORED])[whole])
    assert (labels_of(train, 2) == IGNORED).all()
    renamed = train.rename(("green", "bg", "red"))
    assert np.array_equal(labels_of(renamed, 1), np.array([1, 2, IGNORED])[whole])


def test_a_palette_of_two_minds(tmp_path):
    """Some colours are classes', others not: numbers, if those mean the same; or else nobody knows."""
    numbers = np.array([[0, 1, 3, 3, 1, 0]] * 4)
    write_pair(tmp_path, "a", palette_of(numbers % 3, [0, 0, 0, 255, 0, 0]))
    write_pair(tmp_path, "b", palette_of(numbers, [0, 0, 0, 255, 0, 0, 0, 255, 0, 9, 9, 9]))
    (tmp_path / "classes.txt").write_text("bg 0 0 0\nred 255 0 0\ngreen 0 255 0\nblue 0 0 255\n")
    train, _ = find(tmp_path, reduce_zero_label=False, on_invalid="skip", log=lambda line: None)
    assert np.array_equal(labels_of(train, 1), numbers)
    (tmp_path / "classes.txt").write_text("red 255 0 0\ngreen 0 255 0\nblue 0 0 255\nbg 0 0 0\n")
    logged: list[str] = []
    train, _ = find(tmp_path, reduce_zero_label=False, log=logged.append)
    assert [Path(train.name(i)).stem for i in range(len(train))] == ["a"]
    assert np.array_equal(labels_of(train), np.array([3, 0])[numbers % 3])
    assert any(
        "masks that cannot be read: 1 (" in line and "b.png: colour (9, 9, 9) of label 3, which" in line
        for line in logged
    )


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_masks_with_alpha(tmp_path, suffix):
    """An opaque one is as good as none; what is transparent is refused."""
    numbers = np.array([[0, 1, 2, 2, 1, 0]] * 4, dtype=np.uint8)
    opaque = np.full_like(numbers, 255)
    clear = opaque.copy()
    clear[0, 0] = 254
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], dtype=np.uint8)[numbers]
    for mode, channels in (("LA", [numbers]), ("RGBA", list(np.moveaxis(colours, -1, 0)))):
        root = tmp_path / mode
        for name, alpha in (("a", opaque), ("b", clear)):
            write_pair(root, name, Image.new("L", (6, 4)))
            (root / "masks" / f"{name}.png").unlink()
            Image.fromarray(np.stack([*channels, alpha], axis=-1), mode=mode).save(root / "masks" / f"{name}{suffix}")
        if mode == "RGBA":
            (root / "classes.txt").write_text("bg 0 0 0\nred 255 0 0\ngreen 0 255 0\n")
        logged: list[str] = []
        train, _ = find(root, reduce_zero_label=False, log=logged.append)
        assert [Path(train.name(i)).stem for i in range(len(train))] == ["a"]
        assert np.array_equal(labels_of(train), numbers)
        assert f"b{suffix}: an image of mode {mode}, not a mask of labels: save it without alpha)" in logged[1]


def test_16_bits_with_alpha_are_refused(tmp_path):
    """Pillow reads half of them: label 1 would be 0."""
    write_pair(tmp_path, "a", Image.new("L", (6, 4)))
    rows = b"".join(b"\0" + struct.pack(">12H", *[1, 65535] * 6) for _ in range(4))
    write_png(tmp_path / "masks" / "a.png", struct.pack(">IIBBBBB", 6, 4, 16, 4, 0, 0, 0), rows)
    with pytest.raises(UserError, match="not a mask of labels: save it without alpha"):
        find(tmp_path, reduce_zero_label=False, log=lambda line: None)


@pytest.mark.parametrize(
    ("text", "first"),
    [(None, 0), ("back\nfront\n", 0), ("back 0 0 0\nfront 255 255 255\n", 0), ("front 255 255 255\nback 0 0 0\n", 1)],
)
def test_black_and_white(tmp_path, text, first):
    """Masks of 0 and 255, which is otherwise of no class; some are all black."""
    black = np.zeros((4, 6), dtype=np.uint8)
    mixed = black.copy()
    mixed[:, 4:] = 255
    write_pair(tmp_path, "a", Image.fromarray(black))
    write_pair(tmp_path, "b", Image.fromarray(mixed))
    if text:
        (tmp_path / "classes.txt").write_text(text)
    logged: list[str] = []
    train, _ = find(tmp_path, reduce_zero_label=False, log=logged.append)
    assert len(train.classes) == 2
    assert (labels_of(train, 0) == first).all()
    assert np.array_equal(labels_of(train, 1), np.where(mixed == 255, 1 - first, first))
    assert len(logged) == (not text or "255" not in text)
    assert all("black and white" in line for line in logged)


def test_images_and_masks_in_one_folder(tmp_path):
    for name in "ab":
        Image.new("RGB", (6, 4)).save(tmp_path / f"{name}.png")
        Image.fromarray(np.eye(4, 6, dtype=np.uint8)).save(tmp_path / f"{name}_mask.png")
    train, _ = find(tmp_path, masks=str(tmp_path), reduce_zero_label=False)
    pairs = [(Path(train.name(i)).name, Path(train[i][2]).name) for i in range(len(train))]
    assert pairs == [("a.png", "a_mask.png"), ("b.png", "b_mask.png")]
    for name in "ab":  # a photograph and what has been drawn of it, of the same name
        (tmp_path / f"{name}.png").unlink()
        Image.new("RGB", (6, 4)).save(tmp_path / f"{name}.jpg")
        (tmp_path / f"{name}_mask.png").rename(tmp_path / f"{name}.png")
    train, _ = find(tmp_path, masks=str(tmp_path), reduce_zero_label=False)
    pairs = [(Path(train.name(i)).name, Path(train[i][2]).name) for i in range(len(train))]
    assert pairs == [("a.jpg", "a.png"), ("b.jpg", "b.png")]


@pytest.mark.parametrize(
    ("image", "masks"),
    [
        ("a.png", "a.png a.bmp"),
        ("a.tif", "a.TIF a.png a.bmp"),
        ("a.jpg", "a.png a.bmp a.jpg"),
        ("a.jpg", "a.gif a.jpg"),
    ],
)
def test_two_masks_of_one_name(tmp_path, image, masks):
    """The first is taken: of the image's suffix, or a PNG, and a JPEG last; the others are named."""
    write_pair(tmp_path, "b", Image.fromarray(np.eye(4, 6, dtype=np.uint8)))
    Image.new("RGB", (6, 4)).save(tmp_path / "images" / image)
    right, *wrong = (tmp_path / "masks" / name for name in masks.split())
    Image.fromarray(np.eye(4, 6, dtype=np.uint8)).save(right)
    for path in wrong:
        Image.new("L", (6, 4), 7).save(path)
    logged: list[str] = []
    train, _ = find(tmp_path, reduce_zero_label=False, log=logged.append)
    assert [train[index][2] for index in range(2)] == [str(right), str(tmp_path / "masks" / "b.png")]
    path = tmp_path / "images" / image
    named = ", ".join(f"{path}: {right} is read, {other} is not" for other in wrong)
    assert logged[1:] == [f"  images with two masks: {len(wrong)} ({named})"]
    with pytest.raises(UserError, match="images with two masks: "):
        find(tmp_path, reduce_zero_label=False, on_invalid="error")


def test_what_the_labels_mean_is_said(tmp_path):
    """Where it may not be what was meant."""
    logged: list[str] = []
    write_pair(tmp_path, "a", Image.fromarray(np.eye(4, 6, dtype=np.uint8) * 2))
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert find(tmp_path, log=logged.append)[0].classes == ("a", "b", "c")
    assert logged == [f"{tmp_path / 'masks'}: no mask has 'a', 'c'; label 0 is ignored (--data.reduce-zero-label)"]
    write_pair(tmp_path, "a", Image.fromarray(np.eye(4, 6, dtype=np.uint8) * 255))
    logged.clear()
    find(tmp_path, reduce_zero_label=False, log=logged.append)
    assert "masks of 0 and 255, but not of two classes: 255 is ignored" in logged[0]
    (tmp_path / "classes.txt").unlink()
    write_pair(tmp_path, "a", Image.fromarray(np.eye(4, 6, dtype=np.uint16) * 600))
    with pytest.raises(UserError, match=r"label 600 in .*a.png: labels end at 254"):
        find(tmp_path, reduce_zero_label=False)


def test_an_image_that_is_turned(tmp_path):
    write_pair(tmp_path, "a", Image.fromarray(np.eye(4, 6, dtype=np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "images" / "a.jpg", exif=exif)
    swapped = r"a\.png: 6x4, the image 4x6: height and width are swapped"
    with pytest.raises(UserError, match=rf"{swapped}, because EXIF rotates the image \(orientation 6\)"):
        find(tmp_path, reduce_zero_label=False)
    exif[0x0112] = 3
    Image.new("RGB", (4, 6)).save(tmp_path / "images" / "a.jpg", exif=exif)
    with pytest.raises(UserError, match=rf"{swapped}\)$"):
        find(tmp_path, reduce_zero_label=False)
    Image.new("RGB", (4, 7)).save(tmp_path / "images" / "a.jpg")
    with pytest.raises(UserError, match=r"a\.png: 6x4, the image 4x7\)$"):
        find(tmp_path, reduce_zero_label=False)


def test_names_of_labels_come_back():
    names = [(name, (9 * i, 0, 0)) for i, name in enumerate("abcde")]
    for reduce_zero_label, ignore in ((False, (255,)), (False, (0, 2, 255)), (True, (1, 3))):
        table = make_table(names, reduce_zero_label, ignore)
        again = name_labels(table.classes, table.colours, reduce_zero_label, ignore)
        other = make_table(again, reduce_zero_label, ignore)
        assert other.classes == table.classes
        first = int(reduce_zero_label)
        assert (other.indices[: first + 5] == table.indices[: first + 5]).all()
        assert other.colours == table.colours


def test_classes_that_no_mask_has(tmp_path):
    write_pair(tmp_path, "a", Image.fromarray(np.eye(4, 6, dtype=np.uint8)))
    (tmp_path / "classes.txt").write_text("road\ntree\nsky\n")
    logged: list[str] = []
    assert find(tmp_path, reduce_zero_label=False, log=logged.append)[0].classes == ("road", "tree", "sky")
    assert logged == [f"{tmp_path / 'masks'}: no mask has 'sky'"]
    write_pair(tmp_path, "a", Image.new("L", (6, 4), 255))
    with pytest.raises(UserError, match=r"no mask in .* has a pixel of a class"):
        find(tmp_path, reduce_zero_label=False)


def test_a_single_image_is_not_held_out(tmp_path):
    write_pair(tmp_path, "a", Image.fromarray(np.eye(4, 6, dtype=np.uint8)))
    train, val = find(tmp_path, reduce_zero_label=False, val_fraction=0.5)
    assert (len(train), val) == (1, None)


def test_labels_of_no_class_leave_gaps():
    names = [(name, None) for name in "abcd"]
    table = make_table(names, False, (1, 255))
    assert table.classes == ("a", "c", "d")
    assert table.indices[[0, 1, 2, 3, 4, 255]].tolist() == [0, IGNORED, 1, 2, 254, IGNORED]
    table = make_table(names, True, (255,))
    assert table.indices[[0, 1, 4, 5]].tolist() == [IGNORED, 0, 3, 254]


def test_classes_by_name():
    """A model's order of classes."""
    table = make_table([(name, (9 * i, 0, 0)) for i, name in enumerate("abc")], False, (255,))
    other = table.rename(("c", "x", "a", "b"))
    assert other.indices[[0, 1, 2, 3, 255]].tolist() == [2, 3, 0, 254, IGNORED]
    assert other.by_colour == {(0, 0, 0): 2, (9, 0, 0): 3, (18, 0, 0): 0}
    with pytest.raises(UserError, match="'b' among the classes of the masks, but not of the model"):
        table.rename(("c", "x", "a"))


def test_files_of_names(tmp_path):
    file = tmp_path / "objectInfo150.txt"
    file.write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t2\t3\t1\twall\n2\t0.1\t2\t3\t1\tbuilding, edifice\n")
    assert read_names(None, str(tmp_path)) == [("wall", None), ("building", None)]
    (tmp_path / "x.txt").write_text("traffic light 1 2 3\nroad 4 5 6\n")
    assert read_names(str(tmp_path / "x.txt"), "") == [("traffic light", (1, 2, 3)), ("road", (4, 5, 6))]
    for text, words in {
        "a\na\n": "two classes of the name a",
        "a 1 2 3\nb 1 2 3\n": r"two classes of the colour \(1, 2, 3\)",
        "a 1 2 3\nb\n": "colours for some of the classes",
        "\n": "is empty",
    }.items():
        (tmp_path / "x.txt").write_text(text)
        with pytest.raises(UserError, match=words):
            read_names(str(tmp_path / "x.txt"), "")


# --- invalid annotations


def mask_of(root: Path, number: int = 0) -> Path:
    return sorted((root / "annotations" / "training").iterdir())[number]


INVALID = {
    "images without a mask": lambda root: mask_of(root).unlink(),
    "masks without an image": lambda root: sorted((root / "images" / "training").iterdir())[0].unlink(),
    "masks of labels that are neither classes (--data.classes) nor ignored (--data.ignore)": lambda root: Image.new(
        "L", (80, 64), 77
    ).save(mask_of(root)),
    "masks of another size than their image": lambda root: Image.new("L", (64, 80), 1).save(mask_of(root)),
    "masks that cannot be read": lambda root: mask_of(root).write_bytes(b"no image"),
    "masks that cannot be read: 1 (.*colours": lambda root: Image.new("RGB", (80, 64), "red").save(mask_of(root)),
    "masks that cannot be read: 1 (.*mode RGBA": lambda root: Image.new("RGBA", (80, 64)).save(mask_of(root)),
    "images that cannot be read": lambda root: sorted((root / "images" / "training").iterdir())[0].write_bytes(b""),
}


@pytest.mark.parametrize("kind", INVALID)
def test_each_invalid_annotation_is_found_named_and_left_out(root, kind):
    INVALID[kind](root)
    pattern = kind.replace("(", r"\(") if ".*" in kind else f"{re.escape(kind)}: 1 "
    logged: list[str] = []
    train, val = find(root, log=logged.append)
    assert any(re.search(pattern, line) for line in logged), logged
    assert (len(train), len(val)) == (11, 6)
    with pytest.raises(UserError, match=pattern) as error:
        find(root, on_invalid="error")
    assert "\n" not in str(error.value)
    logged = []
    find(root, on_invalid="skip", log=logged.append)
    assert len(logged) == 1
    assert "left out (--data.invalid-annotations summary shows" in logged[0]


def test_what_is_not_read_is_counted_by_suffix(root):
    """In both folders of a set; what is read as a file of classes is none of it."""
    images, masks = root / "images" / "training", root / "annotations" / "training"
    for name in ("a.fff", "b.fff", "Thumbs.db", "classes.csv", ".hidden", "x/c.ARW", "s.tar"):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).touch()
    for name in ("a.json", "b.json", "notes"):
        (masks / name).touch()
    logged: list[str] = []
    train, _ = find(root, log=logged.append, on_invalid="error")
    assert len(train) == 12
    assert logged == [
        f"{masks}: not read: 2 .fff, 1 .arw, 1 .db, 1 .tar in {images}",
        f"{masks}: not read: 2 .json, 1 without a suffix in {masks}",
    ]
    for path in [*images.iterdir(), *masks.iterdir()]:
        path.rename(path.with_suffix(".fff")) if path.is_file() else None
    with pytest.raises(
        UserError,
        match=rf"{images} has no images that can be used: not read: 17 \.fff, 1 \.arw in {images}; not read",
    ):
        find(root)


def test_what_is_not_read_of_images_and_masks_in_one_folder(tmp_path):
    write_pair(tmp_path, "a", Image.new("L", (6, 4), 1))
    for path in [*(tmp_path / "images").iterdir(), *(tmp_path / "masks").iterdir()]:
        path.rename(tmp_path / path.name)
    (tmp_path / "names.txt").write_text("x\ny\n")
    (tmp_path / "Thumbs.db").touch()
    logged: list[str] = []
    options = {"masks": str(tmp_path), "reduce_zero_label": False, "on_invalid": "skip"}
    find(tmp_path, **options, classes=str(tmp_path / "names.txt"), log=logged.append)
    assert logged == [f"{tmp_path}: not read: 1 .db in {tmp_path}"]


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".jfif", ".pjp"])
def test_photographs_are_no_masks_of_others_in_their_folder(tmp_path, suffix):
    write_pair(tmp_path, "a", Image.new("L", (6, 4), 1))
    for path in [*(tmp_path / "images").iterdir(), *(tmp_path / "masks").iterdir()]:
        path.rename(tmp_path / (path.name if path.suffix == ".png" else f"{path.stem}{suffix}"))
    for name in ("b", "b_mask"):
        Image.new("RGB", (6, 4)).save(tmp_path / f"{name}{suffix}", "JPEG")
    found = match_masks(
        list_images(str(tmp_path), Counter()), str(tmp_path), str(tmp_path), invalid := InvalidAnnotations()
    )
    assert found == {str(tmp_path / f"a{suffix}"): str(tmp_path / "a.png")}
    assert dict(invalid.counts) == {"images without a mask": 2}


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (Image.new("RGB", (6, 4), "red"), "colours: --data.classes needs a file"),
        (Image.new("RGBA", (6, 4)), "mode RGBA"),
        (None, "images without a mask: 1"),
    ],
)
def test_invalid_masks_without_class_names(tmp_path, mask, words):
    write_pair(tmp_path, "a", mask or Image.new("L", (6, 4)))
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances.json").write_text("{}")  # masks are in the other folder
    if mask is None:
        (tmp_path / "masks" / "a.png").rename(tmp_path / "masks" / "b.png")
    with pytest.raises(UserError, match=words):
        find(tmp_path, reduce_zero_label=False, log=lambda line: None)


def test_what_is_no_set(root, tmp_path):
    for folder, words in {
        tmp_path / "nowhere": "does not exist",
        tmp_path: "no images with masks to train on",
    }.items():
        with pytest.raises(UserError, match=words):
            find(folder)
    with pytest.raises(UserError, match="is not a folder of masks"):
        find(root, masks=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no images with masks to evaluate on"):
        find(root, val_root=str(tmp_path))
    (root / "classes.txt").write_text("all\n")
    with pytest.raises(UserError, match="1 classes of pixels: there must be from 2 to 254"):
        find(root)
    shutil.rmtree(root / "annotations" / "training")
    (root / "annotations" / "training").mkdir()
    (root / "classes.txt").write_text("\n".join(NAMES))
    (root / "annotations" / "training" / "x.png").touch()
    (root / "annotations" / "training" / "x.npy").touch()
    words = (
        r"has no images that can be used: images without a mask: 12 .*; masks without an image: 1 .*; not read: 1 \.npy"
    )
    with pytest.raises(UserError, match=words):
        find(root, log=lambda line: None)


# --- augmentation


def painted(labels: np.ndarray) -> torch.Tensor:
    """An image in which class n is of a colour of its own, uint8 [3, H, W]."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[: len(NAMES)] = [(25 * n, 255 - 25 * n, 60 * (n % 4)) for n in range(len(NAMES))]
    colours[IGNORED] = (7, 7, 7)
    return torch.from_numpy(colours[labels]).permute(2, 0, 1).contiguous()


@pytest.mark.parametrize(
    "options", [{"scales": (1.0, 1.0)}, {"scales": (0.5, 2.0)}, {"hflip": 1.0}, {"size": 160}, {"rotate90": True}]
)
def test_the_mask_goes_where_the_pixels_go(shapes, options):
    """The mask painted as an image, through the same transform: colours are still those of the classes."""
    train, _ = find(shapes)
    grey = Pixels(mean=(7 / 255,))  # of what is beside the image
    transform = SegmentationTransform(
        train.table, **{"size": 48, "short": 64, "photometric": False, "pixels": grey, **options}
    )
    for index in range(6):
        mask = train[index][2]
        pixels = painted(labels_of(train, index))
        for seed in range(3):
            view = transform(pixels, random.Random(seed), mask)
            image, target = view["image"], view["target"]
            assert image.shape == (3, transform.size, transform.size)
            assert target.shape == (transform.size, transform.size)
            assert (image.dtype, target.dtype) == (torch.uint8, torch.uint8)
            wanted = painted(target.numpy())
            same = (
                torch.nn.functional.max_pool2d(target[None].float(), 5, 1, 2)[0]
                == -torch.nn.functional.max_pool2d(-target[None].float(), 5, 1, 2)[0]
            )  # edges are blended
            assert same.float().mean() > 0.2
            assert ((image.int() - wanted.int()).abs().amax(dim=0)[same] <= 1).float().mean() > 0.99


@pytest.mark.parametrize("sizes", [(2000, 250), (960, 300), (300, 960)])
def test_an_edge_stays_where_it_is(tmp_path, sizes):
    """Image and mask do not move against each other when they are resized: by less than a fifth of a pixel."""
    side, short = sizes
    table = make_table([("a", None), ("b", None)], False, (255,))
    transform = SegmentationTransform(table, short, short, (1.0, 1.0), hflip=0.0, photometric=False)
    moved = []
    for edge in range(side // 2 - 12, side // 2 + 12):
        labels = np.zeros((side, side), dtype=np.uint8)
        labels[:, edge:] = 1
        Image.fromarray(labels).save(tmp_path / "mask.png", compress_level=1)
        view = transform(torch.from_numpy(255 * labels).expand(3, -1, -1), random.Random(0), str(tmp_path / "mask.png"))
        in_image = (1 - view["image"][0].float() / 255).sum(dim=1).mean()
        in_mask = (view["target"] == 0).float().sum(dim=1).mean()
        moved.append(in_mask - in_image)
    assert abs(sum(moved) / len(moved)) < 0.2


def test_what_is_beside_the_image_keeps_its_colour(shapes):
    train, _ = find(shapes)
    _, data, mask = train[0]
    transform = SegmentationTransform(
        train.table, 160, 64, scales=(1.0, 1.0), pixels=Pixels(mean=(1 / 255, 2 / 255, 3 / 255))
    )
    view = transform(decode_image(data), random.Random(0), mask)
    beside = view["image"][:, 100:]
    assert (beside == torch.tensor([1, 2, 3])[:, None, None]).all()
    assert (view["target"][100:] == IGNORED).all()


def test_turns_are_all_four(shapes):
    """An image that is smaller than the crop lies in its upper left, however it is turned."""
    train, _ = find(shapes)
    mask, labels = train[0][2], torch.from_numpy(labels_of(train, 0))
    pixels = painted(labels.numpy())
    options = {"scales": (1.0, 1.0), "hflip": 0.0, "photometric": False, "rotate90": True}
    transform = SegmentationTransform(train.table, 90, 64, **options)
    seen = set()
    for seed in range(20):
        view = transform(pixels, random.Random(seed), mask)
        turns = [
            quarters
            for quarters in range(4)
            if torch.equal(crop_of(view["target"], turned := torch.rot90(labels, quarters)), turned)
        ]
        assert len(turns) == 1
        wanted = torch.rot90(pixels, turns[0], (1, 2))
        assert torch.equal(crop_of(view["image"], wanted), wanted)
        assert (view["target"] == IGNORED).sum() == 90 * 90 - 64 * 80 + (labels == IGNORED).sum()
        seen.add(turns[0])
    assert seen == {0, 1, 2, 3}


def crop_of(view: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """As much from the upper left as ``part`` has."""
    return view[..., : part.shape[-2], : part.shape[-1]]


@pytest.mark.parametrize("options", [{}, {"rotate90": True, "size": 200}])
def test_images_of_any_channels_go_where_photographs_go(shapes, options):
    """Of seven bands with a corner without data: the target is that of a photograph with the same seed."""
    train, _ = find(shapes)
    bands = make_pixels(7, torch.uint16, (0,), (10_000,), tuple(range(1, 8)), nodata=9)
    mask, photograph = train[0][2], painted(labels_of(train, 0))
    image = 1000 + 100 * torch.arange(7)[:, None, None] + torch.arange(64 * 80).reshape(64, 80)
    image[:, :20, :20] = 9
    image = image.to(torch.uint16)
    settings = {"size": 48, "short": 64, "photometric": False, **options}
    for seed in range(10):
        ours, theirs = (
            SegmentationTransform(train.table, pixels=pixels, **settings)(one, random.Random(seed), mask)
            for one, pixels in ((image, bands), (photograph, PHOTOGRAPHS))
        )
        assert ours["image"].dtype == torch.uint16
        assert ours["image"].shape == (7, *theirs["image"].shape[1:])
        assert torch.equal(ours["target"], theirs["target"])
        values = ours["image"].to(torch.int32)
        assert (((values >= 1000) & (values < 7000)) | (values == 9) | (values < 8)).all()
    beside = SegmentationTransform(train.table, 160, 64, scales=(1.0, 1.0), photometric=False, pixels=bands)
    view = beside(image, random.Random(0), mask)["image"].to(torch.int32)
    assert (view[:, 100:] == torch.arange(1, 8)[:, None, None]).all()
    jittered = replace(beside, channel_jitter=0.4, channel_drop=0.3)(image, random.Random(0), mask)["image"]
    jittered = jittered.to(torch.int32)
    assert torch.equal(jittered == 9, view == 9)
    assert (jittered[:, 100:] == torch.arange(1, 8)[:, None, None]).all()
    assert not torch.equal(jittered, view)
    with pytest.raises(UserError, match=r"--data\.photometric is for RGB photographs, not for images of 7 channels"):
        replace(beside, photometric=True)


def test_channels_keep_their_places(shapes):
    """A red that is changed is still more red than green."""
    train, _ = find(shapes)
    red = torch.zeros(3, 64, 80, dtype=torch.uint8)
    red[0], red[1] = 200, 20
    transform = SegmentationTransform(train.table, 48, 64)
    views = [transform(red, random.Random(seed), train[0][2])["image"] for seed in range(40)]
    tops = {int(view[:, 0, 0].argmax()) for view in views}
    assert tops == {0}


def test_photometric_changes_colours_alone(shapes):
    train, _ = find(shapes)
    _, data, mask = train[0]
    image = decode_image(data)
    plain, changed = (
        SegmentationTransform(train.table, 48, 64, photometric=photometric) for photometric in (False, True)
    )
    state = torch.random.get_rng_state()
    views = [changed(image, random.Random(seed), mask) for seed in range(8)]
    assert torch.equal(torch.random.get_rng_state(), state)
    different = 0
    for seed, view in enumerate(views):
        other = plain(image, random.Random(seed), mask)
        assert torch.equal(view["target"], other["target"])
        different += not torch.equal(view["image"], other["image"])
        again = changed(image, random.Random(seed), mask)
        assert torch.equal(view["image"], again["image"])
    assert different >= 6


def test_crops_are_of_several_classes(tmp_path):
    """Nine tenths of the image are of one class: crops are drawn until less than three quarters are."""
    labels = np.zeros((100, 400), dtype=np.uint8)
    labels[:, 180:220] = 1
    Image.fromarray(labels).save(tmp_path / "mask.png")
    table = make_table([("a", None), ("b", None)], False, (255,))
    shares = {}
    for most in (0.75, 1.0):
        transform = SegmentationTransform(table, 100, 100, scales=(1.0, 1.0), max_fraction=most, photometric=False)
        views = [
            transform(torch.zeros(3, 100, 400, dtype=torch.uint8), random.Random(s), str(tmp_path / "mask.png"))
            for s in range(60)
        ]
        shares[most] = np.mean([(view["target"] == 0).float().mean() < 0.75 for view in views])
    assert shares[0.75] > 0.9 > shares[1.0] + 0.1


def test_a_mask_that_is_lost_while_training(root):
    train, _ = find(root)
    lost = Path(train[3][2])
    Image.new("L", (20, 10), 1).save(lost)
    transform = SegmentationTransform(train.table, 48, 64)
    loader = TrainingLoader(train, transform, batch_size=4, num_workers=0, seed=0)
    corrupt = [entry for batch in loader for entry in batch["corrupt"]]
    assert corrupt == [(train.name(3), f"80x64 pixels, and 20x10 in {lost}")]
    Image.new("L", (80, 64), 77).save(lost)
    with pytest.raises(UnreadableImage, match="label 77, which no class has"):
        train.table.read(str(lost))


@pytest.mark.parametrize("place", ["itpn.data.mask_checks.read_size", "itpn.data.readers.read_bounded"])
def test_masks_and_images_on_a_lost_disk_are_not_corrupt(root, monkeypatch, place):
    def refuse(path, *_, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr("itpn.data.readers.RETRY_AFTER", ())
    monkeypatch.setattr(place, refuse)
    kind = "images" if place.endswith("read_size") else "annotations"
    with pytest.raises(
        MachineError, match=rf"{root}/{kind}/training/.* cannot be read: Input/output error; look whether"
    ):
        find(root)


def test_names_with_quotes_and_digits_of_other_kinds(tmp_path):
    """Raised digits are digits to Python, and no numbers."""
    file = tmp_path / "x.csv"
    for text, names in {
        'name,r,g,b\n"traffic light, red",1,2,3\n"a ""b""",4,5,6\n': [
            ("traffic light, red", (1, 2, 3)),
            ('a "b"', (4, 5, 6)),
        ],
        '"it, is"\nan "odd, one\n': [("it, is", None), ('an "odd one', None)],
        "m² 1 2 3\nm³ 4 5 6\n": [("m²", (1, 2, 3)), ("m³", (4, 5, 6))],
        "a ² 1 2\nb 3 4 ³\n": [("a ² 1 2", None), ("b 3 4 ³", None)],
        "²\n³\n": [("²", None), ("³", None)],
    }.items():
        file.write_text(text, encoding="utf-8")
        assert read_names(str(file), "") == names


@pytest.mark.parametrize("quality", [75, 100])
@pytest.mark.parametrize("step", [1, 60])
def test_jpeg_masks_need_a_file_of_classes(tmp_path, step, quality):
    """Their compression makes labels of its own, of grey levels that do not reach white as well."""
    labels = np.zeros((40, 60), np.uint8)
    labels[:20], labels[:, :20] = step, 2 * step
    for number in range(2):
        write_pair(tmp_path, str(number), Image.fromarray(labels), (60, 40))
        Image.fromarray(labels).save(tmp_path / "masks" / f"{number}.jpg", quality=quality)
        (tmp_path / "masks" / f"{number}.png").unlink()
    with pytest.raises(
        UserError, match=r"masks in .*, such as .*\.jpg: .*(save masks as PNG|look like shades of grey)"
    ):
        find(tmp_path, reduce_zero_label=False)


@pytest.mark.parametrize(
    ("content", "want"),
    [
        ("0 road\n1 car park\n", [("road", None), ("car park", None)]),
        ("0,road\n1, car park\n", [("road", None), ("car park", None)]),
        ("id,name\n0,road\n1,car\n", [("road", None), ("car", None)]),
        ("0\troad\t1\t2\t3\n1\tcar\t4\t5\t6\n", [("road", (1, 2, 3)), ("car", (4, 5, 6))]),
        ("0 0 0 road\n1 5 6 car\n", [("road", (0, 0, 0)), ("car", (1, 5, 6))]),
        ("0 9 9 9\n1 8 8 8\n", [("0", (9, 9, 9)), ("1", (8, 8, 8))]),
    ],
)
def test_numbers_in_a_file_of_classes(tmp_path, content, want):
    file = tmp_path / "names.txt"
    file.write_text(content)
    assert read_names(str(file), "") == want
    if not content[2].isdecimal():
        words = (
            "names.txt numbers its first class 0, which is label 1: leave .*, or give --data.no-reduce-zero-label if"
        )
        with pytest.raises(UserError, match=words):
            read_names(str(file), "", 1)
    file.write_text("1 road\n2 car\n")
    assert read_names(str(file), "", 1) == [("road", None), ("car", None)]
    with pytest.raises(UserError, match=r"first class 1, which is label 0: leave .*, or give --data.reduce-zero"):
        read_names(str(file), "")


def test_an_empty_line_among_the_classes(tmp_path):
    """Those after it would be other labels; with colours, nothing depends on the order."""
    file = tmp_path / "x.txt"
    file.write_text("a\n\nb\n\n\n")
    with pytest.raises(
        UserError, match=r"x\.txt has nothing in line 2: each line names a class, the first that of label 0"
    ):
        read_names(str(file), "")
    file.write_text("a\nb\n\n \n\n")
    assert read_names(str(file), "") == [("a", None), ("b", None)]
    file.write_text("a 1 2 3\n\nb 4 5 6\n")
    assert read_names(str(file), "") == [("a", (1, 2, 3)), ("b", (4, 5, 6))]
    file.write_text("\nname,r,g,b\n")
    assert read_names(str(file), "") == []
