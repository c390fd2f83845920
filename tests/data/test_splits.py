"""Which part of a set a folder or shard is, by its name, and what pre-training then reads."""

import os
from pathlib import Path

import pytest

from itpn.data.files import find_images, find_splits, find_training_images
from itpn.data.labelled import find_labelled
from itpn.data.splits import split_folders, split_of, split_of_file
from itpn.errors import UserError


def make(root: Path, *names: str) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return str(root)


def training(root: str) -> list[str]:
    source = find_training_images([root])
    return [os.path.relpath(path, root) for path in source.images + source.shards]


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", "train Train TRAIN training trainval train2017 train_images images-train trainset training_set"),
        ("train", "train_val train-val Train_Val2017"),
        ("train", "trainA train-2 train_256 Train_Data"),
        ("val", "val VAL validation valid dev eval evaluation val2017 Val_256 validation_set"),
        ("test", "test Test testing test2017 test1 test_images testB"),
        (None, "trains train_station bullet_train station invalid validity contest tests device pretrain"),
    ],
)
def test_names_of_folders(split: str | None, names: str) -> None:
    assert {name: split_of(name) for name in names.split()} == dict.fromkeys(names.split(), split)


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", "train-0.tar train.tar Train-0.TAR imagenet-train-0000.tar cc12m_train_01.tgz train2017_00.tar.gz"),
        ("train", "v1.2-train-0.tar train-00000-of-00004.parquet"),
        ("val", "val-0.tar imagenet1k-validation-0.tar valid.tgz"),
        ("test", "test-0.tar wds-test.tgz"),
        (None, "trainstation-0.tar valley-0.tar pretrain-0.tar contest.tar 0000.tar"),
    ],
)
def test_names_of_shards(split: str | None, names: str) -> None:
    assert {name: split_of_file(name) for name in names.split()} == dict.fromkeys(names.split(), split)


def test_names_that_differ_in_the_word_alone() -> None:
    names = ["ILSVRC2012_img_train", "ILSVRC2012_img_val", "train_station", "test_tube", "x"]
    assert split_folders(names) == {"ILSVRC2012_img_train": "train", "ILSVRC2012_img_val": "val"}


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train", "val"),
        ("Train", "Val"),
        ("TRAIN", "TEST"),
        ("training", "validation"),
        ("train2017", "val2017"),
        ("train_images", "test_images"),
        ("cifar_train", "cifar_test"),
    ],
)
def test_pre_training_takes_the_training_part(tmp_path: Path, train: str, val: str) -> None:
    root = make(tmp_path, f"{train}/a/0.jpg", f"{train}/b/0.jpg", f"{val}/a/0.jpg", f"{val}/b/0.jpg")
    assert training(root) == [f"{train}/a/0.jpg", f"{train}/b/0.jpg"]
    assert find_training_images([root]).notes == (f"{root}: for training: {train}; left out: {val}",)
    found = find_splits([root])
    assert [len(source.images) for source in found.values()] == [2, 2]
    sets = find_labelled([root])
    assert [sorted(images.files.name(i) for i in range(2)) for images in sets if images] == [
        [f"{root}/{part}/{name}/0.jpg" for name in "ab"] for part in (train, val)
    ]


def test_the_training_part_of_shards(tmp_path: Path) -> None:
    root = make(tmp_path / "a", "train-0.tar", "train-1.tar", "val-0.tar", "trainee-0.tar")
    assert training(root) == ["train-0.tar", "train-1.tar"]
    assert find_training_images([root]).notes == (
        f"{root}: for training: train-0.tar, train-1.tar; left out: trainee-0.tar, val-0.tar",
    )
    root = make(tmp_path / "b", "train/0.tar", "val/0.tar")
    assert training(root) == ["train/0.tar"]
    root = make(tmp_path / "c", "0.tar", "1.tar")
    assert training(root) == ["0.tar", "1.tar"]
    assert training(f"{root}/1.tar") == ["."]
    both = find_training_images([str(tmp_path / "a/val-0.tar"), str(tmp_path / "a/train-0.tar")])
    assert len(both.shards) == 2  # as they were named one by one


