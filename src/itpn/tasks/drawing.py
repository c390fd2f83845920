"""Visualizations: images beside one another with titles, and what a network predicts on top of an image."""

import colorsys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

from itpn.system.text import one_line
from itpn.system.writing import open_whole

HEADER, PADDING = 20, 4  # pixels
SMALL, LARGE = 224, 320  # pixels: sides that smaller images are enlarged towards
TILE = 448  # pixels: longest side of an image among others


def tile_images(
    images: Sequence[Image.Image],
    titles: Sequence[str] = (),
    per_row: int = 4,
    side: int | None = TILE,
    captions: Sequence[str] = (),
) -> Image.Image:
    """Images of any size in rows.

    Args:
        titles: above the first of the images, or all of them.
        side: pixels of a side that larger images are reduced to; None for none.
        captions: below the images, all of them or none.
    """
    tiles = [image.copy() for image in images]
    if side is not None:
        for tile in tiles:
            tile.thumbnail((side, side))
    width, height = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    columns = min(per_row, len(tiles))
    rows = [slice(first, first + columns) for first in range(0, len(tiles), columns)]
    lines = sum(bool(titles[row]) + bool(captions) for row in rows)
    size = columns * (width + PADDING) + PADDING, len(rows) * (height + PADDING) + lines * HEADER + PADDING
    board, y = Image.new("RGB", size, "white"), 0
    for row in rows:
        if titles[row]:
            _write_row(board, titles[row], width, y, _cut_end)
            y += HEADER
        for column, tile in enumerate(tiles[row]):
            board.paste(tile, (PADDING + column * (width + PADDING), y + PADDING))
        y += height + PADDING
        if captions:
            _write_row(board, captions[row], width, y, _cut_middle)
            y += HEADER
    return board


def caption_files(names: Sequence[str]) -> list[str]:
    """Captions of images that are read from files: their names, with the folder where two are called the same."""
    captions = [Path(name).name for name in names]
    if len({*captions}) < len(captions):
        captions = ["/".join(Path(name).parts[-2:]) for name in names]
    return [one_line(caption) for caption in captions]


def show(image: Tensor, side: int = SMALL) -> Image.Image:
    """uint8 [3, H, W] as an image, enlarged if it is small."""
    return Image.fromarray(enlarge(image.cpu(), side).permute(1, 2, 0).numpy())


def enlarge(images: Tensor, side: int = SMALL) -> Tensor:
    """Small images [..., H, W] are shown larger, by a whole number of times."""
    scale = find_scale(images, side)
    return images.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def find_scale(images: Tensor, side: int) -> int:
    return max(1, side // max(images.shape[-2:]))


def _write_row(board: Image.Image, texts: Sequence[str], width: int, top: int, cut: Callable[[str, int], str]) -> None:
    """A text for each of a row of images, cut where it would run into the next.

    Args:
        cut: a text and a number of characters to the text with so many left out.
    """
    draw, font = ImageDraw.Draw(board), ImageFont.load_default(size=13)
    for column, text in enumerate(texts):
        shown = (text, *(cut(text, number) for number in range(1, len(text) + 1)))
        fitting = next((one for one in shown if draw.textlength(one, font=font) <= width), "")
        draw.text((PADDING + column * (width + PADDING), top + 4), fitting, fill="black", font=font)


def _cut_end(text: str, number: int) -> str:
    return f"{text[: len(text) - number]}\u2026"


def _cut_middle(text: str, number: int) -> str:
    kept = len(text) - number
    return f"{text[: kept // 2]}\u2026{text[len(text) - (kept + 1) // 2 :]}"


# --- objects


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
    drawn = Image.fromarray(image.permute(1, 2, 0).numpy())
    draw, side = ImageDraw.Draw(drawn), max(drawn.size)
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
        x, y = min(max(x0, 0), max(drawn.width - across, 0)), y0 - down if y0 >= down else y0
        draw.rectangle((x, y, x + across, y + down), fill=colour)
        draw.text((x + 3 - left, y + 3 - top), text, fill="black" if sum(colour) > 380 else "white", font=font)
    return drawn


def draw_labels(
    image: Tensor, labels: Tensor, classes: Sequence[str], colours: Sequence[tuple[int, int, int]] | None = None
) -> Image.Image:
    """An image under the colours of its pixels' classes, outlined, with a legend of those that it has, the largest
    first.

    Args:
        image: uint8 [3, H, W].
        labels: uint8 [H, W], class indices; others are left uncoloured.
        colours: of the classes; None for colours that are unlike one another.
    """
    colours = colours or [name_colour(number) for number in range(1, len(classes) + 1)]
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(classes)] = colours
    shown = enlarge(labels, LARGE).numpy()
    drawn = show(image, LARGE)
    mixed = Image.blend(drawn, Image.fromarray(palette[shown]), 0.6)
    drawn.paste(mixed, mask=Image.fromarray(shown < len(classes)))
    edges = np.zeros_like(shown, dtype=bool)
    edges[:, 1:] |= shown[:, 1:] != shown[:, :-1]
    edges[1:] |= shown[1:] != shown[:-1]
    drawn.paste("black", mask=Image.fromarray(edges))
    counts = labels.flatten().bincount(minlength=len(classes))[: len(classes)]
    present = [number for number in counts.argsort(descending=True).tolist() if counts[number]]
    font = ImageFont.load_default(size=max(11, max(drawn.size) // 50))
    return add_legend(drawn, [(classes[n], colours[n]) for n in present], font)


def save_labels(labels: Tensor, classes: int, colours: Sequence[tuple[int, int, int]] | None, path: Path) -> None:
    """Write classes of pixels, uint8 [H, W], as a PNG of class indices with a palette of their colours."""
    palette = colours or [name_colour(number) for number in range(1, classes + 1)]
    drawn = Image.fromarray(labels.numpy(), mode="P")
    drawn.putpalette([value for colour in palette for value in colour])
    save_whole(drawn, path)


def save_whole(image: Image.Image, path: Path) -> None:
    """Write a PNG that appears whole, or not at all."""
    with open_whole(path) as file:
        image.save(file, "PNG")


def add_legend(image: Image.Image, entries: Sequence[tuple[str, tuple[int, int, int]]], font: Any) -> Image.Image:
    """Names beside their colours, in rows below an image."""
    side = font.getbbox("Ag")[3] + 2
    widths = [side + 6 + round(font.getlength(name)) + 14 for name, _ in entries]
    places, x, row = [], 6, 0
    for width in widths:
        if x > 6 and x + width > image.width:
            x, row = 6, row + 1
        places.append((x, row))
        x += width
    board = Image.new("RGB", (image.width, image.height + (row + 1) * (side + 6) + 4), "white")
    board.paste(image)
    draw = ImageDraw.Draw(board)
    for (name, colour), (x, row) in zip(entries, places, strict=True):
        y = image.height + 4 + row * (side + 6)
        draw.rectangle((x, y, x + side, y + side), fill=colour, outline="black")
        draw.text((x + side + 6, y), name, fill="black", font=font)
    return board


def name_colour(label: int) -> tuple[int, int, int]:
    """A colour for a class, unlike those of the classes beside it."""
    saturation, value = ((0.75, 0.95), (0.9, 0.6), (0.4, 0.85))[(label + label // 21) % 3]  # hues come close again
    red, green, blue = colorsys.hsv_to_rgb(label * 0.61803398875 % 1, saturation, value)  # steps of the golden ratio
    return round(255 * red), round(255 * green), round(255 * blue)
