"""Members of tar shards: images and labels, grouped by sample."""

import itertools
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from itpn.data.file_types import CLASS_FILES, IMAGE_SUFFIXES, LINK, SPECIAL, is_array, is_hidden, suffix_of
from itpn.errors import UserError

ALL = "all"
MOST_OF_A_SAMPLE = 64  # images
REMEDY = "--data.members says which to read, `all` for every one"
# words between key and suffix of annotations that are images, but not to train on
SECONDARY = {
    *("seg", "segmentation", "semantic", "instance", "panoptic", "mask", "masks", "label", "labels", "labelids"),
    *("depth", "disparity", "normal", "normals", "flow", "edge", "edges", "alpha", "matte", "saliency", "heatmap"),
    *("annotation", "gt", "target", "thumb", "thumbnail", "preview"),
}


class Member(NamedTuple):
    """An image in a shard.

    Attributes:
        key: of its sample.
        ending: what follows the key, without the dot, in lower case: ``jpg``, ``seg.png``.
        content: the result of the caller's function.
    """

    name: str
    key: str
    ending: str
    content: Any


def split_name(name: str) -> tuple[str, str]:
    """Key and ending of a member, as in WebDataset: divided at the first dot after the last slash."""
    folder, slash, base = name.rpartition("/")
    key, _, ending = base.partition(".")
    return folder + slash + key, ending.lower()


def is_image_ending(ending: str) -> bool:
    return f".{ending}".endswith(IMAGE_SUFFIXES)


def is_label_ending(ending: str) -> bool:
    return ending.rpartition(".")[2] == "cls"


class Choice:
    """Chooses the images of a shard that are read.

    An image is plain if its ending is only its suffix (``x.jpg``). The plain images of a sample are read, or if there
    are none its only other image (``x.rgb.png``), not counting :data:`SECONDARY` ones. Arrays (``x.npy``) beside other
    images are none, see :func:`itpn.data.file_types.leave_arrays`.

    Args:
        endings: of the members to read instead; :data:`ALL` for every image.

    Raises:
        UserError: an ending that is not of an image.

    Attributes:
        taken, left: numbers of images that are read and that are left out, by ending.
        problem: why the choice is ambiguous for a sample; empty if it is not.
    """

    def __init__(self, endings: Sequence[str] = ()) -> None:
        self.taken: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self.problem = ""
        self._endings = {ending.lower().lstrip(".") for ending in endings}
        for ending in sorted(self._endings - {ALL}):
            if not is_image_ending(ending):
                raise UserError(
                    f"--data.members {ending} is no ending of an image: give `jpg`, `rgb.png` or the like, or all"
                )

    def choose(self, images: Iterable[Member]) -> Iterator[Member]:
        """Yield the images of a shard that are read; none of an ambiguous sample, see ``problem``."""
        for _, sample in itertools.groupby(images, key=lambda image: image.name if self._endings else image.key):
            members = iter(sample)
            # bounds the memory for a key with thousands of endings
            some = list(itertools.islice(members, MOST_OF_A_SAMPLE))
            self.left.update(image.ending for image in members)
            wanted = self._choose_of(some)
            self.taken.update(image.ending for image in wanted)
            self.left.update(image.ending for image in some if image not in wanted)
            yield from wanted
        if self.left and not self.taken and not self.problem:
            what = f"no images that end in {' or '.join(self._endings)}" if self._endings else "no plain images"
            self.problem = f"holds {what}, but {list_endings(self.left)}: {REMEDY}"

    def _choose_of(self, sample: Sequence[Member]) -> Sequence[Member]:
        if ALL in self._endings:
            return sample
        if self._endings:
            return [image for image in sample if image.ending in self._endings]
        sample = [image for image in sample if not is_array(image.name)] or sample
        if plain := [image for image in sample if "." not in image.ending]:
            return plain
        first = [image for image in sample if not _is_secondary(image.ending)]
        if len(first) > 1:
            names = ", ".join(os.path.basename(image.name) for image in first[:3])
            more = ", ..." if len(first) > 3 else ""
            self.problem = self.problem or f"holds several images of one sample ({names}{more}): {REMEDY}"
            return []
        return first

    def describe(self) -> str:
        """What is read and what is not, if that may be unintended; empty otherwise."""
        if not self._endings and (others := Counter({e: n for e, n in self.taken.items() if "." in e})):
            read = f"read, for want of plain images, are {list_endings(others)}"
        else:
            read = ""
        left = f"not read are {list_endings(self.left)}" if self.left else ""
        both = "; ".join(part for part in (read, left) if part)
        return f"{both} (see --data.members)" if both else ""


def find_members(
    members: Iterable[tarfile.TarInfo], read: Callable[[tarfile.TarInfo], Any], unread: Counter[str] | None = None
) -> Iterator[Member]:
    """Yield all images among an archive's members, without hidden ones, each with the result of ``read``.

    Args:
        unread: counts members that are neither images nor labels by suffix, as files of a folder; and links and pipes
            with the suffix of an image or label.
    """
    for member in members:
        if member.isdir() or is_hidden(member.name):
            continue
        key, ending = split_name(member.name)
        if not member.isfile():
            if unread is not None and (is_image_ending(ending) or is_label_ending(ending)):
                unread[LINK if member.issym() or member.islnk() else SPECIAL] += 1
            continue
        if is_image_ending(ending):
            yield Member(member.name, key, ending, read(member))
        elif unread is not None and not is_label_ending(ending) and os.path.basename(member.name) not in CLASS_FILES:
            unread[suffix_of(member.name)] += 1


def _is_secondary(ending: str) -> bool:
    """Whether an ending names an annotation of an image, one or one of several: ``seg.png``, ``mask_1.png``."""
    return any(re.sub(r"[_-]?\d+$", "", word) in SECONDARY for word in ending.split(".")[:-1])


def list_endings(endings: Counter[str]) -> str:
    """The most frequent endings, with their numbers."""
    some = ", ".join(f"{count:,} .{ending}" for ending, count in endings.most_common(4))
    return some + (f" and {len(endings) - 4} others" if len(endings) > 4 else "")
