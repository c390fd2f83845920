"""Masks: reading them, and the classes that their labels or colours stand for."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from itpn.data.class_names import Colour, Names, join_names
from itpn.data.decode import MAX_PIXELS, UnreadableImage
from itpn.data.formats.image_file import Window
from itpn.data.mask_files import DecodedMask, MaskFile
from itpn.errors import UserError

IGNORED = 255  # class index of ignored pixels in memory
MAX_CLASSES = 254
VOID = 1 << 24  # above all packed colours: VOID + label stands for an ignored label of a palette


@dataclass(frozen=True)
class LabelTable:
    """The classes that labels, or colours, in mask files stand for.

    Attributes:
        classes: names.
        indices: uint8 [256], label in a file -> class index, `IGNORED`, or 254 for an unknown label.
        colours: of the classes, if the file of classes has them.
        by_colour: colour -> class index or `IGNORED`; None if masks cannot be in colour.
        ignored: labels that are ignored.
    """

    classes: tuple[str, ...]
    indices: np.ndarray
    colours: tuple[Colour, ...] | None = None
    by_colour: dict[Colour, int] | None = None
    ignored: tuple[int, ...] = ()

    def read(self, path: str, max_pixels: int = MAX_PIXELS) -> Tensor:
        """Read a mask as class indices, uint8 [H, W].

        Raises:
            UnreadableImage: it is not a mask, or has unknown labels.
        """
        return self.name_values(read_mask(path, max_pixels, self))

    def read_window(self, file: MaskFile, window: Window) -> Tensor:
        """As :meth:`read`, of a window in a mask."""
        return self.name_values(read_values(file, self, window))

    def name_values(self, values: np.ndarray) -> Tensor:
        """The class indices of values, see :func:`read_values`."""
        if values.ndim == 3 and self.by_colour is not None:
            colours, indices = self._sorted_colours
            packed = pack(values)
            places = np.searchsorted(colours, packed).clip(max=len(colours) - 1)
            labels, known = indices[places], colours[places] == packed
        else:
            values = packed = ungrey(values)
            labels = self.indices[values.clip(max=255)]
            known = labels != MAX_CLASSES
            if values.max(initial=0) > 255:
                above = values > 255
                labels[above] = IGNORED
                known = np.where(above, np.isin(values, self.ignored), known)
        if not known.all():
            raise UnreadableImage(self.explain(int(packed[~known][0]), colour=values.ndim == 3))
        return torch.from_numpy(labels)

    @functools.cached_property
    def _sorted_colours(self) -> tuple[np.ndarray, np.ndarray]:
        """Packed colours in ascending order, and their class indices."""
        void = {(256, 0, label): IGNORED for label in range(256)}
        known = {**(self.by_colour or {}), **void}
        packed, indices = pack(np.array(list(known))), np.array(list(known.values()), dtype=np.uint8)
        order = packed.argsort()
        return packed[order], indices[order]

    def find(self, value: int, colour: bool) -> int | None:
        """The class index of a label, or of a packed colour (see `pack`), or `IGNORED`; None if it is unknown."""
        if colour:
            return IGNORED if value >= VOID else (self.by_colour or {}).get(unpack(value))
        if value > 255:
            return IGNORED if value in self.ignored else None
        return None if self.indices[value] == MAX_CLASSES else int(self.indices[value])

    def explain(self, value: int, colour: bool) -> str:
        return f"colour {unpack(value)}, which no class has" if colour else f"label {value}, which no class has"

    def read_greys(self, present: set[int]) -> "LabelTable | None":
        """The table for masks of grey levels that are colours: those of the file of classes, or black and white.

        Args:
            present: all values in a set of masks.

        Returns:
            None if the values are labels.
        """
        indices = self.indices.copy()
        if self.by_colour is not None:
            greys = {value: self.by_colour.get((value, value, value)) for value in present}
            if not present or max(present) < len(self.by_colour) or None in greys.values():
                return None
            indices[list(greys)] = [index for index in greys.values() if index is not None]
        elif present == {0, 255} and len(self.classes) == 2 and indices[0] == 0 and indices[255] >= MAX_CLASSES:
            indices[255] = 1
        else:
            return None
        return replace(self, indices=indices)

    def rename(self, classes: Sequence[str]) -> "LabelTable":
        """The table with the class indices of another list of classes.

        Raises:
            UserError: a class is not in the list.
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
        indices = self.indices.copy()
        for old, index in enumerate(new):
            indices[self.indices == old] = index
        by_colour = self.by_colour and {c: n if n == IGNORED else new[n] for c, n in self.by_colour.items()}
        return replace(self, classes=tuple(classes), indices=indices, colours=None, by_colour=by_colour)


def pack(colours: np.ndarray) -> np.ndarray:
    """Colours [..., 3] as integers of 24 bits."""
    red, green, blue = (colours[..., i].astype(np.int32) for i in range(3))
    return red << 16 | green << 8 | blue


