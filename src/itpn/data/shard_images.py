"""Images of tar shards by index, for a sample of them that is spread over all."""

import gzip
import zlib
from collections.abc import Sequence

import numpy as np

from itpn.data.decode import UnreadableImage, reason_of
from itpn.data.readers import MAX_FILE, PackedStrings, check_lost, is_compressed, read_file, too_large
from itpn.data.shards import locate_images
from itpn.system.text import readable


class ShardImages:
    """The images of tar shards as a reader, one in memory at a time.

    A compressed shard is unpacked, and not kept, up to the image that is read: read in ascending order.

    Attributes:
        damaged: names and reasons of shards that are not read to their end.
    """

    def __init__(self, shards: Sequence[str], members: Sequence[str] = ()) -> None:
        self.damaged: list[tuple[str, str]] = []
        self._shards = list(shards)
        self._places: list[np.ndarray] = []  # of each shard: first byte and size of each image, int64 [n, 2]
        self._names: list[PackedStrings] = []
        self._unpacking = -1  # number of the compressed shard that is open
        self._file: gzip.GzipFile | None = None
        for path in self._shards:
            places, problem = locate_images(path, members)
            self._places.append(np.array([(one.start, one.size) for one in places], np.int64).reshape(-1, 2))
            self._names.append(PackedStrings([one.name for one in places]))
            if problem:
                self.damaged.append((readable(path), problem))
        self._ends = np.cumsum([len(places) for places in self._places])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        number, place = self._find(index)
        return self._names[number][place]

    def __getitem__(self, index: int) -> tuple[str, bytes | UnreadableImage]:
        number, place = self._find(index)
        start, size = self._places[number][place].tolist()
        name, path = self._names[number][place], self._shards[number]
        if size > MAX_FILE:
            return name, too_large(size)
        try:
            return name, self._unpack(number, start, size) if is_compressed(path) else read_file(path, start, size)
        except (OSError, EOFError, zlib.error) as error:
            check_lost(path, error)
            return name, UnreadableImage(reason_of(error))

    def _find(self, index: int) -> tuple[int, int]:
        """Number of the shard, and of the image in it."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - int(self._ends[number]) + len(self._places[number])

    def _unpack(self, number: int, start: int, size: int) -> bytes:
        if self._file is None or self._unpacking != number:
            self.close()
            self._unpacking, self._file = number, gzip.GzipFile(self._shards[number])
        self._file.seek(start)
        return self._file.read(size)

    def close(self) -> None:
        """Close the compressed shard that was read last."""
        if self._file is not None:
            self._file.close()
            self._file = None
