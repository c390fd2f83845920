"""Masks of classes: what their numbers or colours mean, and how they are read."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from itpn.data.decode import MAX_PIXELS, UnreadableImage, reason_of
from itpn.data.labelled import join_names
from itpn.errors import UserError

IGNORED = 255  # of pixels in memory: of no class, or nobody knows which
MAX_CLASSES = 254
NAME_FILES = ("classes.txt", "classes.csv", "class_dict.csv", "objectInfo150.txt")  # ADE20K has the last

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class LabelTable:
    """What the numbers, or colours, in mask files mean.

    Attributes:
        classes: names.
        numbers: uint8 [256], number in a file -> class, `IGNORED`, or 254 where it means nothing.
        colours: of the classes, where their file says them.
        by_colour: masks may be pictures in those colours; colour -> class or `IGNORED`.
    """

    classes: tuple[str, ...]
    numbers: np.ndarray
    colours: tuple[Colour, ...] | None = None
    by_colour: dict[Colour, int] | None = None

    def read(self, path: str, max_pixels: int = MAX_PIXELS) -> Tensor:
        """The classes of an image's pixels, uint8 [H, W].

        Raises:
            UnreadableImage: no mask, or of labels that no class has.
        """
        values = read_mask(path, max_pixels)
        if values.ndim == 3 and self.by_colour is not None:
            return torch.from_numpy(self._from_colours(values, self.by_colour))
        values = ungrey(values)
        if values.max(initial=0) > 255:
            raise UnreadableImage(f"label {values.max()}, which no class has")
        labels = self.numbers[values]
        if (labels == MAX_CLASSES).any():
            raise UnreadableImage(f"label {values[labels == MAX_CLASSES][0]}, which no class has")
        return torch.from_numpy(labels)

    def rename(self, classes: Sequence[str]) -> "LabelTable":
        """With the numbers that another list of classes gives them.

        Raises:
            UserError: a class is not in it.
        """
        if self.classes == tuple(classes):
            return self
        if unknown := [name for name in self.classes if name not in classes]:
            hint = "; --data.classes FILE names them" if all(name.isdigit() for name in unknown) else ""
            raise UserError(
                f"{join_names(unknown)} among the classes of the masks, but not of the model, whose are "
                f"{join_names(classes)}{hint}"
            )
        new = [list(classes).index(name) for name in self.classes]
        numbers = self.numbers.copy()
        for old, number in enumerate(new):
            numbers[self.numbers == old] = number
        by_colour = self.by_colour and {c: n if n == IGNORED else new[n] for c, n in self.by_colour.items()}
        return LabelTable(tuple(classes), numbers, None, by_colour)

    def _from_colours(self, values: np.ndarray, by_colour: dict[Colour, int]) -> np.ndarray:
        packed = (values.astype(np.uint32) * np.array([65536, 256, 1], dtype=np.uint32)).sum(axis=2, dtype=np.uint32)
        found, where = np.unique(packed, return_inverse=True)
        labels = np.empty(len(found), dtype=np.uint8)
        for row, value in enumerate(found.tolist()):
            colour = (value >> 16, value >> 8 & 255, value & 255)
            if colour not in by_colour:
                raise UnreadableImage(f"colour {colour}, which no class has")
            labels[row] = by_colour[colour]
        return labels[where].reshape(packed.shape)


def read_mask(path: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The numbers of a mask file, [H, W], or its colours, uint8 [H, W, 3].

    Raises:
        UnreadableImage: it is not there, damaged, too large, or transparent.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > max_pixels:
                raise UnreadableImage(f"{image.width}x{image.height} pixels, more than the {max_pixels} allowed")
            if image.mode == "1":
                image = image.convert("L").point(lambda value: value // 255)
            if image.mode not in ("L", "P", "RGB") and not image.mode.startswith("I"):
                raise UnreadableImage(f"a picture of mode {image.mode}, not of labels")
            values = np.asarray(image)  # of a palette, the numbers
    except UnreadableImage:
        raise
    except Exception as error:  # whatever Pillow meets
        raise UnreadableImage(reason_of(error)) from None
    if values.min(initial=0) < 0:
        raise UnreadableImage(f"label {values.min()}, which no class has")
    return values


def ungrey(values: np.ndarray) -> np.ndarray:
    """Numbers that were saved as shades of grey in three channels.

    Raises:
        UnreadableImage: they are colours.
    """
    if values.ndim == 2:
        return values
    if (values != values[..., :1]).any():
        raise UnreadableImage("a picture in colours: --data.classes needs a file of `NAME R G B` lines")
    return values[..., 0]


def read_names(file: str | None, root: str) -> list[tuple[str, Colour | None]] | None:
    """Names of classes, and their colours where the file says them.

    Raises:
        UserError: no such file, or a line that is no class.
    """
    if file is None:
        places = [place / name for place in (Path(root), Path(root).parent) for name in NAME_FILES]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            return None
        file = str(found)
    try:
        lines = [line.strip() for line in Path(file).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"file of classes {file} cannot be read: {error}") from error
    if lines and lines[0].startswith("Idx\t"):  # ADE20K's: number, three shares, stuff or not, name
        return [(line.split("\t")[-1].split(",")[0].strip(), None) for line in lines[1:]]
    names: list[tuple[str, Colour | None]] = []
    for row in csv.reader(lines) if any("," in line for line in lines) else (line.split() for line in lines):
        words = [word.strip() for word in row]
        if [word.lower() for word in words] == ["name", "r", "g", "b"]:
            continue
        if len(words) > 3 and all(word.isdigit() and int(word) < 256 for word in words[-3:]):
            red, green, blue = (int(word) for word in words[-3:])
            names.append((" ".join(words[:-3]), (red, green, blue)))
        else:
            names.append((" ".join(words), None))
    given: dict[str, list[Any]] = {"name": [n for n, _ in names], "colour": [c for _, c in names if c is not None]}
    for what, values in given.items():
        twice = [value for value in dict.fromkeys(values) if values.count(value) > 1]
        if twice:
            raise UserError(f"{file} has two classes of the {what} {twice[0]}")
    if len({colour is None for _, colour in names}) > 1:
        raise UserError(f"{file} has colours for some of the classes: give all or none")
    return names


def make_table(
    names: Sequence[tuple[str, Colour | None]], reduce_zero_label: bool, ignore: Iterable[int]
) -> LabelTable:
    """What masks mean whose labels are lines of a file, from 0, or from 1 where label 0 is of no class.

    Raises:
        UserError: fewer than two classes, or more than 254.
    """
    first = int(reduce_zero_label)
    left_out = {0, *ignore} if reduce_zero_label else set(ignore)
    kept = [(first + line, name, colour) for line, (name, colour) in enumerate(names) if first + line not in left_out]
    if not 2 <= len(kept) <= MAX_CLASSES:
        raise UserError(f"{len(kept)} classes of pixels: there must be from 2 to {MAX_CLASSES}")
    numbers = np.full(256, MAX_CLASSES, dtype=np.uint8)
    numbers[[number for number in left_out if number < 256]] = IGNORED
    for row, (number, _, _) in enumerate(kept):
        if number < 256:
            numbers[number] = row
    by_colour = None
    if names[0][1] is not None:
        row_of = {number: row for row, (number, _, _) in enumerate(kept)}
        by_colour = {c: row_of.get(first + line, IGNORED) for line, (_, c) in enumerate(names) if c is not None}
    colours = tuple(colour for _, _, colour in kept if colour is not None) or None
    return LabelTable(tuple(name for _, name, _ in kept), numbers, colours, by_colour)
