"""`itpn shrink`: large images, decoded once, into shards of small ones."""

import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.filesize import decimal
from rich.progress import track

from itpn.data.class_names import read_class_names
from itpn.data.decode import MAX_PIXELS, UnreadableImage
from itpn.data.file_types import CACHE_INDEX, CLASSES, COPIES_INDEX, describe_unread
from itpn.data.files import ImageSource
from itpn.data.members import list_endings
from itpn.data.resized_copies import (
    CopiesIndex,
    Original,
    ResizedCopies,
    ResizedCopy,
    list_originals,
    open_photo,
    read_index,
    write_index,
    write_tar,
)
from itpn.data.skipped import SkippedImages
from itpn.data.walk import walk
from itpn.data.workers import WorkerLoader
from itpn.errors import MachineError, RunStopped, UserError, refusal
from itpn.system.console import Output, print_note, print_warnings
from itpn.system.signals import stopped_by_signals
from itpn.system.writing import check_settings, write_whole, writing_to

TRIED = 16  # images of a split whose headers are read before anything is written
LOCK_SECONDS = 15  # the workers of a process that was killed notice within 5, and the lock is theirs as well


def shrink(
    splits: dict[str, ImageSource],
    out: Path,
    short_side: int,
    quality: int,
    shard_size: int,
    num_workers: int,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Write the images of each split to shards in a folder of its name; shards that are there already are kept.

    Args:
        splits: from `find_splits`.
        num_workers: processes that shrink; what is written does not depend on it.
        max_pixels: larger images are left out.

    Raises:
        UserError: nothing to read, the folder cannot be written or holds something else, too many corrupt images, or
            one that is no photograph.
        RunStopped: by a signal.
    """
    console = Output()
    originals = _list_all(splits)
    _check_photos(originals, max_pixels)
    classes = _label(splits, originals)
    shards = {
        os.path.join(split, f"images-{begin // shard_size:05d}.tar"): found[begin : begin + shard_size]
        for split, found in originals.items()
        for begin in range(0, len(found), shard_size)
    }
    settings = {"short side": short_side, "quality": quality, "shard size": shard_size, "files": _hash(originals)}
    with writing_to(out), _open_folder(out, settings) as index:
        if classes is not None:
            write_whole(out / CLASSES, "".join(f"{name}\n" for name in classes).encode())
        try:
            with stopped_by_signals():
                _write_shards(out, index, shards, num_workers, max_pixels, console)
        except RunStopped as stop:
            print_note(f"stopped with {len(index.shards)} of {len(shards)} shards done; the same command resumes")
            stop.reported = True
            raise
        except (MachineError, OSError) as error:
            end = refusal(f"--out {out} cannot be written", error) if isinstance(error, OSError) else error
            done = f"{len(index.shards)} of {len(shards)} shards are done, the same command resumes"
            raise type(end)(f"{end} ({done})".replace("--data.num-workers", "--num-workers")) from error
        index.complete = True
        write_index(out, index)
        size = sum((out / name).stat().st_size for name in shards)
    images, before = (sum(record[name] for record in index.shards.values()) for name in ("images", "bytes"))
    corrupt = sum(len(record["corrupt"]) for record in index.shards.values())
    console.print(
        f"{images:,} images{f' ({corrupt:,} corrupt ones left out)' if corrupt else ''}, {decimal(before)} before, "
        f"{decimal(size)} after; train from them with --data.root {out}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _list_all(splits: dict[str, ImageSource]) -> dict[str, list[Original]]:
    """The images of each split. Prints what is left out."""
    left, unread = Counter[str](), Counter[str]()
    originals = {}
    for split, source in splits.items():
        if source.cache:
            raise UserError(f"{source.cache} holds cached features: give the images that they were made of")
        originals[split] = list_originals(source, left, unread)
        if not originals[split]:
            raise UserError(f"no images in the shards ({source.shards[0]} ...){describe_unread(unread, '; ')}")
    for note in [note for source in splits.values() for note in source.notes]:
        print_note(note)
    if left:
        print_note(f"not written of the shards: {list_endings(left)} (see --data.members)")
    if note := describe_unread(unread):
        print_note(f"shards: {note}")
    return originals


def _check_photos(originals: dict[str, list[Original]], max_pixels: int) -> None:
    """Find images that are no photographs among the first, before anything is written.

    Raises:
        UserError: there are.
    """
    for found in originals.values():
        for original in found[:TRIED]:
            with suppress(UnreadableImage, OSError, EOFError, ValueError, zlib.error):  # which are counted later
                open_photo(original, max_pixels)


def _label(splits: dict[str, ImageSource], originals: dict[str, list[Original]]) -> list[str] | None:
    """Put numbers of classes in the place of folders, where these are those of a classifier.

    That is so where each image to train on is in one of two or more, and others are in the same.

    Returns:
        Names of the classes; None if there are none.
    """
    roots = [root for source in splits.values() for root in source.roots]
    if any(source.shards for source in splits.values()):  # which have labels already
        folders = [root if os.path.isdir(root) else os.path.dirname(root) for root in roots]
        return read_class_names(folders, (one.label or "" for found in originals.values() for one in found))
    labels = {split: {one.label for one in found} for split, found in originals.items()}
    train = next(iter(labels.values()))
    classes = sorted(folder for folder in train if folder is not None) if len(train) > 1 and None not in train else []
    numbers = {name: str(number) for number, name in enumerate(classes)}
    for split, found in originals.items():
        known = labels[split] <= numbers.keys()
        originals[split] = [one._replace(label=numbers[one.label] if known and one.label else None) for one in found]
    return classes or None


def _hash(originals: dict[str, list[Original]]) -> str:
    digest = hashlib.sha256()
    for split, found in originals.items():
        for one in found:
            digest.update(repr((split, one.key, os.path.abspath(one.path), one.start, one.size, one.label)).encode())
    return digest.hexdigest()


@contextmanager
def _open_folder(out: Path, settings: dict[str, Any]) -> Iterator[CopiesIndex]:
    """Take the folder for this process; the index tells which shards are done."""
    begun = (out / COPIES_INDEX).exists()
    if not begun and out.is_dir() and ((out / CACHE_INDEX).exists() or next(walk(str(out)), None)):
        raise UserError(f"{out} holds images, shards or features already; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        taken = lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise UserError(f"{out} is in use by another process; wait for it, or choose another --out") from None
    with taken:
        index = read_index(out) if begun else CopiesIndex(settings)
        check_settings(out, index.settings, settings, "shards")
        index.shards = {name: record for name, record in index.shards.items() if (out / name).exists()}
        index.complete = False
        write_index(out, index)
        yield index


def _write_shards(
    out: Path,
    index: CopiesIndex,
    shards: dict[str, list[Original]],
    num_workers: int,
    max_pixels: int,
    console: Console,
) -> None:
    todo = [name for name in shards if name not in index.shards]
    if len(todo) < len(shards):
        console.print(f"{len(shards) - len(todo)} of {len(shards)} shards are there already", highlight=False)
    skipped = SkippedImages(sum(map(len, shards.values())))
    for done in index.shards.values():
        skipped.update(done["corrupt"].items())
    originals = [one for name in todo for one in shards[name]]
    images = WorkerLoader(
        ResizedCopies(index.settings["short side"], index.settings["quality"], max_pixels),
        originals,
        num_workers,
        f"those to shrink ({originals[0].path}, ...)" if originals else "those to shrink",
    )
    results = iter(track(images, "images", total=len(originals), console=console, disable=not console.is_terminal))
    for name in todo:
        record: dict[str, Any] = {"images": 0, "bytes": 0, "corrupt": {}}
        (out / name).parent.mkdir(exist_ok=True)
        write_tar(out / name, _members(islice(results, len(shards[name])), record, skipped))
        index.shards[name] = record
        try:
            skipped.check(0)
        except UserError:
            # they will be mended: look at them again then
            index.shards = {name: done for name, done in index.shards.items() if not done["corrupt"]}
            raise
        finally:
            write_index(out, index)


def _members(
    results: Iterator[ResizedCopy],
    record: dict[str, Any],
    skipped: SkippedImages,
) -> Iterator[tuple[str, bytes]]:
    """The files of a shard; tells of the corrupt ones, and counts in ``record``."""
    for original, content, size, warnings in results:
        print_warnings({kind: (original.name, warning) for kind, warning in (warnings or {}).items()})
        if isinstance(content, UserError):
            raise content
        if isinstance(content, UnreadableImage):
            record["corrupt"][original.name] = str(content)
            for message in skipped.update([(original.name, str(content))]):
                print_note(f"skipped {message}")
            continue
        record["images"] += 1
        record["bytes"] += size
        if original.label is not None:
            yield f"{original.key}.cls", original.label.encode()
        yield f"{original.key}.jpg", content
