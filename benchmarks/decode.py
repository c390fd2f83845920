"""Images a second on one core: the pre-training reader against a plain Pillow pipeline, in the same run.

Both read a file, decode it, take a random resized crop of the same distribution and mirror half of them; out comes
a uint8 tensor. Rounds over the folder alternate between the two, and medians are compared.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.transforms import v2

from itpn.data.augment import PretrainingTransform
from itpn.data.decode import EncodedImage, UnreadableImage
from itpn.data.files import find_images
from itpn.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="any tree of images")
    parser.add_argument("--img-size", type=int, default=224, help="height and width of the crops in pixels")
    parser.add_argument("--rounds", type=int, default=5, help="how often each pipeline goes through the folder")
    parser.add_argument("--json", type=Path, help="also write the metrics to this file")
    args = parser.parse_args()

    torch.set_num_threads(1)
    try:
        paths = find_images([args.folder]).images
    except UserError as error:
        parser.error(str(error))
    if not paths or args.rounds < 1:
        parser.error("--rounds must be at least 1" if paths else f"{args.folder} holds shards: give a folder of images")
    readers = {"itpn": itpn_reader(args.img_size), "Pillow": pillow_reader(args.img_size)}
    rates: dict[str, list[float]] = {name: [] for name in readers}
    paths = tuple(path for path in paths if is_readable(readers["itpn"], path))
    if not paths:
        parser.error(f"none of the images in {args.folder} can be read")
    for round_ in range(args.rounds + 1):
        for name, read in readers.items():
            seconds = time_round(read, paths)
            if round_ > 0:  # the first fills the file cache
                rates[name].append(len(paths) / seconds)

    medians = {name: statistics.median(rate) for name, rate in rates.items()}
    ratio = medians["itpn"] / medians["Pillow"]
    table = Table(title=f"{len(paths)} images, crops of {args.img_size} px, {args.rounds} rounds, one thread")
    for column in ("reader", "images/s", "slowest round", "fastest round"):
        table.add_column(column, justify="left" if column == "reader" else "right")
    for name, rate in rates.items():
        table.add_row(name, f"{medians[name]:.0f}", f"{min(rate):.0f}", f"{max(rate):.0f}")
    console = Console()
    console.print(table)
    console.print(f"itpn / Pillow: {ratio:.2f}")
    if args.json:
        metrics = {"images": len(paths), "img_size": args.img_size, "images_per_second": medians, "ratio": ratio}
        args.json.write_text(json.dumps(metrics, indent=2) + "\n")


def is_readable(read: Callable[[str], Tensor], path: str) -> bool:
    try:
        read(path)
    except UnreadableImage as error:
        print(f"skipped {path}: {error}", file=sys.stderr)
        return False
    return True


def time_round(read: Callable[[str], Tensor], paths: tuple[str, ...]) -> float:
    start = time.perf_counter()
    for path in paths:
        read(path)
    return time.perf_counter() - start


def itpn_reader(img_size: int) -> Callable[[str], Tensor]:
    transform = PretrainingTransform((img_size, img_size))

    def read(path: str) -> Tensor:
        with open(path, "rb") as file:
            return transform(EncodedImage(file.read()), random.Random(path))["image"]

    return read


def pillow_reader(img_size: int) -> Callable[[str], Tensor]:
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(img_size, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )

    def read(path: str) -> Tensor:
        with Image.open(path) as image:
            return transform(image.convert("RGB"))

    return read


if __name__ == "__main__":
    main()
