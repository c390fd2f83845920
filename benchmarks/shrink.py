"""Images a second that a thread reads to train on: photographs of 12 megapixels, and what `itpn shrink` makes of them.

The photographs are enlarged from a folder of smaller ones. Rounds alternate between the two, and medians are compared.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from itpn.cli import main as itpn
from itpn.data.augment import PretrainingTransform
from itpn.data.files import find_images
from itpn.data.loader import TrainingLoader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="any tree of images")
    parser.add_argument("--images", type=int, default=12, help="how many of them are taken")
    parser.add_argument("--megapixels", type=float, default=12, help="size that they are enlarged to")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        large, small = Path(name) / "large", Path(name) / "small"
        large.mkdir()
        paths = find_images([args.folder]).images
        for number, path in enumerate(paths[:: -(-len(paths) // args.images)]):
            enlarge(path, args.megapixels * 1e6).save(large / f"{number}.jpg", quality=95)
        itpn(["shrink", str(large), "--out", str(small)])
        rates: dict[Path, list[float]] = {large: [], small: []}
        for _ in range(args.rounds):
            for root, epochs in ((large, 1), (small, 10)):
                rates[root].append(read(root, epochs))
    before, after = (statistics.median(rate) for rate in rates.values())
    print(f"{before:.1f} images/s before, {after:.0f} after: {after / before:.1f} times")


def enlarge(path: str, pixels: float) -> Image.Image:
    image = Image.open(path).convert("RGB")
    scale = (pixels / (image.width * image.height)) ** 0.5
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def read(root: Path, epochs: int) -> float:
    loader = TrainingLoader(find_images([root]), PretrainingTransform(), batch_size=4, num_workers=0, seed=0)
    begin = time.perf_counter()
    images = sum(len(batch["image"]) for _ in range(epochs) for batch in loader)
    return images / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