def unpack(value: int) -> Colour:
    return value >> 16, value >> 8 & 255, value & 255


def read_mask(path: str, max_pixels: int = MAX_PIXELS, table: LabelTable | None = None) -> np.ndarray:
    """The values of a mask file, see :func:`read_values`."""
    return read_values(DecodedMask(path, max_pixels), table)


def read_values(file: MaskFile, table: LabelTable | None, window: Window | None = None) -> np.ndarray:
    """The values of a mask, or of a window in it: labels [H, W] or colours [H, W, 3].

    Args:
        table: if the palette of a mask has only colours of this table, the mask is read as colours, whatever its
            indices are; so are masks of 1, 2 or 4 bits if all colours of the table are grey.

    Raises:
        UnreadableImage: its palette and labels disagree, or a label is below 0.
    """
    values = file.read(window)
    if values.min(initial=0) < 0:
        raise UnreadableImage(f"label {values.min()}, which no class has")
    colours = table.by_colour if table is not None else None
    shades = all(red == green == blue for red, green, blue in colours or ())
    if table is None or colours is None or not file.palette or not (file.indexed or shades):
        return values
    paint = _use_palette(file.used, file.palette, table)
    return values if paint is None else paint[values]


def _use_palette(used: Sequence[int], palette: Sequence[Colour], table: LabelTable) -> np.ndarray | None:
    """The colours of a mask's labels, [256, 3], if the table has all of them; None if they are labels.

    An ignored label is read by its colour only if the colour is that of a class and of no lower label, because many
    palettes are filled up with black. Other ignored labels become `VOID` + label.

    Raises:
        UnreadableImage: colours and labels stand for different classes, and some colours are unknown.
    """
    known, colours = table.by_colour or {}, dict(enumerate(palette))
    classes = {n: known[colours[n]] for n in used if colours.get(n) in known}
    void = {n for n in used if n in table.ignored and (n not in classes or palette.index(colours[n]) < n)}
    unnamed = [n for n in used if n not in classes and n not in void]
    if not unnamed:
        painted = np.zeros((256, 3), dtype=np.int16 if void else np.uint8)
        for n in used:
            painted[n] = (256, 0, n) if n in void else colours[n]
        return painted
    if any(index != table.indices[n] for n, index in classes.items() if n not in void):
        n = unnamed[0]
        what = f"colour {colours[n]} of label {n}, which no class has" if n in colours else f"no colour for label {n}"
        raise UnreadableImage(what)
    return None


def ungrey(values: np.ndarray) -> np.ndarray:
    """Labels of a mask that was saved with three equal channels.

    Raises:
        UnreadableImage: the channels differ.
    """
    if values.ndim == 2:
        return values
    if (values != values[..., :1]).any():
        raise UnreadableImage("an image in colours: --data.classes needs a file of `NAME R G B` lines")
    return values[..., 0]


def name_labels(
    classes: Sequence[str], colours: Sequence[Colour] | None, reduce_zero_label: bool, ignore: Iterable[int]
) -> Names:
    """The names from which :func:`make_table` makes these classes; an ignored label is its own name."""
    known: Sequence[Colour | None] = colours or [None] * len(classes)
    rest, ignored = list(zip(classes, known, strict=True)), set(ignore)
    names: list[tuple[str, Colour | None]] = []
    for label in range(int(reduce_zero_label), IGNORED + len(classes)):
        if not rest:
            break
        names.append((str(label), None) if label in ignored else rest.pop(0))
    return names


def make_table(names: Names, reduce_zero_label: bool, ignore: Iterable[int]) -> LabelTable:
    """The table of labels that are lines of a file, from 0, or from 1 if label 0 is ignored.

    Raises:
        UserError: fewer than two classes, or more than 254.
    """
    first = int(reduce_zero_label)
    ignored = {*ignore, *range(first)}
    kept = [(first + line, name, colour) for line, (name, colour) in enumerate(names) if first + line not in ignored]
    if not 2 <= len(kept) <= MAX_CLASSES:
        raise UserError(f"{len(kept)} classes of pixels: there must be from 2 to {MAX_CLASSES}")
    indices = np.full(256, MAX_CLASSES, dtype=np.uint8)
    indices[[label for label in ignored if label < 256]] = IGNORED
    for index, (label, _, _) in enumerate(kept):
        if label < 256:
            indices[label] = index
    by_colour = None
    if any(colour is not None for _, colour in names):
        index_of = {label: index for index, (label, _, _) in enumerate(kept)}
        by_colour = {c: index_of.get(first + line, IGNORED) for line, (_, c) in enumerate(names) if c is not None}
    colours = tuple(colour for _, _, colour in kept if colour is not None) or None
    return LabelTable(tuple(name for _, name, _ in kept), indices, colours, by_colour, tuple(ignored))
