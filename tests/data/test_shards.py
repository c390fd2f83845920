"""Tar shards: what is read, in which order, and who reads what."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from itpn.data.augment import EvaluationTransform
from itpn.data.decode import UnreadableImage
from itpn.data.files import find_images
from itpn.data.labelled import read_split
from itpn.data.loader import TrainingLoader
from itpn.data.members import split_name
from itpn.data.readers import unpack
from itpn.data.resized_copies import list_originals
from itpn.data.shards import check_shards, count_shard_images, index_shard, read_shard, shard_samples
from itpn.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def make_shard(path: Path, names: list[str], size: int = 700) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(name.encode().ljust(size, b".")))
    return path


def make_shards(folder: Path, shards: int, images: int) -> list[str]:
    return [str(make_shard(folder / f"{s}.tar", [f"{s}_{i}.jpg" for i in range(images)])) for s in range(shards)]


def keys(samples) -> list[str]:
    return [key for key, _ in samples]


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz", "s.tgz"])
def test_members(tmp_path: Path, name: str) -> None:
    members = ["./b.jpg", "b.cls", "c/d.PNG", "c/.e.jpg", "._b.jpg", ".f/g.jpg", "a.webp", "x" * 150 + ".jpg"]
    shard = make_shard(tmp_path / name, members)
    want = [f"{name}/{member}" for member in ("./b.jpg", "c/d.PNG", "a.webp", "x" * 150 + ".jpg")]
    samples = list(read_shard(shard))
    assert [key.replace("/./", "/") for key in keys(samples)] == [key.replace("/./", "/") for key in want]
    assert samples[1][1] == b"c/d.PNG".ljust(700, b".")
    assert count_shard_images([shard, shard]) == 8


def test_a_key_ends_at_the_first_dot_of_the_base_name() -> None:
    for name, key, ending in [
        ("a.b/0001.seg.PNG", "a.b/0001", "seg.png"),
        ("./x.jpg", "./x", "jpg"),
        ("x", "x", ""),
        ("v1.2/x/y.cls", "v1.2/x/y", "cls"),
    ]:
        assert split_name(name) == (key, ending)


PLAIN = ["a.b/0.jpg", "a.b/0.seg.png", "a.b/0.cls", "a.b/1.depth.png", "a.b/1.png", "a.b/1.cls"]


@pytest.mark.parametrize(
    ("names", "members", "want"),
    [
        (PLAIN, (), ["a.b/0.jpg", "a.b/1.png"]),
        (PLAIN, ("seg.png", ".Depth.PNG"), ["a.b/0.seg.png", "a.b/1.depth.png"]),
        (PLAIN, ("all",), ["a.b/0.jpg", "a.b/0.seg.png", "a.b/1.depth.png", "a.b/1.png"]),
        (["0.rgb.png", "0.json", "1.rgb.png"], (), ["0.rgb.png", "1.rgb.png"]),
        (["0.rgb.png", "0.mask.png", "1.mask.png", "1.rgb.png"], (), ["0.rgb.png", "1.rgb.png"]),
        (["0.jpg", "2024.05.jpg", "0.mask.png"], (), ["0.jpg", "2024.05.jpg"]),  # alone of its key; a mask never is
        (["0.image.jpg", "0.mask_1.png", "0.seg2.png", "0.label-03.png"], (), ["0.image.jpg"]),
        (["0.jpg", "0.npy", "1.npy", "2.rgb.png", "2.npz"], (), ["0.jpg", "1.npy", "2.rgb.png"]),  # features, 1.npy not
        (["0.jpg", "0.npy", "1.jpg", "1.npy"], ("npy",), ["0.npy", "1.npy"]),
        (["0.jpg", "1.jpg", "0.seg.png", "1.seg.png"], (), ["0.jpg", "1.jpg"]),  # not beside one another
    ],
)
def test_one_image_of_a_sample(tmp_path: Path, names: list[str], members: tuple[str, ...], want: list[str]) -> None:
    shard = make_shard(tmp_path / "s.tar", names)
    assert keys(read_shard(shard, members)) == [f"s.tar/{name}" for name in want]
    assert count_shard_images([shard], members) == len(want)
    assert [place.name for place in index_shard(str(shard), members)] == want
    assert keys(shard_samples([str(shard)], 0, 0, 0, 1, 1, members)) == [f"s.tar/{name}" for name in want]


def test_members_of_one_name_are_images_of_their_own(tmp_path: Path) -> None:
    members = [("0.jpg", b"a"), ("0.cls", b"1"), ("1.jpg", b"b"), ("1.cls", b"0"), ("0.jpg", b"c"), ("0.cls", b" 1\n")]
    shard = tmp_path / "s.tar"

    def write() -> None:
        with tarfile.open(shard, "w") as tar:
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    write()
    assert list(read_shard(shard)) == [("s.tar/0.jpg", b"a"), ("s.tar/1.jpg", b"b"), ("s.tar/0.jpg", b"c")]
    assert count_shard_images([shard]) == 3
    places = index_shard(str(shard))
    content = shard.read_bytes()
    assert [content[place.start :][: place.size] for place in places] == [b"a", b"b", b"c"]
    assert [place.label for place in places] == ["1", "0", "1"]
    assert [one.key for one in list_originals(find_images([shard]))] == ["s/0", "s/1", "s/0-2"]
    members[-1] = ("0.cls", b"2")
    write()
    with pytest.raises(UserError, match=r"^0\.cls is in .*s\.tar twice, as '1' and as '2': make it again with one$"):
        index_shard(str(shard))


def test_what_is_told_of_members(tmp_path: Path) -> None:
    shard = str(make_shard(tmp_path / "s.tar", PLAIN))
    assert check_shards([shard]) == [f"{shard}: not read are 1 .seg.png, 1 .depth.png (see --data.members)"]
    assert check_shards([shard], ["all"]) == []
    shard = str(make_shard(tmp_path / "rgb.tar", ["0.rgb.png", "1.rgb.png", "1.seg.png"]))
    assert check_shards([shard]) == [
        f"{shard}: read, for want of plain images, are 2 .rgb.png; not read are 1 .seg.png (see --data.members)"
    ]


UNREAD = ["1.fff", "1.FFF", "2.arw", "3.mat", "0.seg.mat", "0.json", ".0.txt", "classes.txt", "0.cls", "README"]


def test_members_that_cannot_be_read_are_counted_as_files_are(tmp_path: Path) -> None:
    want = "not read: 2 .fff, 2 .mat, 1 without a suffix, 1 .arw, 1 .json"
    (tmp_path / "files").mkdir()
    for name in ["0.jpg", *(name for name in UNREAD if not name.endswith(".cls"))]:
        (tmp_path / "files" / name).write_bytes(b"")
    assert find_images([tmp_path / "files"]).notes == (want,)
    shard = str(make_shard(tmp_path / "s.tar", ["0.jpg", "0.seg.png", *UNREAD]))
    assert check_shards([shard]) == [f"{shard}: not read are 1 .seg.png (see --data.members)", f"{shard}: {want}"]
    assert check_shards([shard], ["all"]) == [f"{shard}: {want}"]  # which it cannot help
    unread = Counter[str]()
    assert len(index_shard(shard, unread=unread)) == count_shard_images([shard], unread=unread) == 1
    assert unread == {".fff": 4, ".mat": 4, "": 2, ".arw": 2, ".json": 2}


def add_other(shard: Path, kind: bytes, *names: str) -> None:
    with tarfile.open(shard, "a") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "0.jpg"
            tar.addfile(member)


def test_links_and_pipes_are_counted(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "s.tar", ["0.jpg", "0.cls"])
    add_other(shard, tarfile.LNKTYPE, "1.jpg", "1.cls", ".2.jpg", "README")
    add_other(shard, tarfile.SYMTYPE, "2.PNG", "2.rgb.png")
    add_other(shard, tarfile.FIFOTYPE, "3.jpg")
    add_other(shard, tarfile.DIRTYPE, "4.jpg")
    note = "not read: 4 links, 1 special file"
    assert check_shards([str(shard)]) == [f"{shard}: {note}"]
    unread = Counter[str]()
    assert count_shard_images([shard], unread=unread) == len(index_shard(str(shard), unread=unread)) == 1
    assert unread == {"link": 8, "special file": 2}
    assert read_split([str(shard)], "train").notes == (f"shards ({shard} ...): {note}",)


def test_links_are_named_where_nothing_can_be_read(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "alone.tar", ["0.cls"])
    add_other(shard, tarfile.SYMTYPE, "0.jpg")

    def load() -> None:
        TrainingLoader(find_images([shard]), EvaluationTransform(32, 1.0), batch_size=1, num_workers=0, seed=0)

    for read_it in (lambda: read_split([str(shard)], "train"), load):
        with pytest.raises(UserError, match=r"^no images .*in the shards .*[:;] not read: 1 link$"):
            read_it()
    shard = make_shard(tmp_path / "label.tar", ["0.jpg"])
    add_other(shard, tarfile.LNKTYPE, "0.cls")
    with pytest.raises(UserError, match=r"^0\.jpg in .* has no 0\.cls beside it: .*; not read: 1 link$"):
        read_split([str(shard)], "train")
    shard = make_shard(tmp_path / "masks.tar", ["0.seg.png"])
    add_other(shard, tarfile.LNKTYPE, "0.jpg")
    for find in (index_shard, lambda path: check_shards([path])):
        with pytest.raises(UserError, match=r"holds no plain images, but 1 \.seg\.png: .*; not read: 1 link$"):
            find(str(shard))


@pytest.mark.parametrize(
    ("names", "members", "problem"),
    [
        (
            ["0.rgb.png", "0.nir.png"],
            (),
            r"several images of one sample \(0.rgb.png, 0.nir.png\): --data.members says",
        ),
        (["0.seg.png", "1.seg.png"], (), r"no plain images, but 2 .seg.png: --data.members says"),
        (["0.jpg", "1.jpg"], ("webp",), r"no images that end in webp, but 2 .jpg: --data.members says"),
        ([f"2024.{i}.jpg" for i in range(99)], (), r"several images of one sample \(2024.0.jpg, .*, \.\.\.\)"),
    ],
)
def test_members_that_are_not_certain(tmp_path: Path, names: list[str], members: tuple[str, ...], problem: str) -> None:
    shard = str(make_shard(tmp_path / "s.tar", names))
    ((key, reason),) = read_shard(shard, members)
    assert (key, type(reason)) == (shard, UnreadableImage)
    for find in (index_shard, lambda path, members: check_shards([path], members)):
        with pytest.raises(UserError, match=problem):
            find(shard, members)
    assert len(list(read_shard(shard, ["all"]))) == len(names)


PACKERS = {
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "lzma, fast": lambda data: lzma.compress(data, lzma.FORMAT_ALONE, preset=0),
    "lzma, small": lambda data: lzma.compress(data, lzma.FORMAT_ALONE, preset=9),
    "bzip2": bz2.compress,
    "zstd": lambda data: b"\x28\xb5\x2f\xfd" + data,  # not all versions of Python can make one
}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz"])
def test_other_compressions_than_gzip_are_refused(tmp_path: Path, packed: str, name: str) -> None:
    plain = make_shard(tmp_path / "plain.tar", ["BZh91.jpg", "0.cls"]).read_bytes()
    shard, method = tmp_path / name, packed.partition(",")[0]
    shard.write_bytes(PACKERS[packed](plain))
    for read_it in (
        lambda: list(read_shard(shard)),
        lambda: count_shard_images([shard]),
        lambda: check_shards([str(shard)]),
        lambda: index_shard(str(shard)),
    ):
        with pytest.raises(UserError, match=rf"^shard .*{name} is compressed with {method}: unpack it, or use gzip$"):
            read_it()


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz"])
def test_content_tells_how_a_shard_is_compressed(tmp_path: Path, name: str) -> None:
    plain = make_shard(tmp_path / "plain.tar", ["BZh91.jpg"]).read_bytes()
    for content in (plain, gzip.compress(plain)):
        (tmp_path / name).write_bytes(content)
        assert keys(read_shard(tmp_path / name)) == [f"{name}/BZh91.jpg"]
        assert count_shard_images([tmp_path / name]) == len(index_shard(str(tmp_path / name))) == 1


def test_names_of_members_in_any_bytes(tmp_path: Path) -> None:
    names = ["größe.jpg", os.fsdecode(b"caf\xe9.jpg"), "a\nb.jpg"]
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, "w", encoding="utf-8", errors="surrogateescape") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert keys(read_shard(shard)) == ["s.tar/größe.jpg", "s.tar/caf\\xe9.jpg", "s.tar/a\nb.jpg"]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("cut", "whole"),
    [(5 * 1536 + 100, 5), (5 * 1536 + 512 + 300, 5), (5 * 1536, 5), (100, 0), (0, 0)],
    ids=["in a header", "in a file", "between files", "in the first header", "empty"],
)
def test_cut_off_shard_keeps_what_was_read(tmp_path: Path, cut: int, whole: int, compressed: bool) -> None:
    shard = make_shard(tmp_path / "s.tar", [f"{i}.jpg" for i in range(9)])  # a member takes 512 + 1024 bytes
    shard.write_bytes(shard.read_bytes()[:cut])
    if compressed:
        (tmp_path / "s.tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
        shard = tmp_path / "s.tar.gz"
    *samples, (name, damage) = read_shard(shard)
    assert keys(samples) == [f"{shard.name}/{i}.jpg" for i in range(whole)]
    assert all(isinstance(data, bytes) and len(data) == 700 for _, data in samples)
    assert name == str(shard)
    assert isinstance(damage, UnreadableImage)
    assert str(damage).startswith("corrupt shard: ")
    assert count_shard_images([shard]) in (whole, whole + 1)  # the header of the one cut off may be there


def test_damage_within(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "s.tar", [f"{i}.jpg" for i in range(9)])
    data = bytearray(shard.read_bytes())
    data[5 * 1536 : 5 * 1536 + 512] = b"?" * 512
    shard.write_bytes(data)
    *samples, (name, damage) = read_shard(shard)
    assert len(samples) == 5
    assert (name, type(damage)) == (str(shard), UnreadableImage)


@pytest.mark.parametrize("name", ["missing.tar", "text.tar", "cut.tgz"])
def test_no_shard_at_all(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.tar").write_text("not a tar\n" * 500)
    make_shard(tmp_path / "cut.tgz", ["1.jpg"])
    (tmp_path / "cut.tgz").write_bytes((tmp_path / "cut.tgz").read_bytes()[:30])
    ((key, damage),) = read_shard(tmp_path / name)
    assert key == str(tmp_path / name)
    assert isinstance(damage, UnreadableImage)
    assert "\n" not in str(damage)
    assert count_shard_images([tmp_path / name]) == 0


@pytest.mark.parametrize(("shards", "streams"), [(7, 1), (7, 3), (4, 4), (3, 4), (2, 7), (1, 5)])
def test_streams_share_an_epoch_exactly(tmp_path: Path, shards: int, streams: int) -> None:
    paths = make_shards(tmp_path, shards, 20)
    parts = [keys(shard_samples(paths, 0, 0, stream, streams, 8)) for stream in range(streams)]
    assert sorted(key for part in parts for key in part) == sorted(
        key for path in paths for key in keys(read_shard(path))
    )
    assert min(map(len, parts)) > 0


def test_order_is_drawn_by_seed_and_epoch(tmp_path: Path) -> None:
    paths = make_shards(tmp_path, 6, 10)

    def order(seed: int, epoch: int, shuffle_buffer: int = 15) -> list[str]:
        return keys(shard_samples(paths, seed, epoch, 0, 1, shuffle_buffer))

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0, 1) != order(0, 0, 15)
    unshuffled = order(0, 0, 1)  # the shards change places, their images do not
    assert [key[0] for key in unshuffled[::10]] != sorted(key[0] for key in unshuffled[::10])
    assert all(unshuffled[i : i + 10] == sorted(unshuffled[i : i + 10]) for i in range(0, 60, 10))
    # with a buffer, consecutive images come from several shards
    assert sum(a[0] != b[0] for a, b in zip(order(0, 0), order(0, 0)[1:], strict=False)) > 20


def test_a_corrupt_shard_does_not_end_the_stream(tmp_path: Path) -> None:
    paths = make_shards(tmp_path, 3, 10)
    Path(paths[1]).write_bytes(Path(paths[1]).read_bytes()[: 4 * 1536 + 600])
    samples = list(shard_samples(paths, 0, 0, 0, 1, 5))
    assert len(samples) == 10 + 4 + 10 + 1
    assert [key for key, data in samples if isinstance(data, UnreadableImage)] == [paths[1]]


def test_all_streams_of_a_corrupt_shard_name_it(tmp_path: Path) -> None:
    (path,) = make_shards(tmp_path, 1, 10)
    Path(path).write_bytes(Path(path).read_bytes()[: 7 * 1536 + 600])
    for stream in range(3):
        assert path in keys(shard_samples([path], 0, 0, stream, 3))


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data sets")
def test_cifar_shards() -> None:
    assert count_shard_images([SHARED / "cifar10" / "test-0000.tar"]) == 5000
    key, data = next(read_shard(SHARED / "cifar10" / "train-0000.tar.gz"))
    assert key.startswith("train-0000.tar.gz/train_")
    assert isinstance(data, bytes)
    assert data[:2] == b"\xff\xd8"


def damage_end(packed: bytes, kind: str) -> bytes:
    return packed[:-8] if kind == "cut" else packed[:-8] + bytes(8)  # its checksum and length


@pytest.mark.parametrize("kind", ["cut", "checksum"])
def test_a_compressed_shard_with_a_corrupt_end(tmp_path: Path, kind: str) -> None:
    """All of its images are there; what is kept in memory whole is refused."""
    shard = make_shard(tmp_path / "s.tar", ["0.jpg", "1.jpg"])
    (tmp_path / "s.tar.gz").write_bytes(damage_end(gzip.compress(shard.read_bytes()), kind))
    shard = tmp_path / "s.tar.gz"
    images = [key for key, data in read_shard(shard) if isinstance(data, bytes)]
    assert images == ["s.tar.gz/0.jpg", "s.tar.gz/1.jpg"]
    with pytest.raises(UserError, match=r"shard .*s\.tar\.gz is corrupt .*: make it again"):
        unpack(str(shard), 2**20)


def test_a_compressed_shard_that_breaks_off(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as tar:
        for name in ("0.jpg", "1.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 40_000
            tar.addfile(member, io.BytesIO(rng.bytes(40_000)))  # which cannot be compressed
    shard = tmp_path / "s.tar.gz"
    shard.write_bytes(shard.read_bytes()[:60_000])
    (key, data), (name, damage) = read_shard(shard)
    assert (key, len(data)) == ("s.tar.gz/0.jpg", 40_000)
    assert (name, type(damage)) == (str(shard), UnreadableImage)
    with pytest.raises(UserError, match=r"shard .*s\.tar\.gz is corrupt .*: make it again"):
        index_shard(str(shard))
