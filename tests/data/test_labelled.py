"""Images with classes, from every kind of source, and refusals of invalid data sets."""

import functools
import io
import os
import tarfile
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from itpn.data.augment import EvaluationTransform
from itpn.data.class_names import drop_numbers
from itpn.data.decode import UnreadableImage, decode_image
from itpn.data.evaluation import make_evaluation_loader, view_labelled
from itpn.data.labelled import draw_fraction, find_labelled
from itpn.data.loader import TrainingLoader
from itpn.errors import UserError

CLASSES = ("bee", "cow", "dog")


def encode(number: int) -> bytes:
    """A tiny image, different for each argument."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def samples(count: int, first: int = 0) -> list[tuple[str, bytes, int]]:
    return [(f"{i:04d}", encode(first + i), i % 3) for i in range(count)]


def write_folders(root: Path, split: str, count: int, first: int = 0) -> None:
    for name, data, label in samples(count, first):
        path = root / split / CLASSES[label] / "deeper" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_shard(path: Path, content: list[tuple[str, bytes, int | str]], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data, label in content:
            for ending, payload in (("cls", str(label).encode(errors="surrogateescape")), ("png", data)):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))


def write_shards(root: Path, split: str, count: int, first: int = 0) -> None:
    content = samples(count, first)
    write_shard(root / f"{split}-0.tar", content[: count // 2])
    write_shard(root / f"{split}-1.tar.gz", content[count // 2 :], "w:gz")
    (root / "classes.txt").write_text("bee\ncow\ndog\n")


def write_parquet(root: Path, split: str, count: int, first: int = 0) -> None:
    root.mkdir(exist_ok=True)
    content = samples(count, first)
    rows = {"img": [{"bytes": data, "path": None} for _, data, _ in content], "label": [row[2] for row in content]}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(root / f"{split}-00000-of-00001.parquet")


WRITERS = [write_folders, write_shards, write_parquet]


@pytest.mark.parametrize("write", WRITERS)
def test_the_same_set_in_each_form(tmp_path, write, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "set"
    write(root, "train", 20)
    write(root, "validation" if write is write_parquet else "val", 7, first=100)
    train, val = find_labelled([str(root)])
    for images, first, count in ((train, 0, 20), (val, 100, 7)):
        assert images.classes == CLASSES
        found = {(data, label) for _, data, label in (images[i] for i in range(len(images)))}
        assert found == {(data, label) for _, data, label in samples(count, first)}

    def view(image, rng, label):
        return {"image": image.decode(), "label": torch.tensor(label)}

    loader = TrainingLoader(train, view, batch_size=5, num_workers=2 * (write is write_shards), seed=0)
    label_of = {}
    for batch in loader:
        assert batch["label"].dtype == torch.int64
        for image, label in zip(batch["image"], batch["label"].tolist(), strict=True):
            label_of[image.numpy().tobytes()] = label
    assert label_of == {decode_image(data).contiguous().numpy().tobytes(): label for _, data, label in samples(20)}


def test_a_fraction_of_the_labels_and_held_out_images(tmp_path):
    write_folders(tmp_path, "", 60)
    train, val = find_labelled([str(tmp_path)], val_fraction=0.2, seed=3)
    assert (len(train), len(val)) == (48, 12)
    names = [{images[i][0] for i in range(len(images))} for images in (train, val)]
    assert not names[0] & names[1]
    assert np.bincount(val.labels).tolist() == [4, 4, 4]
    again = find_labelled([str(tmp_path)], val_fraction=0.2, seed=3)[1]
    assert [again[i][0] for i in range(12)] == [val[i][0] for i in range(12)]
    other = find_labelled([str(tmp_path)], val_fraction=0.2, seed=4)[1]
    assert [other[i][0] for i in range(12)] != [val[i][0] for i in range(12)]
    few = train.take(draw_fraction(train, 0.01, 0))
    assert np.bincount(few.labels).tolist() == [1, 1, 1]
    assert all(Path(few[i][0]).parents[1].name == CLASSES[few[i][2]] for i in range(3))
    assert find_labelled([str(tmp_path)])[1] is None


def test_classes_are_matched_by_name(tmp_path):
    write_shard(tmp_path / "a" / "train-0.tar", samples(6))
    (tmp_path / "a" / "classes.txt").write_text("bee\ncow\ndog\n")
    write_shard(tmp_path / "b" / "val-0.tar", [("x", encode(1), 0), ("y", encode(2), 2)])
    (tmp_path / "b" / "classes.txt").write_text("dog\nbee\ncow\n")
    _, val = find_labelled([str(tmp_path / "a")], [str(tmp_path / "b")])
    assert val.classes == CLASSES
    assert val.labels.tolist() == [2, 1]
    write_shard(tmp_path / "c" / "train-0.tar", [("x", encode(1), "dog"), ("y", encode(2), "bee")])
    assert find_labelled([str(tmp_path / "c")])[0].classes == ("bee", "dog")


def test_which_images_are_to_evaluate_on(tmp_path):
    """A test set is kept for the end; a split is a word anywhere in a shard's name."""
    for split, count, first in (("train", 9, 0), ("valid", 6, 100), ("test", 3, 200)):
        write_folders(tmp_path / "a", split, count, first)
    train, val = find_labelled([str(tmp_path / "a")])
    assert (len(train), len(val)) == (9, 6)
    (tmp_path / "a" / "valid").rename(tmp_path / "a" / "Val")
    assert len(find_labelled([str(tmp_path / "a")])[1]) == 6
    write_shard(tmp_path / "b" / "imagenet1k-train-0.tar", samples(9))
    write_shard(tmp_path / "b" / "imagenet1k-validation-0.tar", samples(6, 100))
    (tmp_path / "b" / "classes.txt").write_text("bee\ncow\ndog\n")
    train, val = find_labelled([str(tmp_path / "b")])
    assert (len(train), len(val)) == (9, 6)
    train, val = find_labelled([str(tmp_path / "b")], [str(tmp_path / "a")])
    assert (len(train), len(val)) == (9, 6)
    (tmp_path / "c" / "bee").mkdir(parents=True)
    with pytest.raises(UserError, match="c has nothing called train, unlike another"):
        find_labelled([str(tmp_path / "a"), str(tmp_path / "c")])
    (tmp_path / "b" / "imagenet1k-train-0.tar").rename(tmp_path / "b" / "rest.tar")
    with pytest.raises(UserError, match=r"validation-0.tar is to evaluate on, but there is nothing called train"):
        find_labelled([str(tmp_path / "b")])


