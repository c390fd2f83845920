"""Images a second on one core: the pre-training reader against plain pipelines of other libraries, in the same run.

Each reads a file, takes the same random crops, resizes them bicubically and mirrors half of them; out comes a tensor in
the stored type. Photographs are compared with Pillow, all other images with tifffile and rasterio, which resize by
torch. With --window-size, crops are of random windows of the images, as of large scenes. Rounds over the folder
alternate between the readers, and medians are compared, of the time of the processor: other programs change it little.
"""

import argparse
import functools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from itpn.data.augment import PretrainingTransform, draw_crop
from itpn.data.decode import UnreadableImage
from itpn.data.files import find_images
from itpn.data.image_type import PHOTOGRAPHS, ImageType, Pixels
from itpn.data.pixels import mirror
from itpn.data.readers import FileReader
from itpn.data.samples import WindowRequest, open_sample, type_of
from itpn.errors import UserError

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
Read = Callable[[int, str], Tensor]  # of a number that seeds the crop, and a path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="any tree of images")
    parser.add_argument("--img-size", type=int, default=224, help="height and width of the crops in pixels")
    parser.add_argument("--window-size", type=int, help="side of random windows that the crops are taken of")
    parser.add_argument("--per-image", type=int, default=1, help="crops of each image in a round")
    parser.add_argument("--plain", nargs="+", choices=("tifffile", "rasterio"), help="only these of what others read")
    parser.add_argument("--rounds", type=int, default=5, help="how often each reader goes through the folder")
    parser.add_argument("--gpu", type=float, help="images a second that a GPU trains: workers that it needs")
    parser.add_argument("--json", type=Path, help="also write the metrics to this file")
    args = parser.parse_args()

    torch.set_num_threads(1)
    try:
        paths = find_images([args.folder]).images
    except UserError as error:
        parser.error(str(error))
    if not paths or args.rounds < 1:
        parser.error("--rounds must be at least 1" if paths else f"{args.folder} holds shards: give a folder of images")
    paths = tuple(path for path in paths if is_readable(path)) * args.per_image
    if not paths:
        parser.error(f"none of the images in {args.folder} can be read")
    photographs = type_of(open_sample(Path(paths[0]))).is_photo
    plain = {"Pillow": read_pillow} if photographs else {"tifffile": read_tifffile, "rasterio": read_rasterio}
    readers: dict[str, Read] = {
        "itpn": functools.partial(read_itpn, FileReader(paths), args.img_size, args.window_size)
    }
    for name, read in plain.items():
        if photographs or args.plain is None or name in args.plain:
            readers[name] = functools.partial(read_plainly, read, args.img_size, args.window_size)
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for round_ in range(args.rounds + 1):
        for name, reader in readers.items():
            seconds = time_round(reader, paths)
            if round_ > 0:  # the first fills the file cache
                rates[name].append(len(paths) / seconds)
    report(args, rates, len(paths))


def report(args: argparse.Namespace, rates: dict[str, list[float]], images: int) -> None:
    medians = {name: statistics.median(rate) for name, rate in rates.items()}
    of = "" if args.window_size is None else f" of windows of {args.window_size} px"
    table = Table(title=f"{images} images, crops of {args.img_size} px{of}, {args.rounds} rounds, one thread")
    for column in ("reader", "images/s", "slowest round", "fastest round"):
        table.add_column(column, justify="left" if column == "reader" else "right")
    for name, rate in rates.items():
        table.add_row(name, f"{medians[name]:.0f}", f"{min(rate):.0f}", f"{max(rate):.0f}")
    console = Console()
    console.print(table)
    ratios = {name: medians["itpn"] / median for name, median in medians.items() if name != "itpn"}
    for name, ratio in ratios.items():
        console.print(f"itpn / {name}: {ratio:.2f}")
    if args.gpu:
        console.print(
            f"a GPU of {args.gpu:g} images/s needs {-(-args.gpu // medians['itpn']):.0f} workers like this core"
        )
    if args.json:
        metrics = {"images": images, "img_size": args.img_size, "images_per_second": medians, "ratios": ratios}
        args.json.write_text(json.dumps(metrics, indent=2) + "\n")


