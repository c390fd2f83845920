"""Images of which each band is a file of its own. Standard library only, so that it is quick.

Such an image is one string among the paths of others: the beginning that the paths of its files have in common, and the
end of each, joined by a mark that no path has.
"""

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from itpn.errors import UserError
from itpn.system.text import one_line

MARK = "\0"
BETWEEN = "_-. "  # what stands between the name of an image and that of a band


@dataclass(frozen=True)
class BandsOf:
    """The files of an image, one a band or more, in the order of the channels."""

    paths: tuple[Path, ...]


def check_bands(bands: Sequence[str]) -> None:
    """Raise :class:`UserError` for what --data.bands does not take."""
    endings = [band.removeprefix("*") for band in bands]
    for band, ending in zip(bands, endings, strict=True):
        if not ending or set(ending) & {"*", "/", MARK}:
            raise UserError(f"--data.bands takes the ends of file names, as B02.tif or *_B02.tif, not {band!r}")
        if endings.count(ending) > 1:
            raise UserError(f"--data.bands names {band} twice")


def join_bands(paths: Iterable[str], bands: Sequence[str], where: str) -> tuple[list[str], int]:
    """The images that the files of a folder make whose names end in the same way but for the band.

    Args:
        bands: ends of names, with or without * before; the longest that fits is a file's.
        where: the files are, for a message.

    Returns:
        The images, each a string, in the order of their first files; and how many files are no bands.

    Raises:
        UserError: an image lacks a band, or no file is one.
    """
    check_bands(bands)
    endings = _read_endings(bands)
    images: dict[str, set[str]] = {}
    others = 0
    for path in paths:
        ending = _find_ending(path, endings)
        if ending is None:
            others += 1
        else:
            images.setdefault(path.removesuffix(ending), set()).add(ending)
    if not images:
        raise UserError(f"no image in {where} has a name that ends in {endings[0]} or another of --data.bands")
    return [_join(beginning, endings, found) for beginning, found in images.items()], others


def find_bands(path: str, bands: Sequence[str]) -> str | None:
    """The image that annotations name: by one of its files, or by what its files' names begin with.

    Args:
        path: where it may be, with or without a suffix.

    Returns:
        The image, a string; None if none of its files is there.

    Raises:
        UserError: some of its files are there, and others are not.
    """
    endings = _read_endings(bands)
    own = _find_ending(path, endings)
    beginnings = [] if own is None else [path.removesuffix(own)]
    beginnings += [stem + mark for stem in (path, os.path.splitext(path)[0]) for mark in ("", *BETWEEN, os.sep)]
    for beginning in beginnings:
        if found := {ending for ending in endings if os.path.isfile(beginning + ending)}:
            return _join(beginning, endings, found)
    return None


def _read_endings(bands: Sequence[str]) -> list[str]:
    return [band.removeprefix("*") for band in bands]


def _find_ending(path: str, endings: Sequence[str]) -> str | None:
    """The longest ending that a file's name has."""
    own = [ending for ending in endings if os.path.basename(path).endswith(ending)]
    return max(own, key=len, default=None)


def _join(beginning: str, endings: Sequence[str], found: Collection[str]) -> str:
    for ending in endings:
        if ending not in found and not os.path.isfile(beginning + ending):  # which one file as a root lacks
            raise UserError(
                f"image {one_line(name_image(beginning + MARK))} has no band {ending}: "
                f"{one_line(beginning + ending)} is not there (--data.bands)"
            )
    return MARK.join((beginning, *endings))


def split_bands(image: str) -> tuple[str, ...]:
    """The paths of an image's files: of most images one."""
    beginning, *endings = image.split(MARK)
    return tuple(beginning + ending for ending in endings) if endings else (beginning,)


def name_image(image: str) -> str:
    """The path by which an image is named: of bands what their paths begin with, or their folder."""
    beginning, mark, _ = image.partition(MARK)
    return beginning.rstrip(BETWEEN).rstrip(os.sep) or beginning if mark else image


def find_stem(image: str) -> str:
    """The name of an image without folders and suffix, which annotation files have."""
    return os.path.basename(name_image(image)) if MARK in image else Path(image).stem


def has_files(image: str) -> bool:
    """Whether all files of an image are there."""
    return all(map(os.path.isfile, split_bands(image)))
