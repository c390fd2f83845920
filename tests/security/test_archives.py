"""Rows of docs/security.md: tar shards, indexes of our own folders, cached features, parquet files."""

import gzip
import io
import json
import os
import tarfile

import pytest
import torch
from safetensors.torch import save_file
from security.attack import limited, refused

from itpn.data.cache import FeatureCache
from itpn.data.file_types import CACHE_INDEX, COPIES_INDEX
from itpn.data.files import find_images
from itpn.data.labelled import find_labelled
from itpn.data.readers import unpack
from itpn.data.shards import count_shard_images, read_shard


def header(name: str, size: int, **more) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    for key, value in more.items():
        setattr(member, key, value)
    return member.tobuf(tarfile.GNU_FORMAT)


def block(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def pax(attributes: dict[str, str], size: int | None = None) -> bytes:
    body = b""
    for key, value in attributes.items():
        tail = f" {key}={value}\n".encode()
        length = next(n for n in range(len(tail), len(tail) + 20) if n == len(str(n)) + len(tail))
        body += str(length).encode() + tail
    return header("pax", len(body) if size is None else size, type=tarfile.XHDTYPE) + block(body)


def write_bomb(path, start: bytes, zeros: int) -> None:
    """``start`` and many zeros: a thousandth of their number of bytes."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(start)
        for _ in range(zeros // 2**24):
            file.write(bytes(2**24))


SCRATCH = ("--model.scratch", "--model.name", "itpn_nano")
END = bytes(1024)
LARGE = 2**30


def archives(photo: bytes) -> dict[str, bytes]:
    label = header("a.cls", 1) + block(b"0")
    return {
        "longer than the file": label + header("a.jpg", 10 * 2**30) + block(photo),
        "negative": label + header("a.jpg", -(2**20)) + block(photo),
        "negative by attributes": label + pax({"size": "-1048576"}) + header("a.jpg", 512) + block(photo),
        "huge by attributes": label + pax({"size": str(2**62)}) + header("a.jpg", 512) + block(photo),
        "a name of gigabytes": header("././@LongLink", LARGE, type=tarfile.GNUTYPE_LONGNAME),
        "attributes of gigabytes": pax({"comment": "x"}, LARGE),
        "sparse": sparse_member(),
        "sparse by attributes": pax(
            {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**40), "GNU.sparse.numblocks": "1"}
        )
        + header("a.jpg", 1)
        + block(b"x"),
    }


def sparse_member() -> bytes:
    raw = bytearray(header("a.jpg", 512, type=tarfile.GNUTYPE_SPARSE))
    raw[386:410] = b"%011o\0%011o\0" % (0, 512)  # one piece of data
    raw[483:495] = b"\x80" + (2**40).to_bytes(11, "big")  # and a terabyte of zeros
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw) + bytes(512)


KINDS = (
    "longer than the file",
    "negative",
    "negative by attributes",
    "huge by attributes",
    "a name of gigabytes",
    "attributes of gigabytes",
    "sparse",
    "sparse by attributes",
)


def stream(path: str) -> str:
    """What is wrong with a shard that is read from front to back."""
    return "; ".join(str(data) for _, data in read_shard(path) if not isinstance(data, bytes))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_hostile_archive(tmp_path, photo, kind, packed):
    content = archives(photo.read_bytes())[kind]
    path = tmp_path / ("train.tar.gz" if packed else "train.tar")
    if packed:
        write_bomb(path, content, LARGE if "gigabytes" in kind else 2**25)
    else:
        path.write_bytes(content + END)
    line = refused("shrink", path, "--out", tmp_path / "small", memory=2**28)
    assert str(path) in line
    answer, _ = limited(stream, str(path), memory=2**28)
    assert answer
    assert limited(count_shard_images, [str(path)], memory=2**28)[0] == 0
    recipe = ["train", "classifier_small", "--data.root", path, *SCRATCH]
    assert str(path) in refused(*recipe, memory=2**28)


@pytest.mark.parametrize("member", ["a.jpg", "a.txt"])
def test_a_bomb_is_found_out_before_it_is_unpacked(tmp_path, member):
    path = tmp_path / "train.tar.gz"
    write_bomb(path, header("b.cls", 1) + block(b"0") + header(member, LARGE), LARGE)
    assert path.stat().st_size < 2**23
    for recipe in (
        ["shrink", path, "--out", tmp_path / "s"],
        ["train", "classifier_small", "--data.root", path, *SCRATCH],
    ):
        assert "unpacks to more than 100 times its size" in refused(*recipe, memory=2**28)
    answer, _ = limited(stream, str(path), memory=2**28)
    assert "unpacks to more than 100 times its size" in answer


def test_an_archive_that_memory_cannot_hold(tmp_path):
    write_bomb(tmp_path / "x.tar.gz", b"", 2**30)
    answer, _ = limited(unpack, str(tmp_path / "x.tar.gz"), 2**24, memory=2**27)
    assert "unpack them with gunzip" in answer


def test_nothing_is_written_by_the_names_in_an_archive(tmp_path, photo):
    data, secret = photo.read_bytes(), tmp_path / "secret.jpg"
    secret.write_bytes(data)
    path = tmp_path / "in" / "train.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name in ("../../up.jpg", str(tmp_path / "root.jpg"), "a/../../../b.jpg", "..", "c.jpg/../../d.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for kind, name in ((tarfile.SYMTYPE, "link.jpg"), (tarfile.LNKTYPE, "hard.jpg")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(secret)
            tar.addfile(member)
        for kind, name in ((tarfile.CHRTYPE, "zero.jpg"), (tarfile.FIFOTYPE, "pipe.jpg")):
            member = tarfile.TarInfo(name)
            member.type, member.devmajor, member.devminor = kind, 1, 5
            tar.addfile(member)
    before = {p for p in tmp_path.rglob("*") if p.parts[len(tmp_path.parts)] not in ("out",)}
    code, printed = limited(shrink_to, str(path), str(tmp_path / "out"))
    assert code == 0, printed
    assert {p for p in tmp_path.rglob("*") if p.parts[len(tmp_path.parts)] != "out"} == before
    with tarfile.open(next((tmp_path / "out").rglob("*.tar"))) as tar:
        names = tar.getnames()
    assert len([name for name in names if name.endswith(".jpg")]) == 4
    assert not any(name.startswith("/") or ".." in name.split("/") for name in names)
    assert not any("link" in name or "hard" in name or "zero" in name for name in names)


def shrink_to(path: str, out: str) -> int:
    from itpn.cli import main

    return main(["shrink", path, "--out", out, "--num-workers", "0"])


@pytest.mark.parametrize("content", ["[]", "[" * 10**5, '{"complete": {}}', "7", '"x"', "{" * 10**5, "\0" * 100])
@pytest.mark.parametrize("name", [COPIES_INDEX, CACHE_INDEX])
def test_a_hostile_index(tmp_path, photo, name, content):
    (photo.parent / name).write_text(content)
    train = ["train", "itpn-pixel_nano", "--data.root", photo.parent, "--data.batch-size", "2", "--output-dir", "runs"]
    if name == CACHE_INDEX or content in ("[]", "7", '"x"', '{"complete": {}}'):
        line = refused(*train)
        assert "is not complete" in line or "is not the index" in line
    os.mkfifo(photo.parent / f"pipe-{name}")
    os.replace(photo.parent / f"pipe-{name}", photo.parent / name)
    assert limited(count_images, str(photo.parent))[0] == 10


def count_images(folder: str) -> int:
    return len(find_images([folder]).images)


INDEX = {
    "teacher": "x",
    "checkpoint": None,
    "width": 4,
    "img_size": [8, 8],
    "patch_size": 4,
    "images": 2,
    "views": 1,
    "shard_size": 2,
    "settings": {},
    "complete": True,
}


@pytest.mark.parametrize(
    "change",
    [
        {"shard_size": 0},
        {"images": 10**18},
        {"images": 2**31 - 1, "shard_size": 1},
        {"images": -1},
        {"views": 1.5},
        {"images": True},
        {"images": "9" * 1000},
        {"img_size": 8},
        {"img_size": [8] * 10**5},
        {"unknown": 1},
    ],
)
def test_numbers_of_a_cache(tmp_path, change):
    (tmp_path / CACHE_INDEX).write_text(json.dumps(INDEX | change))
    answer, _ = limited(FeatureCache, str(tmp_path), memory=2**27)
    assert "is not the index of cached features" in answer or "is missing" in answer


@pytest.mark.parametrize("keys", [None, "[" * 10**5, '["a"]', "{}", "x"])
def test_shards_of_a_cache(tmp_path, keys):
    (tmp_path / CACHE_INDEX).write_text(json.dumps(INDEX))
    tensors = {"image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "feature": torch.zeros(2, 4, 4)}
    save_file(tensors, tmp_path / "features-00000.safetensors", None if keys is None else {"keys": keys})
    answer, _ = limited(last_sample, str(tmp_path), memory=2**27)
    assert "features-00000.safetensors is corrupt" in answer


def last_sample(folder: str) -> str:
    return FeatureCache(folder)[1][2]


def test_a_table_runs_no_pickle(tmp_path, photo):
    """PyArrow up to 14.0.0 unpickled what the metadata of a column says (CVE-2023-47248)."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    canary = tmp_path / "canary"
    hook = b"cos\nsystem\n(S'touch " + os.fsencode(canary) + b"'\ntR."
    content = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": hook}
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    rows = [{"bytes": None, "path": "/etc/passwd"}, {"bytes": photo.read_bytes(), "path": "x"}] * 2
    schema = pyarrow.schema(
        [
            pyarrow.field("image", image),
            pyarrow.field("label", pyarrow.int64()),
            pyarrow.field("hook", pyarrow.int64(), metadata=content),
        ]
    )
    columns = [pyarrow.array(rows, image), pyarrow.array([0, 1, 0, 1]), pyarrow.array([0, 1, 0, 1])]
    parquet.write_table(pyarrow.Table.from_arrays(columns, schema=schema), tmp_path / "train.parquet")
    answer, printed = limited(read_table, str(tmp_path), str(tmp_path / "cache"), memory=2**30)
    assert answer == ("no image in it", len(photo.read_bytes())), printed  # the path is not read
    assert not canary.exists()


def read_table(folder: str, cache: str):
    os.environ["HF_DATASETS_CACHE"] = cache
    images = find_labelled([folder])[0]
    return str(images[0][1]), len(images[1][1])


@pytest.mark.parametrize("content", [b"PAR1" + bytes(100) + b"PAR1", b"PAR1" + b"\xff" * 2**20 + b"PAR1", b""])
def test_a_corrupt_table(tmp_path, content):
    pytest.importorskip("datasets")
    (tmp_path / "train.parquet").write_bytes(content)
    assert "train.parquet" in refused("train", "classifier_small", "--data.root", tmp_path, *SCRATCH)