@pytest.mark.parametrize("place", [0.3, 0.7])
def test_a_shard_that_breaks_off(tmp_path, place):
    path = tmp_path / "train-0.tar"
    write_shard(path, samples(30))
    data = path.read_bytes()
    path.write_bytes(data[: int(place * len(data)) // 512 * 512])
    with pytest.raises(UserError, match=r"train-0.tar is corrupt or no tar archive"):
        find_labelled([str(tmp_path)])
    path.write_bytes(data[: 512 * 20] + b"x" * 512 + data[512 * 21 :])
    with pytest.raises(UserError, match=r"train-0.tar is corrupt or no tar archive"):
        find_labelled([str(tmp_path)])


def test_held_out_images_stay_held_out(tmp_path):
    """Elsewhere, and among more images, the same are drawn, as far as there is room for them."""
    write_folders(tmp_path / "a", "", 60)
    write_folders(tmp_path / "b", "", 66)
    first, second = (find_labelled([str(tmp_path / name)], val_fraction=0.2)[1] for name in "ab")
    names = [{images.key(i) for i in range(len(images))} for images in (first, second)]
    assert len(names[0] & names[1]) >= 10


def break_empty_class(root: Path) -> str:
    (root / "train" / "emu").mkdir()
    return "class emu in .* has no images: add some, or remove it"


def break_unknown_val_class(root: Path) -> str:
    (root / "val" / "emu").mkdir()
    (root / "val" / "emu" / "a.png").write_bytes(encode(0))
    return "'emu' among the classes to evaluate on, but not to train on"


def break_loose_image(root: Path) -> str:
    (root / "train" / "loose.png").write_bytes(encode(0))
    return r"loose.png is in no class folder"


def break_cls_missing(root: Path) -> str:
    with tarfile.open(root / "train-0.tar", "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.size = len(encode(0))
        tar.addfile(member, io.BytesIO(encode(0)))
    for folder in ("train", "val"):
        (root / folder).rename(root / f"no-{folder}")
    return r"a.png in .*train-0.tar has no a.cls beside it"


def break_corrupt_shard(root: Path) -> str:
    (root / "train" / "a.tar").write_bytes(b"no tar at all")
    return "a.tar is corrupt or no tar archive"


def break_one_image(root: Path) -> str:
    for path in [*(root / "train").rglob("*.png")][1:]:
        path.unlink()
    for folder in (root / "train").iterdir():
        if not any(folder.rglob("*.png")):
            for inner in folder.iterdir():
                inner.rmdir()
            folder.rmdir()
    return "holds 1 image of 1 class: a classifier needs two classes"


def break_no_images(root: Path) -> str:
    for path in (root / "train").rglob("*.png"):
        path.unlink()
    return "holds no class folders of images"


@pytest.mark.parametrize(
    "damage",
    [
        break_empty_class,
        break_unknown_val_class,
        break_loose_image,
        break_cls_missing,
        break_corrupt_shard,
        break_one_image,
        break_no_images,
    ],
)
def test_invalid_data_is_refused(tmp_path, damage):
    write_folders(tmp_path, "train", 9)
    write_folders(tmp_path, "val", 6)
    with pytest.raises(UserError, match=damage(tmp_path)):
        find_labelled([str(tmp_path)])


def test_places_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="does not exist: give a folder of class folders"):
        find_labelled([str(tmp_path / "nothing")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no class folders, tar shards with \.cls or parquet files"):
        find_labelled([str(tmp_path / "empty")])
    for name in CLASSES:
        (tmp_path / "single" / name).mkdir(parents=True)
        (tmp_path / "single" / name / "a.png").write_bytes(encode(0))
    with pytest.raises(UserError, match="holds an image of each class: none can be held out"):
        find_labelled([str(tmp_path / "single")], val_fraction=0.5)


def test_blanks_in_a_file_of_classes_do_not_count(tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name, payload in (("0.jpg", b"-"), ("0.cls", b"0"), ("1.jpg", b"-"), ("1.cls", b"1")):
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
    (tmp_path / "classes.txt").write_text(" cat \ndog\t\n\n")
    assert find_labelled([str(tmp_path)])[0].classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        ("0 a|1 b c", "a|b c"),
        ("0: a|1: b", "a|b"),
        ("0,a|1,b", "a|b"),
        ("0 - a|1 - b", "a|b"),
        ("00) a|01) b", "a|b"),
        ("a 0|b c 1", "a|b c"),
        ("a,0|b,1", "a|b"),
        ("id,name|0,a|1,b", "a|b"),
        ("class_name|a|b", "a|b"),
        ("name r g b|a 1 2 3|b 4 5 6", "a 1 2 3|b 4 5 6"),
        ("red|green|blue", None),
        ("0 a|2 b", None),
        ("0 a", None),
        ("0|1", None),
        ("0 0 0 a|1 1 1 b", None),  # colours
        ("a 0 0 0|b 1 1 1", None),
        ("0 0 0 0 a|1 1 1 1 b", "0 0 0 a|1 1 1 b"),
        ("0 10 20 30|1 10 20 40", None),
        ("0 a 10 20 30|1 b 10 20 40", "a 10 20 30|b 10 20 40"),
        ("2 doors|4 doors", None),
        ("0 doors|1 doors", None),
        ("type 0|type 1", None),
        ("#0|#1", None),
    ],
)
def test_lines_with_their_numbers(lines, names):
    assert drop_numbers(lines.split("|"), 0, "FILE") == (names or lines).split("|")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("1 a|2 b|3 c", "numbers its first class 1, which is label 0: leave the numbers out HINT"),
        ("1 b|0 a", "numbers its first class 1, which is label 0: leave the numbers out, or sort the lines by label"),
        ("b,1|a,0", "or sort the lines by label"),
        ("# my classes|a|b", r"has a comment \(# my classes\), which is no class: remove it"),
    ],
)
def test_lines_with_other_numbers(lines, words):
    with pytest.raises(UserError, match=words):
        drop_numbers(lines.split("|"), 0, "FILE", " HINT")


@pytest.mark.parametrize(
    ("content", "labels", "classes"),
    [
        ("0 cat\n1 black dog\n", "01", ("cat", "black dog")),
        ("0 - no DR\n1 - mild\n", "01", ("no DR", "mild")),
        ("0 - no DR\n1 - mild\n", ("0 - no DR", "1 - mild"), ("0 - no DR", "1 - mild")),
        ("0 stars\n1 star\n2 stars\n", "012", ("0 stars", "1 star", "2 stars")),
        ("id,name\n0,cat\n1,dog\n", "01", ("cat", "dog")),
    ],
)
def test_numbers_in_a_file_of_classes_beside_shards(tmp_path, content, labels, classes):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for number, label in enumerate(labels):
            for name, payload in ((f"{number}.jpg", b"-"), (f"{number}.cls", label.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))
    (tmp_path / "classes.txt").write_text(content)
    found = find_labelled([str(tmp_path)])[0]
    assert found.classes == classes
    assert list(found.labels) == [*range(len(labels))]


def test_labels_are_found_by_key(tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for i in range(6):
            payloads = {"jpg": encode(i), "seg.png": encode(9), "cls": str(i % 2).encode(), "txt": b"a cat"}
            for ending, payload in payloads.items():
                member = tarfile.TarInfo(f"v1.0/{i}.{ending}")
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))
    train, _ = find_labelled([str(tmp_path)])
    assert [train[i] for i in range(6)] == [(f"train-0.tar/v1.0/{i}.jpg", encode(i), i % 2) for i in range(6)]
    assert train.notes == (
        "not read of the shards: 6 .seg.png (see --data.members)",
        f"shards ({tmp_path / 'train-0.tar'} ...): not read: 6 .txt",
    )
    masks, _ = find_labelled([str(tmp_path)], members=["seg.png"])
    assert [masks[i][1:] for i in range(6)] == [(encode(9), i % 2) for i in range(6)]


