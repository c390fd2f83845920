"""Masks of classes: what their numbers or colours mean, and how they are read."""

import functools
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from itpn.data.class_names import Colour, Names, join_names
from itpn.data.decode import MAX_PIXELS, UnreadableImage, find_lossy, load_image, open_image, reading
from itpn.data.readers import read_file
from itpn.errors import UserError

IGNORED = 255  # of pixels in memory: of no class, or nobody knows which
MAX_CLASSES = 254
VOID = 1 << 24  # a packed colour that no picture has, and the numbers after it: of labels of no class in a palette


@dataclass(frozen=True)
class LabelTable:
    """What the numbers, or colours, in mask files mean.

    Attributes:
        classes: names.
        numbers: uint8 [256], number in a file -> class, `IGNORED`, or 254 where it means nothing.
        colours: of the classes, where their file says them.
        by_colour: masks may be pictures in those colours; colour -> class or `IGNORED`.
        left_out: numbers that are of no class.
    """

    classes: tuple[str, ...]
    numbers: np.ndarray
    colours: tuple[Colour, ...] | None = None
    by_colour: dict[Colour, int] | None = None
    left_out: tuple[int, ...] = ()

    def read(self, path: str, max_pixels: int = MAX_PIXELS) -> Tensor:
        """The classes of an image's pixels, uint8 [H, W].

        Raises:
            UnreadableImage: no mask, or of labels that no class has.
        """
        values = read_mask(path, max_pixels, self)
        if values.ndim == 3 and self.by_colour is not None:
            colours, numbers = self._sorted_colours
            packed = pack(values)
            places = np.searchsorted(colours, packed).clip(max=len(colours) - 1)
            labels, known = numbers[places], colours[places] == packed
        else:
            values = packed = ungrey(values)
            labels = self.numbers[values.clip(max=255)]
            known = labels != MAX_CLASSES
            if values.max(initial=0) > 255:
                above = values > 255
                labels[above] = IGNORED
                known = np.where(above, np.isin(values, self.left_out), known)
        if not known.all():
            raise UnreadableImage(self.explain(int(packed[~known][0]), colour=values.ndim == 3))
        return torch.from_numpy(labels)

    @functools.cached_property
    def _sorted_colours(self) -> tuple[np.ndarray, np.ndarray]:
        """Packed colours in order, and their classes: found once, for every mask needs them."""
        void = {(256, 0, number): IGNORED for number in range(256)}
        known = {**(self.by_colour or {}), **void}
        packed, numbers = pack(np.array(list(known))), np.array(list(known.values()), dtype=np.uint8)
        order = packed.argsort()
        return packed[order], numbers[order]

    def find(self, value: int, colour: bool) -> int | None:
        """The class of a number in a file, or of a colour (see `pack`), or `IGNORED`; None where it means nothing."""
        if colour:
            return IGNORED if value >= VOID else (self.by_colour or {}).get(unpack(value))
        if value > 255:
            return IGNORED if value in self.left_out else None
        return None if self.numbers[value] == MAX_CLASSES else int(self.numbers[value])

    def explain(self, value: int, colour: bool) -> str:
        return f"colour {unpack(value)}, which no class has" if colour else f"label {value}, which no class has"

    def read_greys(self, present: set[int]) -> "LabelTable | None":
        """With shades of grey that are colours, not numbers: those of the file of classes, or black and white.

        Args:
            present: all numbers in a set of masks.

        Returns:
            None where they are numbers.
        """
        numbers = self.numbers.copy()
        if self.by_colour is not None:
            greys = {value: self.by_colour.get((value, value, value)) for value in present}
            if not present or max(present) < len(self.by_colour) or None in greys.values():
                return None
            numbers[list(greys)] = [number for number in greys.values() if number is not None]
        elif present == {0, 255} and len(self.classes) == 2 and numbers[0] == 0 and numbers[255] >= MAX_CLASSES:
            numbers[255] = 1
        else:
            return None
        return replace(self, numbers=numbers)

    def rename(self, classes: Sequence[str]) -> "LabelTable":
        """With the numbers that another list of classes gives them.

        Raises:
            UserError: a class is not in it.
        """
        if self.classes == tuple(classes):
            return self
        if unknown := [name for name in self.classes if name not in classes]:
            unnamed = all(name.isdigit() for name in unknown)
            hint = "; --data.classes FILE names them" if unnamed else "; --data.ignore leaves labels out"
            raise UserError(
                f"{join_names(unknown)} among the classes of the masks, but not of the model, whose are "
                f"{join_names(classes)}{hint}"
            )
        new = [list(classes).index(name) for name in self.classes]
        numbers = self.numbers.copy()
        for old, number in enumerate(new):
            numbers[self.numbers == old] = number
        by_colour = self.by_colour and {c: n if n == IGNORED else new[n] for c, n in self.by_colour.items()}
        return replace(self, classes=tuple(classes), numbers=numbers, colours=None, by_colour=by_colour)


