"""What counts as data in a tree of files, and in which order."""

import errno
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from itpn.data.decode import UnreadableImage
from itpn.data.files import ImageSource, find_images, find_splits
from itpn.data.readers import FileReader
from itpn.data.samples import open_sample
from itpn.data.walk import list_images
from itpn.errors import MachineError, UserError


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names(source: ImageSource, root: Path) -> list[str]:
    return [os.path.relpath(path, root) for path in source.images + source.shards]


def test_tree_of_images(tmp_path: Path) -> None:
    make(tmp_path, "b/2.JPG", "b/1.jpeg", "b/deep/er/x.WebP", "a.png", "c.tif", "B/9.gif", "z.tiff", "y.bmp")
    make(
        tmp_path,
        ".hidden/1.jpg",
        "b/.2.jpg",
        "b/._1.jpeg",
        "__MACOSX/b/2.jpg",
        "lost+found/3.jpg",
        "b/@eaDir/1.jpg",
        "notes.txt",
        "jpg",
        "b/x.jpg.part",
        "extra.tar",
    )
    (tmp_path / "folder.jpg").mkdir()
    found = find_images([tmp_path])
    assert names(found, tmp_path) == [
        "a.png", "c.tif", "y.bmp", "z.tiff", "B/9.gif", "b/1.jpeg", "b/2.JPG", "b/deep/er/x.WebP",
    ]  # fmt: skip
    assert found.shards == ()


def test_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, *(f"{folder}/{name}.jpg" for folder in "cab" for name in "3142"))
    want = find_images([tmp_path])

    class Reversed:
        def __init__(self, path: str) -> None:
            with scandir(path) as scan:
                self.entries = sorted(scan, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *error) -> None:
            pass

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", Reversed)
    assert find_images([tmp_path]) == want
    assert list(want.images) == sorted(want.images)


def test_links(tmp_path: Path) -> None:
    make(tmp_path, "real/1.jpg", "elsewhere/2.jpg")
    os.symlink(tmp_path, tmp_path / "real" / "loop")
    os.symlink(tmp_path / "elsewhere", tmp_path / "real" / "linked")
    os.symlink(tmp_path / "nothing", tmp_path / "real" / "dead.jpg")
    os.mkfifo(tmp_path / "real" / "pipe.jpg")  # reading it would wait for ever
    os.mkfifo(tmp_path / "real" / "pipe.tar")
    os.mkfifo(tmp_path / "real" / "pipe")
    found = find_images([tmp_path / "real"])
    assert names(found, tmp_path) == ["real/1.jpg", "real/dead.jpg", "real/linked/2.jpg"]
    assert found.notes == ("not read: 2 special files",)


def test_several_roots_in_the_order_given(tmp_path: Path) -> None:
    make(tmp_path, "b/1.jpg", "a/1.jpg", "single.png")
    roots = [tmp_path / "b", str(tmp_path / "a"), tmp_path / "single.png", tmp_path / "b"]
    assert names(find_images(roots), tmp_path) == ["b/1.jpg", "a/1.jpg", "single.png"]


def test_a_hidden_root_is_meant(tmp_path: Path) -> None:
    make(tmp_path, ".cache/1.jpg")
    assert names(find_images([tmp_path / ".cache"]), tmp_path) == [".cache/1.jpg"]


def test_shards(tmp_path: Path) -> None:
    make(tmp_path, "s/b.tar", "s/a.tar.gz", "s/deep/c.TGZ", "s/.d.tar", "s/readme.md")
    assert names(find_images([tmp_path / "s"]), tmp_path) == ["s/a.tar.gz", "s/b.tar", "s/deep/c.TGZ"]
    found = find_images([tmp_path / "s" / "b.tar", tmp_path / "s" / "deep"])
    assert names(found, tmp_path) == ["s/b.tar", "s/deep/c.TGZ"]
    assert found.images == ()


