"""Crops and their teacher features, computed once and read many times (`itpn cache-features`)."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from itpn.data.file_types import CACHE_INDEX
from itpn.errors import UserError
from itpn.system.text import read_text
from itpn.system.writing import write_whole


@dataclass
class CacheIndex:
    """The content of a cache, as ``itpn-features.json`` has it."""

    teacher: str
    checkpoint: str | None
    width: int
    img_size: tuple[int, int]
    patch_size: int
    images: int
    views: int
    shard_size: int
    settings: dict[str, Any]  # of the data and the seed: they determine the crops
    complete: bool = False
    sha256: str | None = None  # of the teacher's weights; None where it is not known

    @property
    def samples(self) -> int:
        """Crops: those of the first view, then those of the second."""
        return self.images * self.views

    @property
    def shards(self) -> int:
        return -(-self.samples // self.shard_size)


def read_index(folder: str | Path) -> CacheIndex:
    """Read a cache's index; UserError if it is corrupt."""
    path = Path(folder) / CACHE_INDEX
    try:
        index = CacheIndex(**json.loads(read_text(path)))
        height, width = index.img_size
        index.img_size = height, width  # JSON has no tuples
        for number in (index.width, height, width, index.patch_size, index.images, index.views, index.shard_size):
            if type(number) is not int or not 0 < number < 2**31:
                raise ValueError(f"{number!r} in place of a positive whole number")
    except (UserError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not the index of cached features ({type(error).__name__}): {error}") from error
    return index


def write_index(folder: Path, index: CacheIndex) -> None:
    write_whole(folder / CACHE_INDEX, (json.dumps(asdict(index), indent=2) + "\n").encode())


def shard_path(folder: str | Path, number: int) -> Path:
    return Path(folder) / f"features-{number:05d}.safetensors"


def write_shard(path: Path, images: Tensor, features: Tensor, keys: list[str]) -> None:
    """Write crops [n, C, H, W], features [n, N, D] and names of the images; the file appears when complete."""
    tensors = {"image": images.contiguous(), "feature": features.contiguous()}
    write_whole(path, serialize(tensors, {"keys": json.dumps(keys)}))


class FeatureCache:
    """Samples of a complete cache by index, read from disk on access.

    Raises:
        UserError: the cache is not complete, or a shard is missing or corrupt.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = read_index(folder)
        if not self.index.complete:
            raise UserError(f"cached features in {folder} are not complete: repeat the command that writes them")
        paths = (shard_path(folder, number) for number in range(self.index.shards))
        missing = next((path for path in paths if not path.is_file()), None)
        if missing:
            raise UserError(f"{missing} is missing: repeat the command that writes the features")
        self._open: dict[int, tuple[Any, list[str]]] = {}  # each process opens its own

    def __len__(self) -> int:
        return self.index.samples

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, str]:
        """Crop [C, H, W], features [N, D] and the image's name."""
        shard, row = divmod(number, self.index.shard_size)
        try:
            if shard not in self._open:
                file = safe_open(shard_path(self.folder, shard), "pt")
                self._open[shard] = file, json.loads(file.metadata()["keys"])
            file, keys = self._open[shard]
            key = keys[row]
            image, feature = (file.get_slice(name)[row] for name in ("image", "feature"))
        except (SafetensorError, OSError, IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(
                f"{shard_path(self.folder, shard)} is corrupt ({error}): remove it and repeat the command that wrote it"
            ) from error
        return image, feature, key

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def first(self, count: int) -> Tensor:
        """The first crops, [n, C, H, W]."""
        return torch.stack([self[number][0] for number in range(min(count, len(self)))])