def is_readable(path: str) -> bool:
    try:
        open_sample(Path(path))
    except UnreadableImage as error:
        print(f"skipped {path}: {error}", file=sys.stderr)
        return False
    return True


def time_round(read: Read, paths: tuple[str, ...]) -> float:
    start = time.process_time()
    for number, path in enumerate(paths):
        read(number, path)
    return time.process_time() - start


def draw_window(height: int, width: int, size: int | None, rng: random.Random) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random window; of the image where no size is given."""
    if size is None:
        return 0, 0, height, width
    rows, cols = min(size, height), min(size, width)
    return rng.randint(0, height - rows), rng.randint(0, width - cols), rows, cols


@functools.cache
def find_size(path: str) -> tuple[int, int]:
    """Height and width: a run reads them once, at its start."""
    sample = open_sample(Path(path))
    return sample.height, sample.width


@functools.cache
def make_transform(img_size: int, kind: ImageType) -> PretrainingTransform:
    values = PHOTOGRAPHS if kind.is_photo else Pixels(kind)
    return PretrainingTransform((img_size, img_size), SCALE, RATIO, pixels=values)


def read_itpn(files: FileReader, img_size: int, window_size: int | None, number: int, path: str) -> Tensor:
    """As the workers of a run do."""
    rng = random.Random(number)
    data: Any = files[number][1]
    if window_size is not None:
        data = WindowRequest(data, draw_window(*find_size(path), window_size, rng))
    sample = open_sample(data)
    return make_transform(img_size, type_of(sample))(sample, rng)["image"]


def read_plainly(
    read: Callable[..., np.ndarray], img_size: int, window_size: int | None, number: int, path: str
) -> Tensor:
    """A crop [C, h, w] by another library, resized in float32 and brought back to its type."""
    rng = random.Random(number)

    def choose(height: int, width: int) -> tuple[int, int, int, int]:
        top, left, rows, cols = draw_window(height, width, window_size, rng)
        y, x, h, w = draw_crop(rows, cols, SCALE, RATIO, rng)
        return top + y, left + x, h, w

    pixels = read(path, choose)
    size = [img_size, img_size]
    if pixels.dtype == np.uint8:
        view = resize(torch.from_numpy(pixels.copy()), size, InterpolationMode.BICUBIC, antialias=True)
    else:
        resized = resize(torch.from_numpy(pixels.astype(np.float32)), size, InterpolationMode.BICUBIC, antialias=True)
        view = torch.from_numpy(resized.round().numpy().astype(pixels.dtype))
    return mirror(view) if rng.random() < 0.5 else view


def read_pillow(path: str, choose: Callable[[int, int], tuple[int, int, int, int]]) -> np.ndarray:
    with Image.open(path) as image:
        top, left, height, width = choose(image.height, image.width)
        return np.asarray(image.convert("RGB").crop((left, top, left + width, top + height))).transpose(2, 0, 1)


def read_tifffile(path: str, choose: Callable[[int, int], tuple[int, int, int, int]]) -> np.ndarray:
    import tifffile

    pixels = tifffile.imread(path)
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    pixels = pixels if pixels.shape[0] < pixels.shape[-1] else np.moveaxis(pixels, -1, 0)
    top, left, height, width = choose(*pixels.shape[1:])
    return pixels[:, top : top + height, left : left + width]


def read_rasterio(path: str, choose: Callable[[int, int], tuple[int, int, int, int]]) -> np.ndarray:
    import rasterio
    from rasterio.windows import Window

    with rasterio.open(path) as raster:
        top, left, height, width = choose(raster.height, raster.width)
        pixels: np.ndarray = raster.read(window=Window(left, top, width, height))
        return pixels


if __name__ == "__main__":
    main()
