"""Images in tar shards, read from beginning to end as a disk or a network likes it."""

import itertools
import random
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from lzma import LZMAError
from pathlib import Path

from itpn.data.decode import UnreadableImage
from itpn.data.files import is_hidden, is_image
from itpn.data.readers import check_lost, is_compressed
from itpn.data.workers import beat
from itpn.errors import UserError
from itpn.seeding import derive_seed

Sample = tuple[str, bytes | UnreadableImage]  # a name, and what its file holds or why that cannot be had
TAR_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, LZMAError)


class StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a header that is damaged or missing for the end; here only the end marker is one."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "StrictTarInfo":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError:
            raise tarfile.ReadError("damaged or cut off") from None


def read_shard(path: str | Path) -> Iterator[Sample]:
    """Yield ("shard/member", the file's bytes) of each image, in the order of the tar, plain or compressed.

    A shard that breaks off ends with (shard, UnreadableImage) instead.
    """
    shard = Path(path).name
    try:
        with tarfile.open(path, "r|*", tarinfo=StrictTarInfo) as tar:
            for member in _image_members(tar):
                file = tar.extractfile(member)
                assert file is not None
                yield f"{shard}/{member.name}", file.read()
                beat()
    except TAR_ERRORS as error:
        check_lost(path, error)
        yield str(path), UnreadableImage(_reason(error))


def count_shard_images(shards: Sequence[str | Path]) -> int:
    """How many images the shards hold, from their headers; of a damaged shard, as many as can be reached."""
    count = 0
    for path in shards:
        try:
            with tarfile.open(path, "r:*", tarinfo=StrictTarInfo) as tar:
                for _ in _image_members(tar):
                    count += 1
        except TAR_ERRORS as error:
            check_lost(path, error)
    return count


def index_shard(path: str) -> list[tuple[str, int, int, str | None]]:
    """Each image's name, its first byte in the unpacked archive, its size, and the text of its .cls if there is one.

    Raises:
        UserError: the shard is damaged.
    """
    labels: dict[str, str] = {}
    images: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:gz" if is_compressed(path) else "r:", tarinfo=StrictTarInfo) as tar:
            for member in tar:
                stem, _, ending = member.name.rpartition(".")
                if not member.isfile() or is_hidden(member.name):
                    continue
                if ending == "cls":
                    file = tar.extractfile(member)
                    assert file is not None
                    labels[stem] = file.read(1000).decode(errors="replace").strip()
                elif is_image(member.name):
                    images[member.name] = member.offset_data, member.size
    except TAR_ERRORS as error:
        check_lost(path, error)
        raise UserError(f"shard {path} is damaged or no tar archive ({error}): make it again") from error
    return [(name, start, size, labels.get(name.rpartition(".")[0])) for name, (start, size) in images.items()]


def shard_samples(
    shards: Sequence[str], seed: int, epoch: int, stream: int, streams: int, shuffle_buffer: int = 1000
) -> Iterator[Sample]:
    """One pass over the part of the shards that belongs to one of several streams, in an order of its own.

    The order of the shards is drawn anew each epoch. Each stream takes every ``streams``-th shard; where there
    are fewer shards than streams, several streams read one shard and take turns with its images. Images are
    shuffled by keeping ``shuffle_buffer`` of them, undecoded, and handing out a random one.
    """
    order = list(shards)
    random.Random(derive_seed(seed, epoch, "shards")).shuffle(order)
    samples: Iterator[Sample]
    if len(order) >= streams:
        samples = itertools.chain.from_iterable(read_shard(path) for path in order[stream::streams])
    else:
        turn, first = divmod(stream, len(order))
        samples = _every_nth(read_shard(order[first]), turn, len(range(first, streams, len(order))))
    rng = random.Random(derive_seed(seed, epoch, "stream", stream, streams))
    return _shuffle(samples, max(1, shuffle_buffer), rng)


def _image_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile remembers every header it has read
        if member.isfile() and is_image(member.name) and not is_hidden(member.name):
            yield member


def _every_nth(samples: Iterator[Sample], first: int, step: int) -> Iterator[Sample]:
    for number, (key, data) in enumerate(samples):
        if number % step == first or isinstance(data, UnreadableImage):
            yield key, data


def _shuffle(samples: Iterator[Sample], size: int, rng: random.Random) -> Iterator[Sample]:
    buffer: list[Sample] = []
    for sample in samples:
        if len(buffer) < size:
            buffer.append(sample)
        else:
            place = rng.randrange(size)
            yield buffer[place]
            buffer[place] = sample
    rng.shuffle(buffer)
    yield from buffer


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"broken shard: {text.splitlines()[0]}"