def test_splits_at_any_depth(tmp_path: Path) -> None:
    root = make(tmp_path, "images/train/0.jpg", "images/val/0.jpg", "labels/train/0.txt", "labels/val/0.txt")
    assert training(root) == ["images/train/0.jpg"]
    make(tmp_path, "mine/0.jpg", "bottle/train/good/0.png", "bottle/test/bad/0.png", "bottle/ground_truth/0.png")
    assert training(root) == ["bottle/train/good/0.png", "images/train/0.jpg", "mine/0.jpg"]
    found = find_splits([root])
    assert {split: len(source.images) for split, source in found.items()} == {"train": 3, "val": 1, "test": 1}


def test_masks_beside_images_are_no_images(tmp_path: Path) -> None:
    names = [f"{part}/{split}/0.{end}" for part, end in (("images", "jpg"), ("annotations", "png")) for split in
             ("training", "validation")]  # fmt: skip
    root = make(tmp_path, *names)
    assert training(root) == ["images/training/0.jpg"]
    assert find_training_images([root]).notes == (
        f"{root}: masks are left out, in annotations",
        f"{root}: for training: images/training; left out: images/validation",
    )


@pytest.mark.parametrize("name", ["train", "Train", "test", "val", "valid"])
def test_a_class_may_be_called_so(tmp_path: Path, name: str) -> None:
    root = make(tmp_path, *(f"{c}/{i}.jpg" for c in ("bus", "car", name) for i in range(4)))
    assert len(training(root)) == 12
    assert find_training_images([root]).notes == (
        f"{root}: {name} is taken for a class, beside bus, car; nothing is left out",
    )
    assert {split: len(source.images) for split, source in find_splits([root]).items()} == {"": 12}
    train, val = find_labelled([root], val_fraction=0.25)
    assert val is not None
    assert (train.classes, len(train), len(val)) == (tuple(sorted(("bus", "car", name))), 9, 3)


def test_classes_called_by_the_names_of_two_splits(tmp_path: Path) -> None:
    """Without `train` they are classes; with it the folder is divided."""
    names = ("bus", "dev", "test", "valve")
    root = make(tmp_path / "a", *(f"{c}/{i}.jpg" for c in names for i in range(2)))
    assert find_labelled([root])[0].classes == names
    assert len(training(root)) == 8
    assert find_training_images([root]).notes == (
        f"{root}: dev, test are taken for classes, beside bus, valve; nothing is left out",
    )
    root = make(tmp_path / "b", *(f"{c}/{i}.jpg" for c in ("bus", "car", "test", "train") for i in range(2)))
    assert training(root) == ["train/0.jpg", "train/1.jpg"]
    assert find_training_images([root]).notes == (f"{root}: for training: train; left out: bus, car, test",)
    with pytest.raises(UserError, match=r"b/train holds images \(0\.jpg\), but no folder for each class"):
        find_labelled([root])


def test_a_class_called_train_within_a_split(tmp_path: Path) -> None:
    """As CIFAR-100 has one."""
    root = make(tmp_path, *(f"{s}/{c}/{i}.jpg" for s in ("train", "test") for c in ("bus", "train") for i in range(2)))
    train, val = find_labelled([root])
    assert val is not None
    assert (train.classes, len(train), len(val)) == (("bus", "train"), 4, 4)
    assert len(training(root)) == 4
    assert len(training(f"{root}/train")) == 4