def test_wrong_roots_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "images/1.jpg", "shards/1.tar", "empty/notes.txt")
    for roots, message in [
        ([tmp_path / "imagse"], "imagse does not exist"),
        ([tmp_path / "empty"], r"no images in .*empty \(looked for .jpg .* and .tar shards\)"),
        ([tmp_path / "images", tmp_path / "shards"], "both images .* and tar shards"),
        ([tmp_path / "empty" / "notes.txt"], "neither a folder, an image nor a tar shard"),
        ([], "no images in an empty list"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            find_images(roots)
        assert "\n" not in str(error.value)


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "1.jpg")

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    for find in (find_images, find_splits):
        with pytest.raises(MachineError, match=r"cannot read the folder .*: Permission denied; check"):
            find([str(tmp_path)])


def test_splits(tmp_path: Path) -> None:
    make(tmp_path / "a", "train/c/1.jpg", "VAL/c/2.jpg", "raw/3.jpg", "4.jpg")
    make(tmp_path / "b", "wds-train-0.tar", "wds-train-1.tar", "test.tgz", "other.tar", "training/readme")
    make(tmp_path / "c", "val/1.jpg", "x/1.jpg")
    found = find_splits([str(tmp_path / "a")])
    assert {split: names(source, tmp_path / "a") for split, source in found.items()} == {
        "train": ["train/c/1.jpg"],
        "val": ["VAL/c/2.jpg"],
    }
    assert found["train"].roots == (str(tmp_path / "a/train"),)
    (tmp_path / "b/training/readme").unlink()
    (tmp_path / "b/training").rmdir()
    found = find_splits([str(tmp_path / "b")])
    assert {split: names(source, tmp_path / "b") for split, source in found.items()} == {
        "train": ["wds-train-0.tar", "wds-train-1.tar"],
        "test": ["test.tgz"],
    }
    assert {split: len(source.images) for split, source in find_splits([str(tmp_path / "c")]).items()} == {"": 2}
    for other, message in (("b", "images .* and tar shards .* were given"), ("c/x", "has nothing called train")):
        with pytest.raises(UserError, match=message):
            find_splits([str(tmp_path / "a"), str(tmp_path / other)])
    make(tmp_path / "d", "train/1.jpg", "val.tar")
    with pytest.raises(UserError, match="images and tar shards side by side"):
        find_splits([str(tmp_path / "d")])


def test_needs_no_heavy_imports() -> None:
    code = "import itpn.data.files, sys; print({'torch', 'numpy', 'PIL', 'torchvision'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_data_modules_import_no_detector():
    code = "import itpn.data.objects, itpn.data.labelmaps, sys; print({'itpn.models.detector'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


DICOM = bytes(128) + b"DICM"


def test_dicom_is_recognized_without_a_suffix(tmp_path: Path) -> None:
    """Or with a number as its suffix; no other file is looked into, and the index of a disk is no image."""
    make(tmp_path, "s/notes", "s/2.16", "s/a.txt", "s/b.dcm")
    for name in ("s/IM0001", "s/1.2.840.113.17", "s/DICOMDIR", "s/c.txt"):
        (tmp_path / name).write_bytes(DICOM)
    found = find_images([tmp_path / "s"])
    assert names(found, tmp_path) == ["s/1.2.840.113.17", "s/IM0001", "s/b.dcm"]
    assert found.notes == ("not read: 2 without a suffix, 2 .txt, 1 .16",)
    assert names(find_images([tmp_path / "s" / "IM0001"]), tmp_path) == ["s/IM0001"]
    with pytest.raises(UserError, match="neither a folder, an image nor a tar shard"):
        find_images([tmp_path / "s" / "notes"])


def test_only_names_that_tell_nothing_are_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.jpg", "b.txt", "c.tif", "d", "e.7", "f.tar")
    reads: list[tuple[str, int]] = []
    monkeypatch.setattr("itpn.data.file_types._read_start", lambda *args: reads.append(args) or b"")
    find_images([tmp_path])
    assert reads == [(str(tmp_path / "d"), 132), (str(tmp_path / "e.7"), 132)]


def test_a_lost_disk_is_no_folder_without_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "IM0001", "a.jpg")

    def refuse(path: str, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr("builtins.open", refuse)
    number = errno.EIO
    with pytest.raises(MachineError, match=r"IM0001 cannot be read: Input/output error; look whether"):
        find_images([tmp_path])
    number = errno.EACCES
    assert find_images([tmp_path]).notes == ("not read: 1 without a suffix",)


def test_envi_is_recognized_by_its_header(tmp_path: Path) -> None:
    make(tmp_path, "s/a.img", "s/b.dat", "s/c.bsq", "s/d.bil", "s/e.BIP", "s/f.img", "s/g.dat", "s/g.hdr")
    for name in ("a.hdr", "b.dat.hdr", "c.hdr", "d.hdr", "e.hdr", "alone.hdr"):
        (tmp_path / "s" / name).write_text("ENVI\nsamples = 2\n")
    found = find_images([tmp_path / "s"])
    assert names(found, tmp_path) == ["s/a.img", "s/b.dat", "s/c.bsq", "s/d.bil", "s/e.BIP"]
    assert found.notes == ("not read: 2 .hdr, 1 .dat, 1 .img",)
    make(tmp_path, "t/a.img", "t/a.hdr")
    with pytest.raises(UserError, match=r"no images in .*t \(looked for .*\); not read: 1 \.hdr, 1 \.img$"):
        find_images([tmp_path / "t"])


def test_formats_of_science(tmp_path: Path) -> None:
    kinds = ["avif", "btf", "dcm", "dicom", "heic", "heif", "j2k", "jp2", "ome.tif", "tf8"]
    make(tmp_path, *(f"s/a.{kind}" for kind in kinds), "s/b.jxl")
    assert names(find_images([tmp_path / "s"]), tmp_path) == [f"s/a.{kind}" for kind in kinds]
    arrays = ["h5", "hdf5", "npy", "npz"]
    make(tmp_path, *(f"t/a.{kind}" for kind in arrays))
    assert names(find_images([tmp_path / "t"]), tmp_path) == [f"t/a.{kind}" for kind in arrays]


def test_arrays_beside_images_are_none(tmp_path: Path) -> None:
    """But features, labels or the like."""
    make(tmp_path, "s/x/a.tif", "s/x/a.npy", "s/features.npz", "s/train.h5")
    found = find_images([tmp_path / "s"])
    assert names(found, tmp_path) == ["s/x/a.tif"]
    assert found.notes == ("not read: 1 .h5, 1 .npy, 1 .npz",)
    unread = Counter[str]()
    assert list_images(str(tmp_path / "s"), unread) == [str(tmp_path / "s" / "x" / "a.tif")]
    assert unread == {".h5": 1, ".npy": 1, ".npz": 1}
    assert names(find_images([tmp_path / "s" / "x" / "a.npy"]), tmp_path) == ["s/x/a.npy"]


def test_a_link_that_leads_back_to_itself_is_an_image_that_cannot_be_read(tmp_path):
    """As a dangling link is: it is named when it is read, and the others are."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.symlink("b.tif", tmp_path / "b.tif")
    os.symlink(".", tmp_path / "again")
    source = find_images([tmp_path])
    assert source.images == (str(tmp_path / "a.png"), str(tmp_path / "b.tif"))
    _, data = FileReader(source.images)[1]
    with pytest.raises(UnreadableImage, match=r"^Too many levels of symbolic links$"):
        open_sample(data)