def pack(colours: np.ndarray) -> np.ndarray:
    """Colours [..., 3] as numbers of 24 bits."""
    red, green, blue = (colours[..., i].astype(np.int32) for i in range(3))
    return red << 16 | green << 8 | blue


def unpack(value: int) -> Colour:
    return value >> 16, value >> 8 & 255, value & 255


def read_mask(path: str, max_pixels: int = MAX_PIXELS, table: LabelTable | None = None) -> np.ndarray:
    """As :func:`read_lossy_mask`, the values alone."""
    return read_lossy_mask(path, max_pixels, table)[0]


def read_lossy_mask(path: str, max_pixels: int, table: LabelTable | None) -> tuple[np.ndarray, str]:
    """The numbers of a mask file, [H, W], or its colours, [H, W, 3], turned as an image would be.

    Args:
        table: a palette of its colours alone is for colours, whatever its numbers are; so are shades of 1, 2 or 4
            bits where all of its colours are shades.

    Returns:
        They, and the lossy compression that they have been through, see :func:`itpn.data.decode.find_lossy`.

    Raises:
        UnreadableImage: it is not there, damaged, too large, or transparent, or its palette is of two minds.
    """
    try:
        data = read_file(path)
    except (OSError, ValueError) as error:
        raise UnreadableImage(getattr(error, "strerror", None) or str(error)) from None
    with reading():
        opened = open_image(io.BytesIO(data), max_pixels)
        image, bits = load_image(opened), _count_bits(opened.image, data)
        lossy = find_lossy(opened.image, data)
        if image.mode in ("LA", "RGBA") and bits == 8 and image.getextrema()[-1] == (255, 255):
            image = image.convert(image.mode[:-1])  # of more bits Pillow has the high ones alone
        if image.mode not in ("1", "L", "P", "RGB") and not image.mode.startswith("I"):
            raise UnreadableImage(
                f"a picture of mode {image.mode}, not of labels{': save it without alpha' * ('A' in image.mode)}"
            )
        values, palette = _find_palette(image, bits)
        colours = table.by_colour if table is not None else None
        shades = all(red == green == blue for red, green, blue in colours or ())
        if table is not None and colours is not None and palette and (image.mode == "P" or shades):
            values = _use_palette(values, palette, table)
    if values.min(initial=0) < 0:
        raise UnreadableImage(f"label {values.min()}, which no class has")
    return values, lossy


def _count_bits(image: Image.Image, data: bytes) -> int:
    """Bits of a pixel that is stored, of formats that have fewer than 8 for shades of grey."""
    if image.format == "PNG":
        return data[24]
    tags: Any = getattr(image, "tag_v2", {})
    return int((tags.get(258) or (8,))[0])