@pytest.mark.parametrize(
    ("content", "classes"),
    [
        (b"\xef\xbb\xbfa\r\nb\r\nc\r\n\r\n \r\n", ("a", "b", "c")),
        ("grün\nb\nc".encode("utf-16"), ("grün", "b", "c")),
        (b"a\nb\nc\n\n\n", ("a", "b", "c")),
    ],
)
def test_class_names_in_any_form_of_utf_8(tmp_path, content, classes):
    write_shards(tmp_path, "train", 6)
    (tmp_path / "classes.txt").write_bytes(content)
    assert find_labelled([str(tmp_path)])[0].classes == classes


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"caf\xe9\nb\nc\n", r"classes\.txt is not text in UTF-8 \(byte 0xe9 in line 1\)"),
        (b"a\n\nb\nc\n", r"classes\.txt has nothing in line 2: each line names a class"),
    ],
)
def test_class_names_that_are_refused(tmp_path, content, words):
    write_shards(tmp_path, "train", 6)
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        find_labelled([str(tmp_path)])


def test_a_label_in_another_encoding(tmp_path):
    write_shard(tmp_path / "train-0.tar", [("a", encode(0), "x"), ("b", encode(1), "caf\udce9")])
    with pytest.raises(UserError, match=r"b\.cls in .*train-0\.tar is not text in UTF-8"):
        find_labelled([str(tmp_path)])


