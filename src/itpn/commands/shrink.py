"""`itpn shrink`: large images, once into shards of resized copies."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from itpn.commands.options import Members, of_data, shown
from itpn.data.files import find_splits
from itpn.errors import UserError
from itpn.system.checks import NumWorkers, PositiveInt, Range


@dataclass(frozen=True)
class Shrink:
    """Resize large images once, into shards of small ones to train from.

    Worth it where decoding is what training waits for: photographs of many megapixels. 512 px suit --data.img-size 224:
    the smallest random crops, a fifth of the area, are then about as large. Nothing is enlarged, and upright JPEGs that
    are small already stay as they are. Images of more than 8 bits or other channels are refused. Class folders and .cls
    in shards are kept as labels, train and val apart. Stopped in the middle, the same command resumes.
    """

    images: Annotated[Positional[tuple[str, ...]], shown("DIR [DIR ...]", "(required)")]
    """Folders of images, or of tar shards."""
    out: Annotated[str, shown("DIR")]
    """Folder for the shards: the --data.root of training."""
    short_side: Annotated[int, Range(1, 2**16), shown("PX")] = 512
    """Shorter side of the resized images."""
    quality: Annotated[int, Range(1, 100), shown("N")] = 95
    """JPEG quality, 1 to 100."""
    shard_size: Annotated[int, Range(1, 10**6), shown("N")] = 512
    """Images per shard."""
    num_workers: Annotated[NumWorkers | None, shown("N", "(default: one for each core)")] = None
    """Worker processes."""
    members: Members = ()
    max_pixels: Annotated[
        PositiveInt | None, of_data("max-pixels", "N", "2**27", "Images of more pixels are left out.")
    ] = None

    def run(self) -> None:
        if not self.out or not all(self.images):
            raise UserError("a folder's name is empty: give the images as DIR and the folder for the shards as --out")
        out = Path(os.path.realpath(self.out))
        for root in self.images:
            place = Path(os.path.realpath(root))
            if place == out or out in place.parents or place in out.parents:
                raise UserError(f"--out {self.out} and {root} overlap: choose an --out beside it")
        splits = find_splits(self.images, self.members)
        from itpn.data.decode import MAX_PIXELS
        from itpn.data.shrinking import shrink
        from itpn.training.launch import count_cores

        workers = count_cores() if self.num_workers is None else self.num_workers
        sizes = self.short_side, self.quality, self.shard_size
        shrink(splits, Path(self.out), *sizes, workers, self.max_pixels or MAX_PIXELS)
