"""What the network predicts as a picture, and the images for it."""

import colorsys
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize
from torchvision.utils import draw_segmentation_masks, make_grid

from itpn.data.augment import center_crop
from itpn.data.decode import UnreadableImage, open_sample
from itpn.data.files import ImageSource
from itpn.data.readers import FileReader
from itpn.data.shards import read_shard
from itpn.system.console import tell_remarks
from itpn.system.writing import open_whole
from itpn.tasks.pretraining.module import PretrainingTask

HEADER, PADDING = 20, 4  # pixels
SMALL, LARGE = 224, 320  # pixels: sides that smaller images are enlarged towards


def draw_predictions(task: PretrainingTask, images: Tensor, sets: int = 2) -> Image.Image:
    """Rows of original, masked and predicted images, the latter with the visible units kept; of features instead of
    pixels, the teacher's (where there is one) and the prediction, three principal components as colours.

    Args:
        images: uint8 [n, 3, H, W].
        sets: rows side by side.
    """
    columns = hide_and_predict(task, images)
    stack = torch.stack(list(columns.values()), dim=1)  # [n, columns, 3, H, W]
    tiles = enlarge(stack.flatten(0, 1).cpu())
    count = len(columns) * min(sets, len(images))
    board = make_grid(tiles, nrow=count, padding=PADDING, pad_value=255)
    picture = Image.new("RGB", (board.shape[2], board.shape[1] + HEADER), "white")
    picture.paste(Image.fromarray(board.permute(1, 2, 0).numpy()), (0, HEADER))
    titles = [list(columns)[column % len(columns)] for column in range(count)]
    write_row(picture, titles, tiles.shape[-1], top=0)
    return picture


def hide_and_predict(task: PretrainingTask, images: Tensor) -> dict[str, Tensor]:
    """The columns of :func:`draw_predictions` by title, uint8 [n, 3, H, W] each.

    The same images get the same masks, so that pictures of a run can be compared.
    """
    images = images.to(task.device)
    x = task.normalize(images)
    grid = task.model.backbone.grid_of(x.shape[-2:])
    generator = torch.Generator().manual_seed(task.config.seed)
    mask = task.model.draw_mask(len(x), grid, generator=generator).to(x.device)
    if "pixel" in task.model.objective.weights:
        pictures = [task.normalize.undo(picture) for picture in task.model.reconstruct(x, mask)[:2]]
        return dict(zip(("original", "masked", "predicted"), [images, *pictures], strict=True))
    masked = task.normalize.undo(x.masked_fill(task.model.mask_map(mask, grid), 0.0))
    return {"original": images, "masked": masked, **_draw_features(task, images, x, mask, grid)}


