"""Label images, one integer for each object, as annotations of a detector."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from faster_coco_eval.core import mask as rle
from PIL import Image

from itpn.cli import main
from itpn.data.annotations import find_objects, read_objects
from itpn.data.instances import trace_objects
from itpn.errors import UserError

HEIGHT, WIDTH = 40, 50
REAL = Path(__file__).parents[3] / "shared" / "data" / "nuclei" / "fluo_multichannel"
WRITERS = {
    "png8": (".png", "uint8", lambda path, labels: Image.fromarray(labels).save(path)),
    "png16": (".png", "uint16", lambda path, labels: Image.fromarray(labels).save(path)),
    "tiff16": (".tif", "uint16", tifffile.imwrite),
    "tiff32": (".tif", "int32", lambda path, labels: tifffile.imwrite(path, labels, compression="zlib")),
    "npy": (".npy", "int64", np.save),
}


def draw_labels(*boxes: tuple[int, int, int, int, int]) -> np.ndarray:
    """Labels with boxes (label, top, left, height, width)."""
    labels = np.zeros((HEIGHT, WIDTH), np.int64)
    for label, top, left, height, width in boxes:
        labels[top : top + height, left : left + width] = label
    return labels


def write(root: Path, *labels: np.ndarray | None, kind: str = "png8", split: str = "") -> Path:
    """A folder of grey images, each with its label image, unless that is None."""
    suffix, dtype, save = WRITERS[kind]
    for folder in ("images", "masks"):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
    for number, own in enumerate(labels):
        Image.new("L", (WIDTH, HEIGHT)).save(root / "images" / split / f"{number}.png")
        if own is not None:
            save(root / "masks" / split / f"{number}{suffix}", own.astype(dtype))
    return root


def read(root: Path, **options):
    """The images, and the log without the heading of the summary."""
    logged: list[str] = []
    images = read_objects(str(root), "train", log=logged.append, **options)
    return images, [line.strip() for line in logged if "left out or corrected:" not in line]


def refusal(root: Path) -> str:
    with pytest.raises(UserError) as error:
        read(root)
    assert "\n" not in str(error.value)
    return str(error.value)


def masks_of(images, index: int) -> list[np.ndarray]:
    return [rle.decode(one["segmentation"]) for one in images.objects_of(index)]


GOOD = draw_labels((1, 0, 0, 5, 6), (2, 10, 20, 4, 3))


@pytest.mark.parametrize("kind", WRITERS)
def test_objects_of_every_kind_of_file(tmp_path, kind):
    """All bits of a label count; numbers may have gaps; an object may have several parts, or a hole, or one pixel."""
    most = {"png8": 255, "png16": 65535, "tiff16": 65535, "tiff32": 2**31 - 1, "npy": 2**40}[kind]
    labels = draw_labels((3, 0, 0, HEIGHT, 4), (7, 10, 20, 5, 6), (0, 11, 21, 2, 2), (200, 39, 49, 1, 1))
    labels[2:4, 30:33] = labels[30, 40] = most
    images, logged = read(write(tmp_path, labels, kind=kind))
    assert logged == []
    assert images.classes == ("object",)
    objects = images.objects_of(0)
    assert [one["bbox"] for one in objects] == [[0, 0, 4, 40], [20, 10, 6, 5], [49, 39, 1, 1], [30, 2, 11, 29]]
    assert [one["area"] for one in objects] == [160, 26, 1, 7]
    for label, mask in zip((3, 7, 200, most), masks_of(images, 0), strict=True):
        assert np.array_equal(mask, labels == label)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (37, 53)])
def test_random_labels(shape):
    labels = np.random.default_rng(0).integers(0, 4, shape, dtype=np.uint16) * 1000
    found = trace_objects(labels, "a.png")
    assert found.labels == [n for n in np.unique(labels).tolist() if n]
    for label, one in zip(found.labels, found.annotations, strict=True):
        encoded = rle.encode(np.asfortranarray(labels == label, dtype=np.uint8))
        assert one["segmentation"]["counts"] == encoded["counts"].decode()
        assert one["bbox"] == rle.toBbox(encoded).tolist()
        assert one["where"] == f"a.png label {label}"


def test_images_without_objects_and_without_labels(tmp_path):
    images, logged = read(write(tmp_path, GOOD, draw_labels(), None))
    assert [len(images.objects_of(index)) for index in range(len(images))] == [2, 0]
    assert logged == [f"images without a mask: 1 ({tmp_path}/images/2.png)"]


def test_images_without_any_object(tmp_path):
    assert refusal(write(tmp_path, draw_labels())) == f"{tmp_path}/masks has no objects"


def test_a_palette_stands_for_its_indices(tmp_path):
    write(tmp_path, GOOD)
    image = Image.open(tmp_path / "masks" / "0.png").convert("P")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    image.save(tmp_path / "masks" / "0.png")
    images, _ = read(tmp_path)
    assert [np.array_equal(mask, label == GOOD) for label, mask in enumerate(masks_of(images, 0), 1)] == [True, True]


def save_rgb(path: Path, labels: np.ndarray) -> None:
    Image.fromarray(labels.astype(np.uint8)).convert("RGB").save(path)


@pytest.mark.parametrize(
    ("name", "save", "reason"),
    [
        ("1.png", save_rgb, "3 channels, labels have one: save one integer for each object, not its colour"),
        ("1.tif", lambda p, a: tifffile.imwrite(p, a.astype("f4")), "float32 values are no labels: save integers"),
        ("1.tif", lambda p, a: tifffile.imwrite(p, a.astype("i2") - 1), "label -1: labels count from 1, and 0 is the"),
        ("1.tif", lambda p, a: tifffile.imwrite(p, np.stack([a, a]).astype("u2")), "2 pages, labels of an image have"),
        ("1.jpg", lambda p, a: Image.fromarray(a.astype("u1")).save(p), "JPEG changes labels: save them as PNG or"),
        ("1.png", lambda p, a: p.write_bytes(b"?" * 200), "not an image of a known format"),
        ("1.png", lambda p, a: p.write_bytes(b""), "empty file"),
    ],
)
def test_what_is_no_label_image(tmp_path, name, save, reason):
    """It is left out and named, beside the others; alone it is refused."""
    write(tmp_path, GOOD, None)
    save(tmp_path / "masks" / name, GOOD)
    images, logged = read(tmp_path)
    assert len(images) == 1
    assert len(logged) == 1
    line = f"masks that cannot be read: 1 ({tmp_path}/masks/{name}: {reason}"
    assert logged[0].startswith(line)
    for folder in ("images", "masks"):
        (tmp_path / folder / "0.png").unlink()
    assert refusal(tmp_path).startswith(f"{tmp_path}/masks has no images that can be used: {line}")


def test_labels_of_another_size(tmp_path):
    """Both files are named, and no pixel is read."""
    write(tmp_path, GOOD, None)
    Image.new("I;16", (30000, 30000)).save(tmp_path / "masks" / "1.png")
    _, logged = read(tmp_path)
    what = "masks of another size than their image: 1"
    assert logged == [f"{what} ({tmp_path}/masks/1.png: 30000x30000, the image 50x40)"]
    write(tmp_path, GOOD, GOOD.T)
    _, logged = read(tmp_path)
    assert logged == [f"{what} ({tmp_path}/masks/1.png: 40x50, the image 50x40: height and width are swapped)"]
    with pytest.raises(UserError, match=r"masks of another size than their image: 1 .*; --data.invalid-annotations"):
        read(tmp_path, on_invalid="error")


def test_labels_that_look_like_classes(tmp_path):
    """A note tells; objects of several parts, and many labels, are usual."""
    boxes = [(1, 4 * row, 4 * column, 2, 2) for row in range(6) for column in range(6)]
    classes = draw_labels(*boxes)
    _, logged = read(write(tmp_path / "a", classes, classes * 255))
    assert logged == [
        f"{tmp_path}/a/masks: 2 labels of 36.0 parts an image look like classes: each object needs a number of its own "
        "(segmenters learn masks of classes)"
    ]
    numbered = draw_labels(*((number, *box) for number, (_, *box) in enumerate(boxes, 1)))
    parted = draw_labels((1, 0, 0, 2, 2), (1, 8, 8, 2, 2), (2, 20, 20, 4, 4))
    assert read(write(tmp_path / "b", numbered, parted, draw_labels()))[1] == []


def test_folders_of_splits(tmp_path):
    write(tmp_path, GOOD, GOOD, split="train")
    write(tmp_path, draw_labels((1, 0, 0, 3, 3)), split="val")
    logged: list[str] = []
    train, val = find_objects(str(tmp_path), log=logged.append)
    assert val is not None
    assert (len(train), len(val), logged) == (2, 1, [])


def test_a_folder_without_splits_is_for_training(tmp_path):
    root, other = write(tmp_path / "a", GOOD, GOOD), write(tmp_path / "b", GOOD)
    assert find_objects(str(root), log=print)[1] is None
    val = find_objects(str(root), str(other), log=print)[1]
    assert val is not None
    assert len(val) == 1


def test_the_class_has_the_name_of_a_file(tmp_path):
    (write(tmp_path, GOOD) / "classes.txt").write_text("nucleus\n")
    assert read(tmp_path)[0].classes == ("nucleus",)
    (tmp_path / "classes.txt").write_text("nucleus\ncell\n")
    images, logged = read(tmp_path)
    assert images.classes == ("object",)
    note = "its file of classes has 2, but label images are of one, called object"
    assert logged == [f"{tmp_path}/masks: {note}"]


@pytest.mark.parametrize(
    ("image", "mask"),
    [("0.ome.tif", "0.png"), ("0.ome.tif", "0.ome.tif"), ("0.png", "0_masks.png"), ("0.npy", "0_cp_masks.tif")],
)
def test_names_of_label_images(tmp_path, image, mask):
    write(tmp_path, GOOD, kind="png16")
    pixels = np.zeros((HEIGHT, WIDTH), "u2")
    (tmp_path / "images" / "0.png").unlink()
    {"npy": np.save, "tif": tifffile.imwrite, "png": lambda path, own: Image.fromarray(own).save(path)}[image[-3:]](
        tmp_path / "images" / image, pixels
    )
    labels = np.asarray(Image.open(tmp_path / "masks" / "0.png"))
    (tmp_path / "masks" / "0.png").unlink()
    if mask.endswith(".png"):
        Image.fromarray(labels).save(tmp_path / "masks" / mask)
    else:
        tifffile.imwrite(tmp_path / "masks" / mask, labels)
    images, logged = read(tmp_path)
    assert ([len(images.objects_of(0))], logged) == ([2], [])


def test_images_above_the_limit_are_left_out(tmp_path):
    write(tmp_path, GOOD)
    with pytest.raises(UserError, match=r"images of more pixels than --data.max-pixels: 1 \(.*0.png: 50x40\)"):
        read(tmp_path, max_pixels=100)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/nuclei")
def test_real_label_images():
    """Of two mass-cytometry images with five channels; the other images have none."""
    images, logged = read(REAL)
    assert [Path(images.name(index)).name for index in range(len(images))] == ["imc_e34.ome.tif", "imc_g01.ome.tif"]
    assert images.sizes.tolist() == [[100, 100]] * 2
    for index, name in enumerate(("imc_e34", "imc_g01")):
        labels = np.asarray(Image.open(REAL / "masks" / f"{name}.png"))
        masks = masks_of(images, index)
        numbers = np.unique(labels[labels > 0])
        assert len(masks) == len(numbers) > 100
        assert all(np.array_equal(mask, labels == n) for n, mask in zip(numbers, masks, strict=True))
    assert len(logged) == 1
    assert logged[0].startswith("images without a mask: 12 (")


@pytest.mark.parametrize(
    ("save", "code", "line"),
    [
        (save_rgb, 2, "3 channels, labels have one: save one integer for each object, not its colour)"),
        (lambda path, labels: Image.fromarray(labels.astype("u1")).save(path), 0, "2 images (1 classes"),
    ],
    ids=["colours", "labels"],
)
def test_a_run(tmp_path, capsys, save, code, line):
    write(tmp_path / "a", None, None)
    for number in range(2):
        save(tmp_path / "a" / "masks" / f"{number}.png", GOOD)
    command = ["train", "detector_nano", "--model.scratch", "--model.name", "itpn_nano", "--data.batch-size", "2"]
    command += ["--data.num-workers", "0", "--trainer.max-steps", "1", "--output-dir", str(tmp_path / "runs")]
    assert main([*command, "--data.root", str(tmp_path / "a")]) == code
    printed = capsys.readouterr()
    assert line in " ".join((printed.out + printed.err).split())
    assert "Traceback" not in printed.err
