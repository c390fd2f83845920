"""Reconstructions as a picture, and the images for them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

from itpn.data.augment import center_crop
from itpn.data.decode import UnreadableImage, decode_image
from itpn.data.files import ImageSource
from itpn.data.shards import read_shard
from itpn.pretraining.masking import draw_random_mask
from itpn.tasks.pretrain import PretrainingTask

COLUMNS = ("original", "masked", "reconstructed")
HEADER = 20  # pixels


def draw_reconstructions(task: PretrainingTask, images: Tensor, sets: int = 2) -> Image.Image:
    """Rows of original, masked and reconstructed images; the reconstruction keeps the visible units.

    The same images get the same masks, so that pictures of a run can be compared.

    Args:
        images: uint8 [n, 3, H, W].
        sets: triples side by side.
    """
    x = task.normalize(images.to(task.device))
    rows, cols = task.model.backbone.grid_of(x.shape[-2:])
    generator = torch.Generator().manual_seed(task.config.seed)
    mask = draw_random_mask(len(x), rows * cols, task.model.mask_ratio, generator=generator).to(x.device)
    masked, reconstructed, _ = task.model.reconstruct(x, mask)
    triples = torch.stack([task.denormalize(t) for t in (x, masked, reconstructed)], dim=1)  # [n, 3, 3, H, W]
    scale = max(1, 224 // images.shape[-1])  # small images are shown larger
    tiles = triples.flatten(0, 1).cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    sets = min(sets, len(images))
    grid = make_grid(tiles, nrow=3 * sets, padding=4, pad_value=255)
    picture = Image.new("RGB", (grid.shape[2], grid.shape[1] + HEADER), "white")
    picture.paste(Image.fromarray(grid.permute(1, 2, 0).numpy()), (0, HEADER))
    draw = ImageDraw.Draw(picture)
    for column in range(3 * sets):
        left = 4 + column * (tiles.shape[-1] + 4)
        draw.text((left, 4), COLUMNS[column % 3], fill="black", font=ImageFont.load_default(size=13))
    return picture


def read_whole_images(
    source: ImageSource,
    img_size: tuple[int, int],
    max_pixels: int,
    skipped: Callable[[str], None] = lambda message: None,
) -> Iterator[Tensor]:
    """Decode images one after the other, cropped to the centre: uint8 [3, height, width].

    Args:
        skipped: told "name: reason" of an unreadable one.
    """
    for name in source.images:
        try:
            yield center_crop(decode_image(Path(name).read_bytes(), max_pixels), img_size)
        except (UnreadableImage, OSError) as error:
            skipped(f"{name}: {error}")
    for shard in source.shards:
        for name, data in read_shard(shard):
            try:
                if isinstance(data, UnreadableImage):
                    raise data
                yield center_crop(decode_image(data, max_pixels), img_size)
            except UnreadableImage as error:
                skipped(f"{name}: {error}")
