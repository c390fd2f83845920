"""The stream of batches: the same for any number of workers, after resuming anywhere, and over corrupt files."""

import io
import os
import pickle
import random
import signal
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from itpn.data.augment import PretrainingTransform
from itpn.data.files import ImageSource, find_images
from itpn.data.loader import TrainingLoader
from itpn.data.readers import PackedStrings
from itpn.errors import UserError

TRANSFORM = PretrainingTransform((8, 12))


def encode_image(number: int) -> bytes:
    """A tiny JPEG, no two alike."""
    pixels = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((24, 20)).save(file, "JPEG")
    return file.getvalue()


def make_files(folder: Path, count: int, corrupt: tuple[int, ...] = ()) -> ImageSource:
    for number in range(count):
        path = folder / f"{number:03d}.jpg"
        path.write_bytes(b"no image" if number in corrupt else encode_image(number))
    return find_images([folder])


def make_shards(folder: Path, counts: list[int], corrupt: tuple[int, ...] = ()) -> ImageSource:
    number = 0
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for _ in range(count):
                data = b"no image" if number in corrupt else encode_image(number)
                member = tarfile.TarInfo(f"{number:03d}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                number += 1
    return find_images([folder])


def make_loader(source: ImageSource, workers: int = 0, **options: Any) -> TrainingLoader:
    settings: dict[str, Any] = {"batch_size": 4, "num_workers": workers, "seed": 7, "shuffle_buffer": 5, **options}
    return TrainingLoader(source, TRANSFORM, **settings)


def run(loader: TrainingLoader, epochs: int) -> list[dict[str, Any]]:
    return [batch for _ in range(epochs) for batch in loader]


def assert_same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    assert [batch["key"] for batch in a] == [batch["key"] for batch in b]
    assert [batch["corrupt"] for batch in a] == [batch["corrupt"] for batch in b]
    assert all(torch.equal(x["image"], y["image"]) for x, y in zip(a, b, strict=True))


def keys(batches: list[dict[str, Any]]) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def by_key(batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: image for batch in batches for key, image in zip(batch["key"], batch["image"], strict=True)}


# ---------------------------------------------------------------------------------------------- files


def test_epoch_of_files(tmp_path: Path) -> None:
    source = make_files(tmp_path, 22)
    loader = make_loader(source)
    assert len(loader) == 5
    assert loader.images == 22
    first, second = list(loader), list(loader)
    for epoch in (first, second):
        assert [tuple(batch["image"].shape) for batch in epoch] == [(4, 3, 8, 12)] * 5
        assert len(set(keys(epoch))) == 20
        assert set(keys(epoch)) <= set(source.images)
    assert keys(first) != keys(second)
    assert keys(first) != sorted(keys(first))
    images, again = by_key(first), by_key(second)
    common = images.keys() & again.keys()
    assert len(common) >= 18
    assert not any(torch.equal(images[key], again[key]) for key in common)  # another crop each epoch
    assert keys(run(make_loader(source, seed=8), 1)) != keys(first)


def test_files_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    source = make_files(tmp_path, 18, corrupt=(3, 11))
    want = run(make_loader(source), 3)
    for workers in (1, 2):
        assert_same(run(make_loader(source, workers), 3), want)


@pytest.mark.parametrize("count", [32, 35])
def test_ranks_share_an_epoch_exactly(tmp_path: Path, count: int) -> None:
    source = make_files(tmp_path, count)
    loaders = [make_loader(source, rank=rank, world_size=2) for rank in range(2)]
    whole = run(make_loader(source, batch_size=8), 1)
    assert [len(loader) for loader in loaders] == [4, 4]
    parts = [list(loader) for loader in loaders]
    assert len(set(keys(parts[0]) + keys(parts[1]))) == 32
    for left, right, both in zip(*parts, whole, strict=True):  # two ranks see the batch that one would
        assert sorted(left["key"] + right["key"]) == sorted(both["key"])
        assert torch.equal(both["image"][::2], left["image"])
        assert torch.equal(both["image"][1::2], right["image"])


@pytest.mark.parametrize(("count", "batch_size"), [(3, 1), (2, 1), (1, 1), (5, 2), (7, 2)])
def test_fewer_files_than_a_batch(tmp_path: Path, count: int, batch_size: int) -> None:
    source = make_files(tmp_path, count)
    loaders = [make_loader(source, rank=rank, world_size=4, batch_size=4) for rank in range(4)]
    for _ in range(2):
        epoch = [list(loader) for loader in loaders]
        assert [[len(batch["image"]) for batch in part] for part in epoch] == [[batch_size]] * 4
        counts = Counter(key for part in epoch for key in keys(part))
        assert set(counts) == set(source.images)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_corrupt_files_are_replaced_and_named(tmp_path: Path) -> None:
    corrupt = {f"{number:03d}.jpg" for number in (0, 5, 6)}
    source = make_files(tmp_path, 20, corrupt=(0, 5, 6))
    (tmp_path / "000.jpg").unlink()  # gone since it was found
    batches = run(make_loader(source), 1)
    assert all(batch["image"].shape == (4, 3, 8, 12) for batch in batches)
    assert {Path(name).name for batch in batches for name, _ in batch["corrupt"]} == corrupt
    reasons = {Path(name).name: reason for batch in batches for name, reason in batch["corrupt"]}
    assert reasons["000.jpg"] == "No such file or directory"
    assert reasons["005.jpg"] == "not an image of a known format"
    assert not corrupt & {Path(key).name for key in keys(batches)}
    assert all(len(set(batch["key"])) == 4 for batch in batches)  # stand-ins come from other batches
    intact = run(make_loader(make_files(tmp_path, 20)), 1)
    for batch, other in zip(batches, intact, strict=True):  # the others are not touched
        for place, key in enumerate(other["key"]):
            if Path(key).name not in corrupt:
                assert batch["key"][place] == key
                assert torch.equal(batch["image"][place], other["image"][place])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_teachers_view_comes_along(tmp_path: Path, workers: int) -> None:
    source = make_files(tmp_path, 10, corrupt=(3,))
    want = run(make_loader(source, workers), 1)
    assert all(set(batch) == {"image", "key", "corrupt", "warnings"} for batch in want)
    transform = PretrainingTransform((8, 12), teacher_size=(6, 9))
    loader = TrainingLoader(source, transform, batch_size=4, num_workers=workers, seed=7, shuffle_buffer=5)
    batches = run(loader, 1)
    assert_same(batches, want)
    for batch in batches:
        assert set(batch) == {"image", "teacher_image", "key", "corrupt", "warnings"}
        assert batch["teacher_image"].shape == (4, 3, 6, 9)
        assert batch["teacher_image"].dtype == torch.uint8


# ---------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_epoch_of_shards(tmp_path: Path, workers: int) -> None:
    source = make_shards(tmp_path, [8, 8, 8, 8])
    loader = make_loader(source, workers)
    assert (len(loader), loader.images) == (8, 32)
    first, second = list(loader), list(loader)
    everything = [f"{shard}.tar/{number:03d}.jpg" for shard in range(4) for number in range(8 * shard, 8 * shard + 8)]
    assert sorted(keys(first)) == sorted(keys(second)) == everything
    assert keys(first) != keys(second)


def test_uneven_shards_give_every_rank_as_many_batches(tmp_path: Path) -> None:
    source = make_shards(tmp_path, [3, 17, 5])
    for workers in (0, 2):
        for rank in range(2):
            batches = run(make_loader(source, workers, rank=rank, world_size=2, batch_size=3), 3)
            assert [len(batch["image"]) for batch in batches] == [3] * 4 * 3


def test_an_image_read_twice_an_epoch_is_cropped_anew(tmp_path: Path) -> None:
    batches = run(make_loader(make_shards(tmp_path, [6]), batch_size=6, samples_per_epoch=24), 1)
    assert len(batches) == 4
    first, second = by_key(batches[:1]), by_key(batches[1:2])
    assert first.keys() == second.keys()
    assert list(first) != list(second)
    assert not any(torch.equal(first[key], second[key]) for key in first)


def test_more_streams_than_images(tmp_path: Path) -> None:
    source = make_shards(tmp_path, [2])
    for rank in range(3):
        assert [len(batch["image"]) for batch in run(make_loader(source, 2, rank=rank, world_size=3), 4)] == [1] * 4


def test_corrupt_members_are_replaced_and_named(tmp_path: Path) -> None:
    source = make_shards(tmp_path, [10, 10], corrupt=(2, 13, 14))
    shard = tmp_path / "1.tar"
    shard.write_bytes(shard.read_bytes()[:-10_500])  # the end marker is padded to 10240 bytes: cuts the last image
    batches = run(make_loader(source, samples_per_epoch=20), 2)
    assert all(batch["image"].shape == (4, 3, 8, 12) for batch in batches)
    reasons = dict(entry for batch in batches for entry in batch["corrupt"])
    assert set(reasons) == {"0.tar/002.jpg", "1.tar/013.jpg", "1.tar/014.jpg", str(shard)}
    assert reasons[str(shard)].startswith("corrupt shard")
    assert not set(reasons) & set(keys(batches))


# ---------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("kind", ["files", "few files", "shards", "few shards"])
def test_resuming_anywhere_equals_an_uninterrupted_run(tmp_path: Path, kind: str) -> None:
    """At every position of three epochs without workers; with two, at the ends of epochs and within."""
    source = {
        "files": lambda: make_files(tmp_path, 21, corrupt=(2, 9, 10)),
        "few files": lambda: make_files(tmp_path, 3),
        "shards": lambda: make_shards(tmp_path, [7, 4, 6, 5], corrupt=(2, 9, 10, 11, 12)),
        "few shards": lambda: make_shards(tmp_path, [22], corrupt=(2, 9, 10, 11, 12)),
    }[kind]()
    for workers in (0, 2):
        loader = make_loader(source, workers)
        states, batches = [loader.state_dict()], []
        for _ in range(3):
            for batch in loader:
                batches.append(batch)
                states.append(loader.state_dict())
        length = len(loader)
        assert len(batches) == 3 * length
        positions = range(3 * length) if workers == 0 else {0, 1, length - 1, length, length + 2, 2 * length}
        for position in positions:
            resumed = make_loader(source, workers)
            resumed.load_state_dict(pickle.loads(pickle.dumps(states[position])))
            epochs = 3 - position // length
            rest = run(resumed, epochs)
            assert_same(rest, batches[position:])
            assert resumed.state_dict() == states[-1]


def test_state_is_plain_and_counts_what_was_handed_out(tmp_path: Path) -> None:
    loader = make_loader(make_files(tmp_path, 20), 2)
    stream = iter(loader)
    next(stream), next(stream)
    assert loader.state_dict() == {"epoch": 0, "batch": 2}  # not what the workers have prefetched
    third = next(iter(loader))  # a new iterator resumes in the same epoch
    assert loader.state_dict() == {"epoch": 0, "batch": 3}
    loader.load_state_dict({"epoch": 0, "batch": 2})
    assert_same([next(iter(loader))], [third])


# ---------------------------------------------------------------------------------------------- in a process


def test_global_random_numbers_are_left_alone(tmp_path: Path) -> None:
    source = make_files(tmp_path, 8)
    for workers in (0, 1):
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        run(make_loader(source, workers), 2)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert np.random.get_state()[1].tolist() == before[2]


class WhoAmI:
    """Fills the image with facts about the process that made it."""

    def __call__(self, image: torch.Tensor, rng: random.Random) -> dict[str, torch.Tensor]:
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        return {"image": torch.tensor([os.getpid(), ignored, torch.get_num_threads()])}


def test_workers_ignore_ctrl_c_and_outlive_epochs(tmp_path: Path) -> None:
    loader = TrainingLoader(make_files(tmp_path, 8), WhoAmI(), batch_size=2, num_workers=2, seed=0)
    facts = torch.cat([batch["image"] for batch in run(loader, 3)])
    workers = set(facts[:, 0].tolist())
    assert len(workers) == 2
    assert os.getpid() not in workers
    assert (facts[:, 1:] == 1).all()
    for worker in workers:
        os.kill(worker, signal.SIGINT)
    assert len(run(loader, 2)) == 8
    assert loader.wait_seconds > 0
    loader.close()
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)


