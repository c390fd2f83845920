"""Images in tar shards, read sequentially, which is fastest on a disk or a network."""

import functools
import itertools
import os
import random
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from itpn.data.decode import UnreadableImage, reason_of
from itpn.data.file_types import describe_unread, is_hidden
from itpn.data.members import Choice, Member, find_members, is_label_ending, split_name
from itpn.data.readers import GZIP, MAX_FILE, check_lost, read_head, too_large
from itpn.errors import UserError
from itpn.seeding import derive_seed
from itpn.system.text import decode_text, readable

Sample = tuple[str, bytes | UnreadableImage]  # name, and encoded image or the error of reading it
TAR_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error)
# refused: tarfile may unpack these, depending on Python's version and build, but without random access or bounds
COMPRESSIONS = {
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "bzip2": re.compile(rb"BZh[1-9]1AY&SY"),  # a tar begins with its first member's name, which may start with BZh
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
    "lzma": re.compile(rb"\]\0\0(?!\0\0)[\0-\xff]{2}"),  # a size of 0 is a member's name of one letter
}


MAX_HEADER = 2**20  # bytes of a header of names and attributes
MAX_RATIO = 100  # largest unpacked size, in sizes of the archive: images compress hardly, zeros a thousand times
EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)


class StrictTarInfo(tarfile.TarInfo):
    """A member of which a corrupt header is an error. tarfile takes it for the end of the archive.

    The size of headers that tarfile reads into memory is bounded. Sparse members are refused, because their zeros take
    no space in the file.
    """

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "StrictTarInfo":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError:
            raise tarfile.ReadError("corrupt or cut off") from None

    def _proc_member(self, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0 or (self.size > MAX_HEADER and self.type in (*EXTENSIONS, tarfile.SOLARIS_XHDTYPE)):
            raise tarfile.ReadError(f"corrupt: a header of {self.size:,} bytes")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"{self.name} is a sparse member: pack it without --sparse")
        return super()._proc_member(tarfile_)  # type: ignore[misc]


def read_shard(path: str | Path, members: Sequence[str] = ()) -> Iterator[Sample]:
    """Yield ("shard/member", the file's bytes) of each image, in the order of the tar, plain or compressed.

    For a truncated shard, or one with ambiguous samples, the last item is (shard, UnreadableImage).

    Args:
        members: endings of the images to read, see :class:`itpn.data.members.Choice`.
    """
    shard = readable(Path(path).name)
    choice, errors = Choice(members), list[Exception]()
    for member in choice.choose(_open_members(path, "r|", _read_member, errors)):
        yield f"{shard}/{readable(member.name)}", member.content
    if reason := f"corrupt shard: {reason_of(errors[0])}" if errors else choice.problem:
        yield readable(str(path)), UnreadableImage(reason)


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | UnreadableImage:
    if member.size > MAX_FILE:
        return too_large(member.size)
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _open_members(
    path: str | Path,
    mode: Any,
    read: Callable[[tarfile.TarFile, tarfile.TarInfo], Any],
    errors: list[Exception],
    unread: Counter[str] | None = None,
) -> Iterator[Member]:
    """Yield the images of a shard up to its end or its first damage, which is added to ``errors``."""
    try:
        with open_tar(path, mode) as tar:
            yield from find_members(check_members(tar, path), functools.partial(read, tar), unread)
    except TAR_ERRORS as error:
        check_lost(path, error)
        errors.append(error)


def open_tar(path: str | Path, mode: Any) -> tarfile.TarFile:
    """Open a tar archive, plain or gzipped, by its content, not its name.

    Member names are decoded as UTF-8 in any locale; other bytes become surrogates.

    Args:
        mode: ``r:`` for random access, ``r|`` to read sequentially.

    Raises:
        UserError: it has another compression.
    """
    head = read_head(path, 10)
    if found := next((name for name, magic in COMPRESSIONS.items() if magic.match(head)), None):
        raise UserError(f"shard {path} is compressed with {found}: unpack it, or use gzip")
    mode += "gz" if head.startswith(GZIP) else ""
    return tarfile.open(path, mode, tarinfo=StrictTarInfo, encoding="utf-8", errors="surrogateescape")


def count_shard_images(
    shards: Sequence[str | Path], members: Sequence[str] = (), unread: Counter[str] | None = None
) -> int:
    """Count the images that are read of some shards, from headers only; of a corrupt shard, up to the damage.

    Args:
        unread: counts the other members by suffix, without images that are left out.
    """
    return sum(_choose_images(path, members, unread).taken.total() for path in shards)


def check_shards(shards: Sequence[str], members: Sequence[str] = ()) -> list[str]:
    """What is left out of shards, judged by the headers of the first shard, a line for each reason.

    Raises:
        UserError: the choice of images is ambiguous, or ``members`` selects none.
    """
    unread = Counter[str]()
    choice = _choose_images(shards[0], members, unread)
    _refuse_ambiguous(shards[0], choice, unread)
    return [f"{shards[0]}: {one}" for one in (choice.describe(), describe_unread(unread)) if one]