def test_classes_of_any_name(tmp_path):
    for folder in (b"caf\xe9", b"a\nb", "größe".encode(), b"[red]"):
        place = os.path.join(os.fsencode(tmp_path), folder)
        os.mkdir(place)
        with open(os.path.join(place, b"\xff.png"), "wb") as file:
            file.write(encode(0))
    train, _ = find_labelled([str(tmp_path)])
    assert train.classes == ("[red]", "a\\nb", "caf\\xe9", "größe")
    assert [train.key(i) for i in range(4)] == [f"{name}/\\xff.png" for name in train.classes]
    assert [train[i][1] for i in range(4)] == [encode(0)] * 4


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.zip", r"a\.zip is neither a folder, a tar shard nor a parquet file, but a \.zip archive: unpack it"),
        ("list.txt", r"list\.txt is neither .*, but a \.txt file: give the folder of the images themselves"),
        ("x", r"x is neither a folder, a tar shard nor a parquet file$"),
    ],
)
def test_roots_that_are_other_files(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"PK")
    for roots in ([str(tmp_path / name)], [str(tmp_path), str(tmp_path / name)]):
        with pytest.raises(UserError, match=words):
            find_labelled(roots)
    with pytest.raises(UserError, match=r"a data root is an empty name"):
        find_labelled([""])


def test_images_without_class_folders(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(0))
    with pytest.raises(UserError, match=r"holds images \(a\.png\), but no folder for each class"):
        find_labelled([str(tmp_path)])