def test_packed_paths_take_little_room() -> None:
    paths = [f"data/n{i % 100:03d}/bild_ü{i}_\udcff.jpg" for i in range(3000)]  # not even UTF-8
    packed = PackedStrings(paths)
    assert [packed[i] for i in range(len(packed))] == paths
    assert len(pickle.dumps(packed)) < 3000 * 40


# ---------------------------------------------------------------------------------------------- too many corrupt files


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_ends_with_one_clear_line(tmp_path: Path, workers: int) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "shards").mkdir()
    for source in (
        make_files(tmp_path / "files", 12, corrupt=tuple(range(12))),
        make_shards(tmp_path / "shards", [12], corrupt=tuple(range(12))),
    ):
        with pytest.raises(UserError, match=r"none of \d+ images .*jpg: not an image of a known format") as error:
            run(make_loader(source, workers), 1)
        assert "\n" not in str(error.value)


def test_shards_without_images(tmp_path: Path) -> None:
    source = make_shards(tmp_path, [0, 0])
    with pytest.raises(UserError, match=r"no images in the shards .*: is each an intact tar of images\?"):
        make_loader(source)
    with tarfile.open(source.shards[0], "w") as tar:
        tar.addfile(tarfile.TarInfo("0.fff"))
    with pytest.raises(UserError, match=r"no images in the shards \(.*\): not read: 1 \.fff"):
        make_loader(source)
    with pytest.raises(UserError, match="no images in the shards"):
        run(make_loader(source, samples_per_epoch=8), 1)
