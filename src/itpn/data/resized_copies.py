"""Resized copies of images, in tar shards to train from (`itpn shrink`)."""

import gzip
import io
import json
import os
import random
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from itpn.data.decode import MAX_PIXELS, EncodedImage, UnreadableImage, reason_of
from itpn.data.file_types import COPIES_INDEX, PHOTO_SUFFIXES, is_shard
from itpn.data.files import ImageSource
from itpn.data.image_type import PHOTOGRAPH
from itpn.data.readers import MAX_FILE, check_lost, is_compressed, read_file, too_large
from itpn.data.samples import Sample, open_sample, type_of
from itpn.data.shards import index_shard
from itpn.data.stored import ReadSettings, StoredImage
from itpn.data.workers import beat
from itpn.errors import UserError
from itpn.seeding import derive_seed
from itpn.system.text import as_class, read_text, readable
from itpn.system.writing import open_whole, write_whole

LONGEST_JPEG = 65535


class Original(NamedTuple):
    """An image to be copied: a file, or a member of an archive."""

    key: str  # its path without root and suffix, unique in the source
    name: str  # in messages
    path: str  # of the file or archive
    start: int = 0
    size: int = -1  # bytes; -1 for the whole file
    label: str | None = None  # its top folder below the root, or the text of its .cls


class ResizedCopy(NamedTuple):
    """The resized copy of an original."""

    original: Original
    content: bytes | UnreadableImage | UserError  # a JPEG, or why the original cannot be read, or must not be copied
    size: int = 0  # bytes of the original
    warnings: dict[str, str] | None = None  # see `EncodedImage`


@dataclass
class CopiesIndex:
    """The content of a folder of resized copies, as ``itpn-shrink.json`` has it."""

    settings: dict[str, Any]
    # of each complete shard: "images"; "bytes" of their originals; "corrupt", the reason for each image left out
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    complete: bool = False


def read_index(folder: Path) -> CopiesIndex:
    """Read the index; UserError if it is corrupt."""
    try:
        index = CopiesIndex(**json.loads(read_text(folder / COPIES_INDEX)))
        for record in index.shards.values():
            if "broken" in record:  # as version 0.1 wrote it
                record["corrupt"] = record.pop("broken")
        return index
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / COPIES_INDEX} is corrupt ({error}); remove {folder} and start again") from error


def write_index(folder: Path, index: CopiesIndex) -> None:
    write_whole(folder / COPIES_INDEX, (json.dumps(asdict(index), indent=2, sort_keys=True) + "\n").encode())


def list_originals(
    source: ImageSource, left: Counter[str] | None = None, unread: Counter[str] | None = None
) -> list[Original]:
    """The images of a source in the order in which they are written: files shuffled, images of shards in their order.

    Args:
        left: counts the images of shards that are left out, by suffix.
        unread: counts the members of shards that are neither images nor labels, by suffix.

    Raises:
        UserError: a shard is corrupt.
    """
    taken: set[str] = set()
    originals = []
    for path in source.images:
        inner = _below_roots(path, source.roots)
        folder = as_class(inner.partition("/")[0]) if "/" in inner else None
        key = _make_key(os.path.splitext(inner)[0], taken)
        originals.append(Original(key, readable(path), path, label=folder))
    for path in source.shards:
        shard = re.sub(r"\.(tar|tar\.gz|tgz)$", "", _below_roots(path, source.roots), flags=re.IGNORECASE)
        for name, start, size, label in index_shard(path, source.members, left, unread):
            inner = f"{shard}/{os.path.normpath('/' + os.path.splitext(name)[0]).strip('/')}"
            shown = readable(f"{os.path.basename(path)}/{name}")
            originals.append(Original(_make_key(inner, taken), shown, path, start, size, label))
    if source.images:
        # images side by side in a folder are similar, and a shard is read in order
        random.Random(derive_seed(0, "shrink")).shuffle(originals)
    return originals


def _below_roots(path: str, roots: Iterable[str]) -> str:
    for root in roots:
        folder = os.path.join(root, "")
        if path.startswith(folder):
            return path[len(folder) :].lstrip("/")
    return os.path.basename(path)