def test_a_training_set_beside_other_folders(tmp_path: Path) -> None:
    """Class folders in it, and in nothing beside it, tell it from a class."""
    root = make(tmp_path / "a", "train/a/0.jpg", "train/b/0.jpg", "figures/0.png", "notes/0.txt")
    assert training(root) == ["train/a/0.jpg", "train/b/0.jpg"]
    assert find_training_images([root]).notes == (f"{root}: for training: train; left out: figures",)
    assert find_labelled([root])[0].classes == ("a", "b")
    root = make(tmp_path / "b", "train/a/0.jpg", "train/b/0.jpg", "notes/0.txt", "0.jpg")
    assert training(root) == ["train/a/0.jpg", "train/b/0.jpg"]
    root = make(tmp_path / "c", "train/a/0.jpg", "train/b/0.jpg", "backup/a/0.jpg", "backup/b/0.jpg")
    for find in (find_training_images, find_splits, find_labelled):
        with pytest.raises(UserError, match=r"c holds train, with folders a, b in it, beside backup: a training set"):
            find([root])
    root = make(tmp_path / "d", "train2017/0.jpg", "unlabeled2017/0.jpg")
    assert training(root) == ["train2017/0.jpg"]
    root = make(tmp_path / "e", *(f"{c}/{side}/0.jpg" for c in ("bus", "car", "train") for side in ("front", "back")))
    assert len(training(root)) == 6


def test_no_training_part(tmp_path: Path) -> None:
    root = make(tmp_path, "val2017/0.jpg", "other/0.jpg")
    assert training(root) == ["other/0.jpg", "val2017/0.jpg"]
    assert find_training_images([root]).notes == (
        f"{root}: nothing in it is called train, so all of it is read, val2017 too",
    )


def test_splits_of_several_roots(tmp_path: Path) -> None:
    """One may hold the training part and another the rest; files say it by their own names."""
    first, second = make(tmp_path / "a", "train/0.jpg"), make(tmp_path / "b", "val/0.jpg", "raw/0.jpg", "val2017/1.jpg")
    found = find_splits([first, second])
    assert {split: len(source.images) for split, source in found.items()} == {"train": 1, "val": 2}
    assert found["train"].notes == (f"{second}: for training: nothing; left out: raw",)
    make(tmp_path / "c", "train-0.tar", "val-0.tar")
    found = find_splits([str(path) for path in sorted((tmp_path / "c").iterdir())])
    assert {split: len(source.shards) for split, source in found.items()} == {"train": 1, "val": 1}
    with pytest.raises(UserError, match="a has nothing called train, unlike another folder"):
        find_splits([first, make(tmp_path / "c" / "a", "x/0.jpg")])


def test_what_is_not_read_is_counted_by_suffix(tmp_path: Path) -> None:
    kinds = ("arw", "fff", "jxl", "kdc", "jpg_large")
    root = make(tmp_path / "a", *(f"{kind}/{i}.{kind}" for kind in kinds for i in range(3)))
    make(tmp_path / "a", "0.jpg", "1.jfif", "2.JPE", "3.ARW", "photo", ".hidden", ".DS_Store", "x/shard.tar.gz")
    source = find_images([root])
    assert [os.path.basename(path) for path in source.images] == ["0.jpg", "1.jfif", "2.JPE"]
    line = "not read: 4 .arw, 3 .fff, 3 .jpg_large, 3 .jxl, 3 .kdc, 1 without a suffix, 1 .tar.gz"
    assert source.notes == (line,)
    assert find_training_images([root]).notes == (line,)
    assert find_splits([root])[""].notes == (line,)
    root = make(tmp_path / "b", *(f"{i}.k{i}" for i in range(11)), "a.jpg", "classes.txt")
    assert find_images([root]).notes == (
        "not read: 1 .k0, 1 .k1, 1 .k10, 1 .k2, 1 .k3, 1 .k4, 1 .k5, 1 .k6, 3 of 3 other suffixes",
    )
    root = make(tmp_path / "c", "0.fff")
    with pytest.raises(UserError, match=r"no images in .*c \(looked for .*\); not read: 1 \.fff"):
        find_images([root])


def test_what_a_class_folder_holds_beside_images(tmp_path: Path) -> None:
    root = make(tmp_path, "a/0.jpg", "a/1.arw", "a/0.npy", "b/0.jfif", "b/1.arw", "readme.md", "features.npy")
    assert find_labelled([root])[0].notes == (f"{root}: not read: 2 .arw, 1 .npy",)
