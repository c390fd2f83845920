"""The rows of a run's ``metrics.csv``, the oldest first; a kill or a full disk may have cut off the last."""

import contextlib
import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from itpn.system.writing import write_whole

Rows = list[list[str]]


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row, with a header where the file is new; a file without some of its columns gets them."""
    header = _read_header(path)
    if not set(row) <= set(header):
        names, rows = _read(path)
        names += [name for name in row if name not in names]
        rows = [[*cells, *[""] * (len(names) - len(cells))] for cells in rows]
        _write(path, names, [*rows, [row.get(name, "") for name in names]])
        return
    size = path.stat().st_size
    try:
        with path.open("ab") as file:
            file.write(_format([[row.get(name, "") for name in header]]))
    except OSError:
        with contextlib.suppress(OSError):  # no part of a row
            os.truncate(path, size)
        raise


def keep_rows(path: Path, wanted: Callable[[int], bool]) -> None:
    """Forget the rows of other steps, and what was cut off."""
    if not path.exists():
        return
    header, rows = _read(path)
    place = header.index("step") if "step" in header else -1
    _write(path, header, [cells for cells in rows if wanted(int(cells[place]))])


def complete_row(path: Path, row: dict[str, Any]) -> None:
    """Add values to the row of a step, or the row."""
    header, rows = _read(path)
    earlier = [
        dict(zip(header, cells, strict=True)) for cells in rows if cells[header.index("step")] == str(row["step"])
    ]
    keep_rows(path, lambda step: step != row["step"])
    append_row(path, {**(earlier[-1] if earlier else {}), **row})


def read_steps(path: Path) -> list[int]:
    """The step of each row; none where there is no such file, or it cannot be read."""
    try:
        header, rows = _read(path)
    except OSError:
        return []
    return [int(cells[header.index("step")]) for cells in rows]


def _read_header(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open("rb") as file, contextlib.suppress(csv.Error):
        return next(csv.reader([file.readline().decode(errors="replace")]), [])
    return []


def _read(path: Path) -> tuple[list[str], Rows]:
    """The header and the whole rows; nothing of a file that is not of a run."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1].decode(errors="replace")
    try:
        lines = list(csv.reader(line for line in whole.splitlines() if "\0" not in line))  # zeros: a power failure
    except csv.Error:  # a field without end
        lines = []
    header = lines[0] if lines else []
    if "step" not in header:
        return [], []
    place = header.index("step")
    return header, [cells for cells in lines[1:] if len(cells) == len(header) and cells[place].isdecimal()]


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    write_whole(path, _format([header, *rows]) if header else b"")


def _format(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()
