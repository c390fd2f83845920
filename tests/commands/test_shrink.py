"""`itpn shrink`: the same shards however they came about, and what is trained from them."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

import itpn.data.shrinking
from itpn.cli import main
from itpn.data.files import find_images, find_training_images
from itpn.data.labelled import find_labelled
from itpn.data.shards import read_shard

ROOT = Path(__file__).parents[2]


def draw(path: Path, seed: int, size: tuple[int, int] = (90, 60), **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, **options)


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """24 images of two classes."""
    folder = tmp_path_factory.mktemp("large")
    for i in range(24):
        draw(folder / "cd"[i % 2] / f"{i:02d}.{'jpg' if i % 3 else 'png'}", i)
    return folder


def shrink(*arguments, size: int = 5, workers: int = 0) -> int:
    numbers = ["--short-side", "32", "--shard-size", str(size), "--num-workers", str(workers)]
    return main(["shrink", *map(str, arguments[:-1]), "--out", str(arguments[-1]), *numbers])


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.rglob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


@pytest.fixture(scope="session")
def whole(large, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert shrink(large, out) == 0
    return out


def test_shards(large, whole, capsys):
    assert sorted(contents(whole)) == ["classes.txt", *(f"images-0000{i}.tar" for i in range(5)), "itpn-shrink.json"]
    found = members(whole)
    for i in range(24):
        key = f"{'cd'[i % 2]}/{i:02d}"
        assert Image.open(io.BytesIO(found[f"{key}.jpg"])).size == (48, 32)
        assert found[f"{key}.cls"] == str(i % 2).encode()
    assert shrink(large, whole) == 0
    before = sum(path.stat().st_size for path in large.rglob("*.*"))
    out = capsys.readouterr().out
    assert "5 of 5 shards are there already\n24 images, " in out
    assert f"{before / 1000:.1f} kB before, " in out
    assert out.endswith(f"after; train from them with --data.root {whole}\n")


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(large, whole, tmp_path, workers):
    assert shrink(large, tmp_path / "out", workers=workers) == 0
    assert contents(tmp_path / "out") == contents(whole)


def test_killed_and_gone_on_with(tmp_path, capsys):
    (tmp_path / "large").mkdir()
    for i in range(40):
        if i < 4:
            draw(tmp_path / f"large/{i}.jpg", i, (1800, 1200))
        else:
            os.link(tmp_path / f"large/{i % 4}.jpg", tmp_path / f"large/{i}.jpg")
    assert shrink(tmp_path / "large", tmp_path / "want", size=2, workers=1) == 0
    out = tmp_path / "out"
    arguments = ["shrink", tmp_path / "large", "--out", out, "--short-side", "32", "--shard-size", "2"]
    process = subprocess.Popen([sys.executable, "-m", "itpn", *arguments, "--num-workers", "1"])
    while not (out / "images-00001.tar").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 2 <= len(list(out.glob("*.tar"))) < 20
    first = (out / "images-00000.tar").stat()
    assert shrink(tmp_path / "large", out, size=2) == 0
    assert " of 20 shards are there already" in capsys.readouterr().out
    assert (out / "images-00000.tar").stat() == first
    assert contents(out) == contents(tmp_path / "want")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("workers", [0, 1])
def test_stopped_and_gone_on_with(large, whole, tmp_path, capsys, monkeypatch, signum, code, workers):
    write_tar = itpn.data.shrinking.write_tar

    def stop(path, members):
        if path.name == "images-00002.tar":
            next(members)
            os.kill(os.getpid(), signum)
        write_tar(path, members)

    with monkeypatch.context() as patched:
        patched.setattr(itpn.data.shrinking, "write_tar", stop)
        assert shrink(large, tmp_path / "out", workers=workers) == code
    assert capsys.readouterr().err == "stopped with 2 of 5 shards done; the same command resumes\n"
    assert shrink(large, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(whole)


def test_a_signal_while_an_image_is_decoded(large, tmp_path, monkeypatch):
    """It is no fault of the image."""
    decode_jpeg = itpn.data.decode.decode_jpeg

    def stop(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return decode_jpeg(*arguments, **options)

    monkeypatch.setattr(itpn.data.decode, "decode_jpeg", stop)
    assert shrink(large, tmp_path / "out") == 143


def test_a_shard_that_was_removed_is_made_again(large, whole, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "images-00003.tar").unlink()
    assert shrink(large, out) == 0
    assert "4 of 5 shards are there already" in capsys.readouterr().out
    assert contents(out) == contents(whole)


def mistake(capsys) -> str:
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("itpn: ")
    return error


def test_other_settings_and_images_are_refused(large, whole, tmp_path, capsys):
    before = contents(whole)
    for options, answer in [
        (["--short-side", "33"], "holds shards with short side 32, not 33; choose another --out"),
        (["--quality", "90"], "with quality 95, not 90"),
        (["--shard-size", "6"], "with shard size 5, not 6"),
    ]:
        standard = ["--short-side", "32", "--shard-size", "5", "--num-workers", "0"]
        assert main(["shrink", str(large), "--out", str(whole), *standard, *options]) == 2
        assert answer in mistake(capsys)
    draw(tmp_path / "c/00.png", 0)
    assert shrink(tmp_path, whole) == 2
    assert "holds shards of other images" in mistake(capsys)
    assert contents(whole) == before


def test_folders_of_others_are_left_alone(large, tmp_path, capsys, monkeypatch):
    draw(tmp_path / "mine/deep/1.png", 0)
    assert shrink(large, tmp_path / "mine") == 2
    assert "holds images, shards or features already" in mistake(capsys)
    assert list(contents(tmp_path / "mine")) == ["deep/1.png"]
    monkeypatch.setattr(itpn.data.shrinking, "LOCK_SECONDS", 0)
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out/.lock"):
        assert shrink(large, tmp_path / "out") == 2
    assert "in use by another process" in mistake(capsys)
    (tmp_path / "out/itpn-shrink.json").write_text("{")
    assert shrink(large, tmp_path / "out") == 2
    assert "itpn-shrink.json is corrupt" in mistake(capsys)


@pytest.mark.parametrize("fitting", [0, 2])
def test_a_full_disk(large, tmp_path, capsys, monkeypatch, fitting):
    left = 2 * 5 * fitting  # images and labels of so many shards

    def addfile(tar, member, file=None, original=tarfile.TarFile.addfile):
        nonlocal left
        if not left:
            raise OSError(28, "No space left on device")
        left -= 1
        original(tar, member, file)

    with monkeypatch.context() as patched:
        patched.setattr(tarfile.TarFile, "addfile", addfile)
        assert shrink(large, tmp_path / "out") == 1
    said = mistake(capsys)
    assert said.startswith(f"itpn: make room on the disk: --out {tmp_path / 'out'} cannot be written: No space left")
    assert said.endswith(f"({fitting} of 5 shards are done, the same command resumes)")
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert shrink(large, tmp_path / "out") == 0
    if fitting:
        assert f"{fitting} of 5 shards are there already" in capsys.readouterr().out


def test_corrupt_images(large, tmp_path, capsys):
    folder, out = tmp_path / "large", tmp_path / "out"
    shutil.copytree(large, folder)
    (folder / "c/broken.jpg").write_bytes((folder / "c/02.jpg").read_bytes()[:300])
    assert shrink(folder, out) == 0
    done = capsys.readouterr()
    assert done.err.count("skipped") == 1
    assert f"skipped {folder}/c/broken.jpg: " in done.err
    assert "24 images (1 corrupt ones left out), " in done.out
    assert len(members(out)) == 48
    assert shrink(folder, out) == 0
    done = capsys.readouterr()
    assert done.err == ""
    assert "24 images (1 corrupt ones left out), " in done.out


def test_too_many_corrupt_images(large, tmp_path, capsys):
    folder, out = tmp_path / "large", tmp_path / "out"
    shutil.copytree(large, folder)
    mended = {folder / f"c/{i}.jpg": i for i in range(2)}
    for path in mended:
        path.touch()
    assert shrink(folder, out) == 2
    assert "2 of 26 images cannot be read, more than 5%" in mistake(capsys)
    for path, seed in mended.items():
        draw(path, seed)
    assert shrink(folder, out) == 0  # those mended are taken in
    assert "26 images, " in capsys.readouterr().out
    assert shrink(folder, tmp_path / "want") == 0
    assert contents(out) == contents(tmp_path / "want")


def test_images_that_are_no_photographs(large, tmp_path, capsys):
    """They are refused before anything is written, or, where they come late, before the shard that they would be in."""
    folder, out = tmp_path / "deep", tmp_path / "out"
    folder.mkdir()
    np.save(folder / "bands.npy", np.zeros((7, 40, 50), np.int16))
    assert shrink(folder, out) == 2
    why = (
        "which JPEG cannot hold: itpn shrink is for photographs of 8 bits; train from the images themselves, large "
        "ones in parts by --data.window-size"
    )
    assert mistake(capsys) == f"itpn: {folder}/bands.npy has 7 channels of int16, {why}"
    assert not out.exists()
    mixed = tmp_path / "mixed"
    for i in range(20):
        draw(mixed / "one" / f"{i}.png", i)
    Image.fromarray(np.full((60, 90), 40000, np.uint16)).save(mixed / "one/x.png")
    originals = [one.path for one in itpn.data.resized_copies.list_originals(find_images([str(mixed)]))]
    place = originals.index(f"{mixed}/one/x.png")
    for workers in (0, 1):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(itpn.data.shrinking, "TRIED", 0)
            assert shrink(mixed, out, workers=workers) == 2
        assert mistake(capsys) == f"itpn: {mixed}/one/x.png has 1 channel of uint16, {why}"
        assert len([*out.glob("**/*.tar")]) == place // 5
        assert not [*out.glob("**/*.tmp")]


def test_splits_and_labels(tmp_path):
    """A root of a classifier stays one, its names of classes too; what lies beside is left out."""
    root, out = tmp_path / "root", tmp_path / "out"
    for i in range(12):
        draw(root / "train" / ["10", "9", "cat"][i % 3] / f"{i}.jpg", i)
    draw(root / "val/cat/1.jpg", 1)
    draw(root / "test/1.jpg", 1)
    draw(root / "raw/1.jpg", 1)
    assert shrink(root, out) == 0
    assert (out / "classes.txt").read_text().split() == ["10", "9", "cat"]
    train, val = find_labelled([str(out)])
    assert (len(train), len(val), train.classes) == (12, 1, ("10", "9", "cat"))
    for images in (train, val):
        for index, label in enumerate(images.labels):
            assert f"/{images.classes[label]}/" in images.files.name(index)
    assert [os.path.basename(path) for path in find_training_images([out]).shards] == [
        f"images-0000{i}.tar" for i in range(3)
    ]
    assert [name for name, _ in read_shard(out / "test/images-00000.tar")] == ["images-00000.tar/1.jpg"]
    again = tmp_path / "again"
    assert shrink(out, again) == 0  # labels of shards are kept as well
    train_again, val_again = find_labelled([str(again)])
    assert train_again.classes == train.classes
    assert (list(train_again.labels), list(val_again.labels)) == (list(train.labels), list(val.labels))
    assert train_again[0][1] == train[0][1]  # small already


def test_folders_that_are_no_classes(tmp_path):
    """A lone image beside them, one folder for all, or others to evaluate on."""
    for name, paths in {"lone": ["c/1", "d/1", "1"], "one": ["c/1", "c/2"]}.items():
        for path in paths:
            draw(tmp_path / f"{name}/{path}.jpg", 0)
        assert shrink(tmp_path / name, tmp_path / f"{name}-out") == 0
        assert sorted(members(tmp_path / f"{name}-out")) == sorted(f"{path}.jpg" for path in paths)
        assert not (tmp_path / f"{name}-out/classes.txt").exists()
    for path in ("train/c/1", "train/d/1", "val/images/1"):
        draw(tmp_path / f"three/{path}.jpg", 0)
    assert shrink(tmp_path / "three", tmp_path / "three-out") == 0
    assert sorted(members(tmp_path / "three-out")) == ["c/1.cls", "c/1.jpg", "d/1.cls", "d/1.jpg", "images/1.jpg"]


def test_splits_by_the_names_of_shards(large, whole, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for i, name in enumerate(("wds-train-0", "wds-train-1", "wds-validation-0")):
        shutil.copy(whole / f"images-0000{i}.tar", shards / f"{name}.tar")
    assert shrink(shards, tmp_path / "out") == 0
    train, val = find_labelled([str(tmp_path / "out")])
    assert (len(train), len(val), train.classes) == (10, 5, ("0", "1"))
    assert train.files.name(0).startswith("images-00000.tar/wds-train-0/")
    assert shrink(*sorted(shards.iterdir()), tmp_path / "files") == 0
    assert members(tmp_path / "files") == members(tmp_path / "out")
    (shards / "wds-train-0.tar").write_bytes((shards / "wds-train-0.tar").read_bytes()[:5000])
    assert shrink(shards, tmp_path / "cut") == 2
    assert not (tmp_path / "cut").exists()


def test_training_from_them(whole, tmp_path):
    steps = ["--trainer.max-steps", "2", "--data.batch-size", "4", "--data.num-workers", "0"]
    common = ["--data.root", str(whole), *steps, "--output-dir", str(tmp_path)]
    small = ["--data.img-size", "32", "--model.decoder-embed-dim", "32", "--model.decoder-depth", "1"]
    assert main(["train", "itpn-pixel_nano", *common, *small]) == 0
    run = tmp_path / "itpn-pixel_nano/default"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["images_seen"], summary["images_skipped"]) == (8, 0)
    checkpoint = ["--model.checkpoint", str(run / "model.safetensors")]
    assert main(["train", "classifier_small", *common, *checkpoint, "--data.img-size", "32"]) == 0


def test_sets_by_the_names_of_coco_are_not_mixed(large, tmp_path, capsys):
    shutil.copytree(large / "c", tmp_path / "coco/train2017")
    shutil.copytree(large / "d", tmp_path / "coco/val2017")
    shutil.copytree(large / "d", tmp_path / "coco/unlabeled2017")
    assert shrink(tmp_path / "coco", tmp_path / "out") == 0
    assert f"{tmp_path}/coco: for training: train2017; left out: unlabeled2017\n" in capsys.readouterr().err
    for split, name in (("train", "c"), ("val", "d")):
        source = find_images([tmp_path / "out" / split])
        numbers = {int(Path(name).stem) % 2 for shard in source.shards for name, _ in read_shard(shard)}
        assert (len(source.shards), numbers) == (3, {"cd".index(name)})
    assert len(find_training_images([tmp_path / "out"]).shards) == 3


def test_a_class_called_train(large, tmp_path, capsys):
    for name in ("bus", "car", "train"):
        shutil.copytree(large / "c", tmp_path / "all" / name)
    shutil.copy(large / "c" / "00.png", tmp_path / "all" / "bus" / "x.arw")
    assert shrink(tmp_path / "all", tmp_path / "out", size=36) == 0
    err = capsys.readouterr().err
    assert "train is taken for a class, beside bus, car; nothing is left out\nnot read: 1 .arw\n" in err
    train, _ = find_labelled([str(tmp_path / "out")])
    assert (len(train), train.classes) == (36, ("bus", "car", "train"))


def test_one_image_of_a_sample(tmp_path, capsys):
    """Members that describe an image are written only where --members names them."""
    draw(tmp_path / "0.jpg", 0)
    draw(tmp_path / "1.png", 1)
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "a.tar", "w") as tar:
        for key in "xyz":
            for ending, path in (("jpg", "0.jpg"), ("seg.png", "1.png")):
                tar.add(tmp_path / path, f"v1.0/{key}.{ending}")
            label = tarfile.TarInfo(f"v1.0/{key}.cls")
            label.size = 1
            tar.addfile(label, io.BytesIO(b"7"))
    with tarfile.open(tmp_path / "in" / "b.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.fff"))
    assert shrink(tmp_path / "in" / "b.tar", tmp_path / "none") == 2
    assert "b.tar ...); not read: 1 .fff\n" in capsys.readouterr().err
    assert shrink(tmp_path / "in", tmp_path / "out") == 0
    err = capsys.readouterr().err
    assert "not written of the shards: 3 .seg.png (see --data.members)\nshards: not read: 1 .fff\n" in err
    (tmp_path / "in" / "b.tar").unlink()
    assert sorted(members(tmp_path / "out")) == [f"a/v1.0/{key}.{ending}" for key in "xyz" for ending in ("cls", "jpg")]
    assert shrink(tmp_path / "in", "--members", "seg.png", "--quality", "90", tmp_path / "seg") == 0
    assert "not written of the shards: 3 .jpg (see --data.members)\n" in capsys.readouterr().err
    assert shrink(tmp_path / "in", "--members", "all", tmp_path / "all") == 0
    assert len(members(tmp_path / "all")) == 12
    assert capsys.readouterr().err == ""
    assert shrink(tmp_path / "in", "--members", "txt", tmp_path / "none") == 2
    assert "--data.members txt is no ending of an image" in capsys.readouterr().err


@pytest.mark.parametrize("numbered", [False, True])
def test_the_name_of_a_class_stays(tmp_path, numbered):
    names = ("0 cat ", "1 cat", "2 dog\u00a0", "3 ") if numbered else (" cat ", "cat", "dog\u00a0", " ")
    for number, name in enumerate(names):
        (tmp_path / "in" / name).mkdir(parents=True)
        draw(tmp_path / "in" / name / "a.jpg", number)
    train, _ = find_labelled([str(tmp_path / "in")])
    assert shrink(tmp_path / "in", tmp_path / "out") == 0
    assert shrink(tmp_path / "out", tmp_path / "again") == 0
    for out in ("out", "again"):
        small, _ = find_labelled([str(tmp_path / out)])
        assert small.classes == train.classes == tuple(sorted(names))
        assert sorted(small.labels) == [0, 1, 2, 3]


def test_what_is_not_complete_is_not_trained_from(large, tmp_path, capsys, monkeypatch):
    def stop(*_):
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(itpn.data.shrinking.SkippedImages, "check", stop)  # after the first shard
        assert shrink(large, tmp_path / "out") == 130
    assert len(list((tmp_path / "out").glob("*.tar"))) == 1
    assert main(["train", "itpn-pixel_nano", "--data.root", str(tmp_path / "out")]) == 2
    assert f"{tmp_path}/out is not complete: repeat the `itpn shrink`" in capsys.readouterr().err
    assert shrink(large, tmp_path / "out") == 0
    assert len(find_training_images([tmp_path / "out"]).shards) == 5


def test_empty_names(large, tmp_path, capsys):
    for arguments in (["shrink", str(large), "--out", ""], ["shrink", "", "--out", str(tmp_path / "out")]):
        assert main(arguments) == 2
        assert "a folder's name is empty" in capsys.readouterr().err