def draw_titles(images: Tensor, titles: list[str], per_row: int = 4) -> Image.Image:
    """Images uint8 [n, 3, H, W] in rows, each below its title."""
    tiles = enlarge(images)
    height, width = tiles.shape[-2:]
    step = height + PADDING + HEADER
    per_row = min(per_row, len(tiles))
    rows = -(-len(tiles) // per_row)
    picture = Image.new("RGB", (per_row * (width + PADDING) + PADDING, rows * step + PADDING), "white")
    for row in range(rows):
        first = row * per_row
        write_row(picture, titles[first : first + per_row], width, top=row * step)
        for column, tile in enumerate(tiles[first : first + per_row]):
            place = (PADDING + column * (width + PADDING), row * step + HEADER)
            picture.paste(Image.fromarray(tile.permute(1, 2, 0).numpy()), place)
    return picture


def enlarge(images: Tensor, side: int = SMALL) -> Tensor:
    """Small images [..., H, W] are shown larger, by a whole number of times."""
    scale = find_scale(images, side)
    return images.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def find_scale(images: Tensor, side: int) -> int:
    return max(1, side // max(images.shape[-2:]))


def write_row(picture: Image.Image, titles: list[str], width: int, top: int) -> None:
    """A title above each of a row of images, cut where it would run into the next."""
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    for column, title in enumerate(titles):
        while title and draw.textlength(title, font=font) > width:
            title = title[:-2] + "\u2026" if len(title) > 2 else ""
        draw.text((PADDING + column * (width + PADDING), top + 4), title, fill="black", font=font)


def _draw_features(
    task: PretrainingTask, images: Tensor, x: Tensor, mask: Tensor, grid: tuple[int, int]
) -> dict[str, Tensor]:
    """Feature maps as pictures, uint8 [n, 3, H, W]."""
    batch = {"image": images}
    if task.teacher_size is not None:
        batch["teacher_image"] = resize(images, list(task.teacher_size), InterpolationMode.BICUBIC, antialias=True)
    output = task.model.forward_eval(x, mask, task.make_targets(batch, x))
    prediction = output.prediction.float()  # [n, N, D]
    target = prediction if output.target is None else output.target
    flat = target.flatten(0, 1)
    mean = flat.mean(dim=0)
    with torch.random.fork_rng(devices=[]):  # the decomposition starts from random numbers
        torch.manual_seed(0)
        _, _, axes = torch.pca_lowrank((flat - mean).cpu(), q=min(6, *flat.shape), center=False)
    axes = F.pad(axes[:, :3], (0, max(0, 3 - axes.shape[1]))).to(x.device)  # one unit alone has but one
    spread = (2 * ((flat - mean) @ axes).std(dim=0)).clamp(min=1e-6)  # two deviations span the range of a colour
    columns = {"predicted features": prediction}
    if output.target is not None:
        columns = {"teacher's features": target, **columns}

    def paint(features: Tensor) -> Tensor:
        colours = (((features - mean) @ axes) / spread * 0.5 + 0.5).clamp(0, 1) * 255  # [n, N, 3]
        maps = colours.round().to(torch.uint8).transpose(1, 2).unflatten(2, grid)
        unit = task.model.backbone.patch_size
        return maps.repeat_interleave(unit, 2).repeat_interleave(unit, 3)

    return {title: paint(features) for title, features in columns.items()}


def read_whole_images(
    source: ImageSource,
    img_size: tuple[int, int],
    max_pixels: int,
    skipped: Callable[[str], None] = lambda message: None,
    crop: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Decode images one after the other, cropped to the centre: name and uint8 [3, height, width].

    Remarks on the values of images are told.

    Args:
        crop: makes images of that size; None for the largest centre crop.
        skipped: told "name: reason" of an unreadable one.
    """
    crop = crop or functools.partial(center_crop, img_size=img_size)
    files = FileReader(source.images)
    shards = (read_shard(shard, source.members) for shard in source.shards)
    for name, data in itertools.chain((files[number] for number in range(len(files))), *shards):
        try:
            image = open_sample(data, max_pixels)
            pixels = image.decode()
        except UnreadableImage as error:
            skipped(f"{name}: {error}")
            continue
        tell_remarks({kind: (name, warning) for kind, warning in image.warnings.items()})
        yield name, crop(pixels)


# --- objects

TILE = 448  # pixels: longest side of a picture among others


def draw_objects(image: Tensor, found: dict[str, Tensor], classes: Sequence[str], threshold: float) -> Image.Image:
    """An image with the objects that were found in it: masks, boxes, names and scores.

    The smallest masks and the likeliest boxes are on top.

    Args:
        image: uint8 [3, H, W].
        found: "boxes" [n, 4], "labels" int64 [n] from 1, "scores" [n] and perhaps "masks" [n, 1, H, W] as
            probabilities; objects that are known (an annotation) have no "scores" and masks of 0 and 1 [n, H, W].
    """
    scores = found.get("scores", torch.ones(len(found["boxes"])))
    order = [row for row in scores.argsort().tolist() if scores[row] >= threshold]
    height, width = image.shape[-2:]
    scale = find_scale(image, LARGE)
    image = enlarge(image, LARGE)
    colours = [name_colour(int(found["labels"][row])) for row in order]
    if "masks" in found and order:
        masks = found["masks"][order].reshape(len(order), height, width) > 0.5
        smallest = masks.sum(dim=(1, 2)).argsort(stable=True)
        masks[smallest] &= masks[smallest].cumsum(dim=0) <= 1  # pixels of two are the smaller one's
        image = draw_segmentation_masks(image, enlarge(masks, LARGE), alpha=0.45, colors=colours)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    draw, side = ImageDraw.Draw(picture), max(picture.size)
    font, line = ImageFont.load_default(size=max(11, side // 50)), max(2, side // 320)
    tags = []
    for row, colour in zip(order, colours, strict=True):
        x0, y0, x1, y1 = (scale * value for value in found["boxes"][row].tolist())
        draw.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=colour, width=line)
        name = classes[int(found["labels"][row]) - 1]
        tags.append((x0, y0, f"{name} {float(scores[row]):.0%}" if "scores" in found else name, colour))
    for x0, y0, text, colour in tags:  # above all boxes, or they could not be read
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        across, down = right - left + 6, bottom - top + 6
        x, y = min(max(x0, 0), max(picture.width - across, 0)), y0 - down if y0 >= down else y0
        draw.rectangle((x, y, x + across, y + down), fill=colour)
        draw.text((x + 3 - left, y + 3 - top), text, fill="black" if sum(colour) > 380 else "white", font=font)
    return picture


def draw_labels(
    image: Tensor, labels: Tensor, classes: Sequence[str], colours: Sequence[tuple[int, int, int]] | None = None
) -> Image.Image:
    """An image under the colours of its pixels' classes, outlined, with a legend of those that it has, the largest
    first.

    Args:
        image: uint8 [3, H, W].
        labels: uint8 [H, W], numbers of classes; others are left uncoloured.
        colours: of the classes; None for colours that are unlike one another.
    """
    colours = colours or [name_colour(number) for number in range(1, len(classes) + 1)]
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(classes)] = colours
    shown = enlarge(labels, LARGE).numpy()
    picture = Image.fromarray(enlarge(image, LARGE).permute(1, 2, 0).numpy())
    mixed = Image.blend(picture, Image.fromarray(palette[shown]), 0.6)
    picture.paste(mixed, mask=Image.fromarray(shown < len(classes)))
    edges = np.zeros_like(shown, dtype=bool)
    edges[:, 1:] |= shown[:, 1:] != shown[:, :-1]
    edges[1:] |= shown[1:] != shown[:-1]
    picture.paste("black", mask=Image.fromarray(edges))
    counts = labels.flatten().bincount(minlength=len(classes))[: len(classes)]
    present = [number for number in counts.argsort(descending=True).tolist() if counts[number]]
    font = ImageFont.load_default(size=max(11, max(picture.size) // 50))
    return add_legend(picture, [(classes[n], colours[n]) for n in present], font)


def save_labels(labels: Tensor, classes: int, colours: Sequence[tuple[int, int, int]] | None, path: Path) -> None:
    """Write classes of pixels, uint8 [H, W], as a PNG of their numbers that shows their colours."""
    palette = colours or [name_colour(number) for number in range(1, classes + 1)]
    picture = Image.fromarray(labels.numpy(), mode="P")
    picture.putpalette([value for colour in palette for value in colour])
    save_whole(picture, path)


def save_whole(picture: Image.Image, path: Path) -> None:
    """Write a PNG that appears whole, or not at all."""
    with open_whole(path) as file:
        picture.save(file, "PNG")


def add_legend(picture: Image.Image, entries: Sequence[tuple[str, tuple[int, int, int]]], font: Any) -> Image.Image:
    """Names beside their colours, in rows below a picture."""
    side = font.getbbox("Ag")[3] + 2
    widths = [side + 6 + round(font.getlength(name)) + 14 for name, _ in entries]
    places, x, row = [], 6, 0
    for width in widths:
        if x > 6 and x + width > picture.width:
            x, row = 6, row + 1
        places.append((x, row))
        x += width
    board = Image.new("RGB", (picture.width, picture.height + (row + 1) * (side + 6) + 4), "white")
    board.paste(picture)
    draw = ImageDraw.Draw(board)
    for (name, colour), (x, row) in zip(entries, places, strict=True):
        y = picture.height + 4 + row * (side + 6)
        draw.rectangle((x, y, x + side, y + side), fill=colour, outline="black")
        draw.text((x + side + 6, y), name, fill="black", font=font)
    return board


def name_colour(label: int) -> tuple[int, int, int]:
    """A colour for a class, unlike those of its neighbours."""
    saturation, value = ((0.75, 0.95), (0.9, 0.6), (0.4, 0.85))[(label + label // 21) % 3]  # hues come close again
    red, green, blue = colorsys.hsv_to_rgb(label * 0.61803398875 % 1, saturation, value)  # steps of the golden ratio
    return round(255 * red), round(255 * green), round(255 * blue)


def join_pictures(pictures: Sequence[Image.Image], per_row: int = 4, titles: Sequence[str] = ()) -> Image.Image:
    """Pictures of any size in rows, each as large as fits; titles are of the columns."""
    tiles = [picture.copy() for picture in pictures]
    for tile in tiles:
        tile.thumbnail((TILE, TILE))
    width, height = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    columns = min(per_row, len(tiles))
    rows = -(-len(tiles) // columns)
    top = HEADER if titles else 0
    size = (columns * (width + PADDING) + PADDING, top + rows * (height + PADDING) + PADDING)
    board = Image.new("RGB", size, "white")
    write_row(board, list(titles), width, top=0)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        board.paste(tile, (PADDING + column * (width + PADDING), top + PADDING + row * (height + PADDING)))
    return board