def _make_key(path: str, taken: set[str]) -> str:
    folder, name = os.path.split(path)
    key = unique = os.path.join(folder, name.replace(".", "_"))  # in WebDataset a suffix begins at the first dot
    number = 1
    while unique in taken:
        number += 1
        unique = f"{key}-{number}"
    taken.add(unique)
    return unique


@dataclass(frozen=True)
class ResizedCopies(Dataset[ResizedCopy]):
    """``copies[original]`` is the resized copy of an original.

    Args:
        max_pixels: larger originals are not read.
    """

    short_side: int
    quality: int
    max_pixels: int = MAX_PIXELS

    def __getitem__(self, original: Original) -> ResizedCopy:
        beat()
        try:
            image = open_photo(original, self.max_pixels)
            content = resize_image(image, self.short_side, self.quality)
            size = os.path.getsize(original.path) if original.size < 0 else original.size
            return ResizedCopy(original, content, size, image.warnings or None)
        except (UnreadableImage, UserError) as error:
            return ResizedCopy(original, error)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            check_lost(original.path, error)
            return ResizedCopy(original, UnreadableImage(reason_of(error)))


def open_photo(original: Original, max_pixels: int) -> Sample:
    """Read the header of a photograph.

    Raises:
        UserError: it is no photograph, whose values or channels a JPEG would not hold.
        UnreadableImage, OSError, EOFError, ValueError, zlib.error: it cannot be read.
    """
    content = _read(original)
    image = open_sample(content, ReadSettings(max_pixels), original.name)
    if isinstance(image, StoredImage) and image.grey_or_rgb:  # JPEG holds no value for pixels without data
        image = open_sample(content, ReadSettings(max_pixels, type=PHOTOGRAPH), original.name)
    kind = type_of(image)
    if not kind.is_photo:
        raise UserError(
            f"{original.name} has {kind}, which JPEG cannot hold: itpn shrink is for photographs of 8 bits; train from "
            "the images themselves, large ones in parts by --data.window-size"
        )
    return image


def _read(original: Original) -> bytes | Path:
    if original.size < 0 and not original.path.lower().endswith(PHOTO_SUFFIXES):
        return Path(original.path)
    if original.size > MAX_FILE:
        raise too_large(original.size)
    if is_shard(original.path) and is_compressed(original.path):
        file = _open_compressed(original.path)
        file.seek(original.start)
        return file.read(original.size)
    return read_file(original.path, original.start, original.size)


@lru_cache(maxsize=1)
def _open_compressed(path: str) -> gzip.GzipFile:
    """An archive that stays open, because it can only be read forwards."""
    return gzip.open(path)


def resize_image(photo: Sample, short_side: int, quality: int) -> bytes:
    """An image file as an upright JPEG whose short side has at most ``short_side`` pixels.

    Upright JPEGs, grey or RGB, that are small enough are returned unchanged.

    Raises:
        UnreadableImage: it cannot be decoded, or its long side exceeds that of a JPEG.
    """
    image = photo.decode()  # uint8 [3, height, width]
    if min(image.shape[1:]) > short_side:
        image = resize(image, [short_side], InterpolationMode.BICUBIC, antialias=True)
    elif isinstance(photo, EncodedImage) and photo.is_upright_jpeg and photo.format == "JPEG":
        return photo.data  # not of MPO, which holds several images
    if max(image.shape[1:]) > LONGEST_JPEG:
        raise UnreadableImage(f"longer than the {LONGEST_JPEG:,} pixels that a JPEG can have")
    file = io.BytesIO()
    # No chroma subsampling: torchvision's 4:2:0 loses 3 dB at the same quality, 0.7 dB at the same file size.
    # No `optimize`: it fails on noise.
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()


def write_tar(path: Path, members: Iterator[tuple[str, bytes]]) -> None:
    """Write members (name, content) as a tar whose bytes depend on them alone; the file appears when complete."""
    with (
        open_whole(path) as file,
        tarfile.open(
            fileobj=file, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
        ) as tar,
    ):
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
