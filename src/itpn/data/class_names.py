"""Names of classes, from text files."""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from itpn.data.file_types import CLASS_FILES, CLASSES, COPIES_INDEX
from itpn.data.splits import join
from itpn.errors import UserError
from itpn.system.text import as_class, one_line, read_lines

Colour = tuple[int, int, int]
Names = Sequence[tuple[str, Colour | None]]  # of labels in turn, and their colours
# lines of files of classes: 0 cat; 0: cat; 0,cat; 0 - cat; and cat 0; cat,0
NUMBER_BEFORE = re.compile(r"(?P<number>[0-9]{1,6})(?:\s*[.,:;)=-]+\s*|\s+)(?P<name>\S.*)")
NUMBER_BEHIND = re.compile(r"(?P<name>.*[^\s,;:=])(?:\s*[,;:=]\s*|\s+)(?P<number>[0-9]{1,6})")
NAME_WORDS = {"name", "names", "class", "classes", "label", "labels", "category", "categories"}
HEADER_WORDS = {
    *NAME_WORDS,
    *("id", "ids", "index", "idx", "r", "g", "b", "red", "green", "blue", "color", "colour"),
}


def are_numbers(labels: Iterable[str]) -> bool:
    """Whether labels are class indices, not names."""
    return all(label.removeprefix("-").isdecimal() for label in labels)


def read_class_names(folders: Sequence[str], labels: Iterable[str]) -> list[str] | None:
    """Class names from a file beside the shards or beside their folder; None if there is no such file.

    Args:
        labels: of the images. If they are class indices, indices are removed from the lines of the file.

    Raises:
        UserError: an empty line, or a duplicate name.
    """
    for folder in folders:
        for place in (Path(folder), Path(folder).parent):
            if (place / CLASSES).is_file():
                # `itpn shrink` writes names of folders unchanged, with blanks and numbers
                by_hand = not (place / COPIES_INDEX).is_file()
                names = [as_class(name) for name in read_lines(place / CLASSES, strip=by_hand)]
                refuse_empty_line(names, place / CLASSES)
                if by_hand and are_numbers(labels):
                    names = drop_numbers(names, 0, place / CLASSES)
                if twice := sorted(name for name, count in Counter(names).items() if count > 1):
                    raise UserError(f"{place / CLASSES} names {twice[0]!r} twice: classes need names of their own")
                return names
    return None


def drop_numbers(lines: Sequence[str], first: int, file: str | Path, hint: str = "") -> list[str]:
    """Remove a header, and the labels with which lines begin or end, from the lines of a file of classes.

    Args:
        first: the label of the first class.
        hint: another remedy, if the file counts from another number.

    Raises:
        UserError: a line is a comment, or lines are numbered, but not by their labels.
    """
    comments = [line for line in lines if line.startswith("#")]
    if 0 < len(comments) < len(lines):
        raise UserError(
            f"file of classes {file} has a comment ({one_line(comments[0][:40])}), which is no class: remove it"
        )
    words = set(re.split(r"[\s,;:_-]+", lines[0].lower())) if lines else set()
    if max(len(lines), len(words)) > 1 and words <= HEADER_WORDS and words & NAME_WORDS:
        lines = lines[1:]
    for pattern in (NUMBER_BEFORE, NUMBER_BEHIND):
        found = [pattern.fullmatch(line) for line in lines]
        matches = [match for match in found if match is not None]
        if len(matches) < max(2, len(found)) or any(_is_coloured(match["name"], pattern) for match in matches):
            continue
        numbers, names = [int(match["number"]) for match in matches], [match["name"] for match in matches]
        if len(set(names)) < len(names) or sorted(numbers) not in ([*range(len(names))], [*range(1, len(names) + 1)]):
            continue
        if numbers != [*range(first, first + len(names))]:
            sort = "" if numbers == sorted(numbers) else ", or sort the lines by label"
            raise UserError(
                f"file of classes {file} numbers its first class {numbers[0]}, which is label {first}: leave the "
                f"numbers out{sort or hint}"
            )
        return names
    return [*lines]


def _is_coloured(rest: str, pattern: re.Pattern[str]) -> bool:
    """Whether the number beside ``rest`` belongs to a colour (1 2 3 road, or road 1 2 3), or there is no name."""
    words = re.split(r"[\s,]+", rest)
    if all(word.isdecimal() for word in words):
        return True
    if pattern is NUMBER_BEHIND:
        return words[-1].isdecimal()
    return [word.isdecimal() for word in words[:3]] == [True, True, False]


def refuse_empty_line(names: Sequence[str], file: str | Path) -> None:
    """Raise :class:`UserError` if a line of a file of classes is empty: later lines would get other labels."""
    if "" in names:
        raise UserError(
            f"{file} has nothing in line {names.index('') + 1}: each line names a class, the first that of label 0"
        )


def join_names(names: Sequence[str], most: int = 3) -> str:
    """The first few names, in quotes."""
    return join([f"'{name}'" for name in names], most)


def read_names(file: str | None, root: str, first: int = 0) -> Names | None:
    """Read the names of classes, and their colours if the file has them.

    Args:
        first: the label of the first line.

    Raises:
        UserError: no such file, an invalid line, or lines numbered other than by their labels.
    """
    if file is None:
        places = [place / name for place in (Path(root), Path(root).parent) for name in CLASS_FILES]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            return None
        file = str(found)
    if not Path(file).exists():
        raise UserError(f"file of classes {file} does not exist")
    written = read_lines(file)
    lines = [line for line in written if line]
    if not lines:
        raise UserError(f"file of classes {file} is empty: it needs a name, or `NAME R G B`, a line")
    if lines[0].startswith("Idx\t"):  # ADE20K's: number, three fractions, stuff or not, name
        return [(line.split("\t")[-1].split(",")[0].strip(), None) for line in lines[1:]]
    names: list[tuple[str, Colour | None]] = []
    switch = "no-reduce-zero-label" if first else "reduce-zero-label"
    hint = f", or give --data.{switch} if they are labels"
    for row in _split_lines(drop_numbers(lines, first, file, hint), file):
        words = [word.strip() for word in row]
        for name, colour in ((words[:-3], words[-3:]), (words[3:], words[:3])):
            if (
                name
                and len(colour) == 3
                and all(re.fullmatch("[0-9]{1,3}", word) and int(word) < 256 for word in colour)
            ):
                red, green, blue = (int(word) for word in colour)
                names.append((" ".join(name), (red, green, blue)))
                break
        else:
            names.append((" ".join(words), None))
    given: dict[str, list[Any]] = {"name": [n for n, _ in names], "colour": [c for _, c in names if c is not None]}
    for what, values in given.items():
        twice = [value for value in dict.fromkeys(values) if values.count(value) > 1]
        if twice:
            raise UserError(f"{file} has two classes of the {what} {twice[0]}")
    if len({colour is None for _, colour in names}) > 1:
        raise UserError(f"{file} has colours for some of the classes: give all or none")
    # ambiguous: a label without a name, or a blank line
    if "" in written and any(colour is None for _, colour in names):
        refuse_empty_line(written, file)
    return names


def _split_lines(lines: list[str], file: str) -> list[list[str]]:
    if not any("," in line for line in lines):
        return [line.split() for line in lines]
    try:
        return [next(csv.reader([line])) for line in lines]  # one by one: an unclosed quote ends with its line
    except csv.Error as error:
        raise UserError(f"file of classes {file} cannot be read: {error}") from None
