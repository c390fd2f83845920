"""Masks whose values are shades of grey, not class indices: refused where no file of classes says what they mean."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from itpn.cli import main
from itpn.data.grey_masks import explain_greys
from itpn.data.labelmaps import find_label_maps
from itpn.data.mask_checks import MaskRules
from itpn.data.masks import IGNORED
from itpn.errors import UserError

SIZE = (96, 64)  # width, height


def write(root: Path, *masks: np.ndarray | Image.Image, suffix: str = ".png") -> Path:
    """Images and masks; a mask is an array, or what is to be saved."""
    for number, mask in enumerate(masks):
        for folder in ("images", "masks"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        Image.new("RGB", image.size, "grey").save(root / "images" / f"{number}.jpg")
        image.save(root / "masks" / f"{number}{suffix}")
    return root


def stripes(*values: int) -> np.ndarray:
    """As many pixels of each."""
    width, height = SIZE
    places = np.arange(width * height) * len(values) // (width * height)
    return np.array(values, dtype=np.uint8)[places].reshape(height, width)


def find(root: Path, **rules):
    logged: list[str] = []
    train, _ = find_label_maps(str(root), rules=MaskRules(log=logged.append, **rules))
    return train, logged


def labels_of(images, index: int = 0) -> np.ndarray:
    return images.table.read(images[index][2]).numpy()


def disk(level: int = 255, blur: bool = True) -> Image.Image:
    """A disk of grey on black, with or without anti-aliasing."""
    width, height = SIZE
    y, x = np.mgrid[: 8 * height, : 8 * width]
    inside = (x - 4 * width) ** 2 + (y - 4 * height) ** 2 < (8 * 24) ** 2
    large = Image.fromarray((inside * level).astype(np.uint8))
    return large.resize(SIZE, Image.Resampling.BOX if blur else Image.Resampling.NEAREST)


LEVELS = [
    (0, 127, 255), (0, 128, 255), (127, 255), (0, 85, 170, 255), (0, 85, 255), (0, 85, 170), (0, 63, 127, 191, 255),
    (0, 64, 128, 192), (0, 51, 102, 153, 204, 255), (0, 36, 73, 109, 146, 182, 219, 255), (0, 127), (0, 128), (0, 254),
    (0, 50, 100, 150, 200, 250), (0, 100, 200), (0, 30, 60, 90), (0, 80, 160, 240, 255), (0, 32, 64, 96, 128, 160, 192),
]  # fmt: skip


@pytest.mark.parametrize("values", LEVELS, ids=str)
def test_evenly_spaced_shades_are_refused(tmp_path, values):
    root = write(tmp_path, stripes(*values), stripes(values[0], values[-1]))
    with pytest.raises(UserError) as error:
        find(root)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(f"masks in {root}/masks, such as {root}/masks/0.png: values ")
    assert "look like shades of grey, not class indices: give --data.classes FILE with a line `NAME G G G`" in text


def test_the_remedy_for_shades_works(tmp_path):
    """All three are classes then, 255 among them."""
    root = write(tmp_path, stripes(0, 127, 255))
    (root / "classes.txt").write_text("back 0 0 0\nedge 127 127 127\ncell 255 255 255\n")
    train, logged = find(root)
    assert logged == []
    assert train.classes == ("back", "edge", "cell")
    assert np.array_equal(labels_of(train), np.array([0, 1, 2])[stripes(0, 1, 2)])


def test_anti_aliased_edges_are_refused(tmp_path):
    sets = {
        "black and white": [disk(), disk()],
        "one of several": [disk(blur=False), disk(), disk(blur=False)],
        "three levels": [disk(), disk(127), disk(80)],
        "small": [disk().resize((24, 16), Image.Resampling.BILINEAR)],
    }
    for name, masks in sets.items():
        root = write(tmp_path / name, *masks)
        with pytest.raises(UserError) as error:
            find(root)
        text = str(error.value)
        assert "\n" not in text
        assert "look like anti-aliased shades of grey" in text, name
        assert "save masks as PNG without interpolation" in text
        assert f"such as {root}/masks/{int(name == 'one of several')}.png" in text
    with pytest.raises(UserError, match="look like anti-aliased shades of grey"):
        find(write(tmp_path / "jpeg", disk(blur=False), suffix=".jpeg"))  # whose compression blurs


VALID = [
    (0, 1, 255), (0, 1), (1, 2, 3), (0, 2), (0, 2, 4), (0, 5, 17), (0, 10, 20), (0, 20, 40), (0, 100), (0, 150),
    (0, 200),    (0, 5, 200), (0, 3, 200, 255), (0, 17, 255), (0, 33, 255), (3, 255), (1, 4, 90, 130), (0, 1, 100, 253),
    (*range(19), 255), (0, 7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33), tuple(range(151)), (*range(21), 255),
]  # fmt: skip


@pytest.mark.parametrize("values", VALID, ids=lambda values: f"{len(values)}-{values[-1]}")
def test_gaps_absent_classes_and_an_ignored_255_are_accepted(tmp_path, values):
    root = write(tmp_path, stripes(*values))
    train, logged = find(root)
    classes = [value for value in values if value != 255]
    assert train.classes == tuple(map(str, range(max(classes) + 1)))
    wanted = stripes(*values)
    assert np.array_equal(labels_of(train), np.where(wanted == 255, IGNORED, wanted))
    ignored = [line for line in logged if "255" in line]
    assert ignored == ([f"{root}/masks: pixels of label 255 are ignored (--data.ignore)"] if 255 in values else [])


def test_values_with_few_pixels_may_be_classes():
    """ADE20K's 150 classes, of which some are rare, with a border of 255; as many classes as there can be."""
    rare = {**dict.fromkeys(range(1, 151), 50), 1: 90_000, 2: 3_000, 255: 10}
    assert explain_greys(rare) is None
    assert explain_greys(dict.fromkeys(range(256), 100)) is None
    assert explain_greys({0: 90_000, 1: 1_000, 5: 30, 255: 500}) is None
    assert explain_greys({0: 900, 255: 500}) is None
    assert explain_greys({}) is None