def test_parquet_without_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="needs a column of images and one of labels; it has text, label"):
        find_labelled([str(tmp_path)])


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"image": [1, 2], "label": [0, 1]}, "column image of .* holds no images"),
        ({"image": [{"bytes": encode(0), "path": None}] * 2, "label": [0, None]}, "column label of .* lacks labels"),
        ({"image": [{"bytes": encode(0), "path": None}] * 2, "label": [-1, -1]}, "column label of .* lacks labels"),
    ],
)
def test_parquet_that_is_no_set(tmp_path, monkeypatch, columns, words):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=words):
        find_labelled([str(tmp_path)])


def test_a_name_for_two_classes(tmp_path):
    write_shards(tmp_path, "train", 6)
    (tmp_path / "classes.txt").write_text("crane\ncow\ncrane\n")
    with pytest.raises(UserError, match=r"classes.txt names 'crane' twice"):
        find_labelled([str(tmp_path)])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_each_image_once(tmp_path, world_size):
    write_folders(tmp_path, "train", 23)
    corrupt = tmp_path / "train" / "bee" / "deeper" / "0006.png"
    corrupt.write_bytes(b"no image")
    images, _ = find_labelled([str(tmp_path)])
    read, bad = [], []
    for rank in range(world_size):
        view = functools.partial(view_labelled, EvaluationTransform((6, 6), 1.0))
        loader = make_evaluation_loader(images, view, 4, rank=rank, world_size=world_size)
        for batch in loader:
            assert batch["image"].shape[1:] == (3, 6, 6)
            read += zip(batch["index"].tolist(), batch["label"].tolist(), strict=True)
            bad += batch["corrupt"]
    assert [name for name, _ in bad] == [str(corrupt)]
    whole = [i for i in range(23) if not isinstance(images[i][1], UnreadableImage) and images[i][0] != str(corrupt)]
    assert sorted(read) == [(i, int(images.labels[i])) for i in whole]


@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_the_centre_crop_is_timms(crop_pct):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    theirs = create_transform(24, crop_pct=crop_pct, interpolation="bicubic", mean=(0.0,) * 3, std=(1.0,) * 3)
    ours = EvaluationTransform((24, 24), crop_pct)(torch.from_numpy(pixels).permute(2, 0, 1))
    assert torch.equal(ours.float() / 255, theirs(Image.fromarray(pixels)))


def test_classes_above_training_sets_are_refused(tmp_path):
    """A folder for each class with a folder for each set in it: the other way round is read."""
    for name in ("a", "b"):
        for split in ("train", "val"):
            path = tmp_path / name / split / "0.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(encode(0))
    with pytest.raises(UserError, match=r"/a is divided into training and other images: give folders train and val"):
        find_labelled([str(tmp_path)])


@pytest.mark.parametrize(("label", "reason"), [("", r"b\.cls in .* is empty"), ("-1", "class -1 in the shards")])
def test_labels_that_are_none(tmp_path, label, reason):
    """Either would be a class of its own, and turn the numbers of all others into names."""
    write_shard(tmp_path / "train-0.tar", [("a", encode(0), "1"), ("b", encode(1), label)])
    with pytest.raises(UserError, match=reason):
        find_labelled([str(tmp_path)])


def test_numbers_of_classes_in_shards(tmp_path):
    write_shard(tmp_path / "x.tar", [("a", encode(0), 0), ("b", encode(1), 10**6)])
    with pytest.raises(UserError, match=r"class 1000000 in the shards .* must be below 1,000,000"):
        find_labelled([str(tmp_path)])
    write_shard(tmp_path / "x.tar", [("a", encode(0), 0), ("b", encode(1), 10**6 - 1)])
    with pytest.raises(UserError, match=r"class 1 in .* has no images"):
        find_labelled([str(tmp_path)])
    write_shard(tmp_path / "x.tar", [("a", encode(0), "²"), ("b", encode(1), "1")])  # a digit, and no number
    train, _ = find_labelled([str(tmp_path)])
    assert (train.classes, train.labels.tolist()) == (("1", "²"), [1, 0])


def test_names_in_either_form_of_unicode_are_one_class(tmp_path):
    """As folders that were copied from macOS have them, beside others."""
    name = "Café"
    for split, form in (("train", "NFC"), ("val", "NFD")):
        for folder in (unicodedata.normalize(form, name), "Tea"):
            place = tmp_path / split / folder
            place.mkdir(parents=True)
            (place / "1.png").write_bytes(encode(1))
    train, val = find_labelled([str(tmp_path)])
    assert train.classes == val.classes == ("Café", "Tea")
    assert list(val.labels) == [0, 1]