def _choose_images(path: str | Path, members: Sequence[str], unread: Counter[str] | None) -> Choice:
    """The choice of images in a shard, from its headers."""
    choice = Choice(members)
    for _ in choice.choose(_open_members(path, "r:", lambda tar, member: None, [], unread)):
        pass
    return choice


def _refuse_ambiguous(path: str, choice: Choice, unread: Counter[str]) -> None:
    if choice.problem:
        raise UserError(f"shard {path} {choice.problem}{describe_unread(unread, '; ')}")


class Place(NamedTuple):
    """The position of an image in a shard: first byte in the unpacked archive, size, and text of its .cls or None."""

    name: str
    start: int
    size: int
    label: str | None


def locate_images(path: str, members: Sequence[str] = ()) -> tuple[list[Place], str]:
    """Where the images of a shard are, named as by :func:`read_shard`; of a corrupt one, up to the damage.

    Args:
        members: endings of the images, see :class:`itpn.data.members.Choice`.

    Returns:
        The images, and what is wrong with the shard; empty where nothing is.
    """
    shard = readable(Path(path).name)
    choice, errors = Choice(members), list[Exception]()
    places = []
    for one in choice.choose(_open_members(path, "r:", lambda tar, own: (own.offset_data, own.size), errors)):
        start, size = one.content
        places.append(Place(f"{shard}/{readable(one.name)}", start, size, None))
    return places, f"corrupt shard: {reason_of(errors[0])}" if errors else choice.problem


def index_shard(
    path: str,
    members: Sequence[str] = (),
    left: Counter[str] | None = None,
    unread: Counter[str] | None = None,
) -> list[Place]:
    """The images of a shard, with their labels.

    Args:
        members: endings of the images, see :class:`itpn.data.members.Choice`.
        left: counts the images that are left out, by ending.
        unread: counts the members that are neither images nor labels, by suffix or kind.

    Raises:
        UserError: the shard is corrupt, the choice of images is ambiguous, or a label is not UTF-8 or has a duplicate.
    """
    labels: dict[str, str] = {}
    unread = Counter() if unread is None else unread
    try:
        with open_tar(path, "r:") as tar:
            headers = _take_labels(tar, path, labels)
            # duplicates included: streaming cannot know which comes last
            images = list(find_members(headers, lambda member: (member.offset_data, member.size), unread))
    except TAR_ERRORS as error:
        check_lost(path, error)
        raise UserError(f"shard {path} is corrupt or no tar archive ({error}): make it again") from error
    choice = Choice(members)
    chosen = list(choice.choose(images))
    _refuse_ambiguous(path, choice, unread)
    if left is not None:
        left += choice.left
    places = []
    for one in chosen:
        start, size = one.content
        places.append(Place(one.name, start, size, labels.get(one.key, labels.get(one.name.rpartition(".")[0]))))
    return places


def _take_labels(tar: tarfile.TarFile, path: str, labels: dict[str, str]) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a shard; the text of each label is added to ``labels``."""
    for member in check_members(tar, path):
        key, ending = split_name(member.name)
        if is_label_ending(ending) and member.isfile() and not is_hidden(member.name):
            file = tar.extractfile(member)
            assert file is not None
            text = decode_text(file.read(1000), f"{member.name} in {path}").strip()
            first = labels.setdefault(key if ending == "cls" else member.name[: -len(".cls")], text)
            if first != text:
                raise UserError(
                    f"{member.name} is in {path} twice, as {first!r} and as {text!r}: make it again with one"
                )
        yield member


def shard_samples(
    shards: Sequence[str],
    seed: int,
    epoch: int,
    stream: int,
    streams: int,
    shuffle_buffer: int = 1000,
    members: Sequence[str] = (),
) -> Iterator[Sample]:
    """One pass over the shards of one of several streams, in random order.

    Each epoch shuffles the shards. Each stream takes every ``streams``-th shard. If there are fewer shards than
    streams, several streams read one shard and take its images in turn. A buffer of ``shuffle_buffer`` encoded images
    shuffles images: a random one of them is yielded.
    """
    order = list(shards)
    random.Random(derive_seed(seed, epoch, "shards")).shuffle(order)
    samples: Iterator[Sample]
    if len(order) >= streams:
        samples = itertools.chain.from_iterable(read_shard(path, members) for path in order[stream::streams])
    else:
        turn, first = divmod(stream, len(order))
        samples = _every_nth(read_shard(order[first], members), turn, len(range(first, streams, len(order))))
    rng = random.Random(derive_seed(seed, epoch, "stream", stream, streams))
    return _shuffle(samples, max(1, shuffle_buffer), rng)


def check_members(tar: tarfile.TarFile, path: str | Path) -> Iterator[tarfile.TarInfo]:
    """Yield members, checked before their content is read.

    Raises:
        tarfile.ReadError: a decompression bomb.
    """
    most = 2**26 + MAX_RATIO * os.path.getsize(path)
    if tar.firstmember is None:  # type: ignore[attr-defined]  # empty: Python 3.10 would seek backwards
        return
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header in memory
        if member.issparse():
            raise tarfile.ReadError(f"{member.name} is a sparse member: pack it without --sparse")
        if member.size < 0 or member.offset_data + member.size > most:
            raise tarfile.ReadError(f"it unpacks to more than {MAX_RATIO} times its size, as no images do")
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