def test_black_and_white_stays_two_classes(tmp_path):
    train, logged = find(write(tmp_path / "two", disk(blur=False), stripes(0)))
    assert logged == [f"{tmp_path}/two/masks: black and white masks, of 0 and 1"]
    assert train.classes == ("0", "1")
    assert np.array_equal(labels_of(train), np.asarray(disk(blur=False)) // 255)
    assert not labels_of(train, 1).any()


def test_shades_that_are_ignored_are_no_sign(tmp_path):
    """A trimap's 128 is of no class where --data.ignore says so; values with names are indices."""
    train, logged = find(write(tmp_path, stripes(0, 1, 128)), ignore=(128, 255))
    assert train.classes == ("0", "1")
    assert logged == []
    root = write(tmp_path / "named", stripes(0, 2, 4))
    (root / "classes.txt").write_text("\n".join("abcde"))
    assert find(root)[0].classes == tuple("abcde")
    root = write(tmp_path / "many", stripes(0, 127, 254))
    (root / "classes.txt").write_text("\n".join(f"class {number}" for number in range(254)))
    with pytest.raises(UserError, match="label 254, which no class has"):
        find(root)


def test_an_ignored_label_is_named_with_a_file_of_classes(tmp_path):
    root = write(tmp_path, stripes(0, 1, 255))
    (root / "classes.txt").write_text("road\ntree\n")
    for on_invalid in ("summary", "skip", "error"):
        assert find(root, on_invalid=on_invalid)[1] == [
            f"{root}/masks: pixels of label 255 are ignored (--data.ignore)"
        ]


def test_a_run_is_refused_before_it_begins(tmp_path, capsys):
    command = ["train", "segmenter_nano", "--model.scratch", "--model.name", "itpn_nano", "--data.num-workers", "0"]
    for number, masks in enumerate(([stripes(0, 127, 255)] * 3, [disk()] * 3)):
        root = write(tmp_path / str(number), *masks)
        assert main([*command, "--data.root", str(root), "--output-dir", str(tmp_path / "runs")]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert "not class indices" in error
    assert not (tmp_path / "runs").exists()


def test_masks_without_two_classes_are_named(tmp_path):
    for number, values in enumerate(((255,), (0,))):
        root = write(tmp_path / str(number), stripes(*values))
        with pytest.raises(UserError, match=f"masks in {root}/masks: 1 classes of pixels: there must be from 2 to 254"):
            find(root)


LOSSY = {
    "a JPEG called .png": (".png", "JPEG", {"quality": 95}, "JPEG"),
    "a TIFF": (".tif", "TIFF", {"compression": "jpeg"}, "JPEG"),
    "a WebP": (".webp", "WEBP", {"quality": 90}, "lossy WebP"),
    "a WebP with metadata": (".webp", "WEBP", {"quality": 90, "icc_profile": b"none"}, "lossy WebP"),
    "a lossless WebP": (".webp", "WEBP", {"lossless": True}, None),
    "a lossless WebP with metadata": (".webp", "WEBP", {"lossless": True, "icc_profile": b"none"}, None),
    "a PNG called .jpg": (".jpg", "PNG", {}, None),
    "a TIFF without loss": (".tif", "TIFF", {"compression": "tiff_lzw"}, None),
}


@pytest.mark.parametrize("kind", LOSSY)
def test_lossy_masks_are_known_by_their_content(tmp_path: Path, kind: str) -> None:
    suffix, form, options, name = LOSSY[kind]
    root = write(tmp_path, stripes(0, 1, 2))
    (root / "masks" / "0.png").unlink()
    mask = Image.fromarray(stripes(0, 1, 2))
    mask.convert("RGB" if form == "WEBP" else "L").save(root / "masks" / f"0{suffix}", form, **options)
    if name is None:
        images, _ = find(root, reduce_zero_label=False)
        assert np.array_equal(labels_of(images), stripes(0, 1, 2))
    else:
        with pytest.raises(UserError, match=rf"such as .*0\{suffix}: {name} changes pixels, .*: save masks as PNG"):
            find(root, reduce_zero_label=False)