def _find_palette(image: Image.Image, bits: int) -> tuple[np.ndarray, list[Colour]]:
    """The numbers that are stored, and the colours that they stand for; none of 8 bits or more without a palette."""
    if image.mode == "P":
        channels = iter(image.getpalette("RGB") or ())
        return np.asarray(image), list(zip(channels, channels, channels, strict=False))
    if image.mode == "1":
        image, bits = image.convert("L"), 1
    if image.mode == "L" and bits in (1, 2, 4):
        step = 255 // (2**bits - 1)  # by which Pillow multiplies
        return np.asarray(image) // step, [(shade, shade, shade) for shade in range(0, 256, step)]
    return np.asarray(image), []


def _use_palette(values: np.ndarray, palette: Sequence[Colour], table: LabelTable) -> np.ndarray:
    """The colours of a mask where the file of classes has them all, or else its numbers.

    Labels of no class count only where their colour is a class's and no other label's, for many palettes are filled up
    with black; what is left of them becomes `VOID`.

    Raises:
        UnreadableImage: colours and numbers mean different classes, and not all of the colours are known.
    """
    known, colours = table.by_colour or {}, dict(enumerate(palette))
    used = np.bincount(values.ravel()).nonzero()[0].tolist()
    classes = {n: known[colours[n]] for n in used if colours.get(n) in known}
    void = {n for n in used if n in table.left_out and (n not in classes or palette.index(colours[n]) < n)}
    unnamed = [n for n in used if n not in classes and n not in void]
    if not unnamed:
        painted = np.zeros((256, 3), dtype=np.int16 if void else np.uint8)
        for n in used:
            painted[n] = (256, 0, n) if n in void else colours[n]
        return painted[values]
    if any(number != table.numbers[n] for n, number in classes.items() if n not in void):
        n = unnamed[0]
        what = f"colour {colours[n]} of label {n}, which no class has" if n in colours else f"no colour for label {n}"
        raise UnreadableImage(what)
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


# --- shades of grey that are no class indices


def name_labels(
    classes: Sequence[str], colours: Sequence[Colour] | None, reduce_zero_label: bool, ignore: Iterable[int]
) -> Names:
    """The names that :func:`make_table` makes these classes of; of labels that are left out, their numbers."""
    known: Sequence[Colour | None] = colours or [None] * len(classes)
    rest, left_out = list(zip(classes, known, strict=True)), set(ignore)
    names: list[tuple[str, Colour | None]] = []
    for label in range(int(reduce_zero_label), IGNORED + len(classes)):
        if not rest:
            break
        names.append((str(label), None) if label in left_out else rest.pop(0))
    return names


def make_table(names: Names, reduce_zero_label: bool, ignore: Iterable[int]) -> LabelTable:
    """What masks mean whose labels are lines of a file, from 0, or from 1 where label 0 is of no class.

    Raises:
        UserError: fewer than two classes, or more than 254.
    """
    first = int(reduce_zero_label)
    left_out = {*ignore, *range(first)}
    kept = [(first + line, name, colour) for line, (name, colour) in enumerate(names) if first + line not in left_out]
    if not 2 <= len(kept) <= MAX_CLASSES:
        raise UserError(f"{len(kept)} classes of pixels: there must be from 2 to {MAX_CLASSES}")
    numbers = np.full(256, MAX_CLASSES, dtype=np.uint8)
    numbers[[number for number in left_out if number < 256]] = IGNORED
    for row, (number, _, _) in enumerate(kept):
        if number < 256:
            numbers[number] = row
    by_colour = None
    if any(colour is not None for _, colour in names):
        row_of = {number: row for row, (number, _, _) in enumerate(kept)}
        by_colour = {c: row_of.get(first + line, IGNORED) for line, (_, c) in enumerate(names) if c is not None}
    colours = tuple(colour for _, _, colour in kept if colour is not None) or None
    return LabelTable(tuple(name for _, name, _ in kept), numbers, colours, by_colour, tuple(left_out))
