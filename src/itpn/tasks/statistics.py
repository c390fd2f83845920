"""Statistics of a folder's images for people to read: `itpn stats`, and how far they have been read."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.progress import Progress
from rich.table import Table

from itpn.data.files import ImageSource
from itpn.data.statistics import Statistics, compute_statistics
from itpn.data.statistics_file import as_reader, sign_images, write_statistics
from itpn.data.stored import ReadSettings
from itpn.system.console import Output, print_note
from itpn.system.environment import is_main_process
from itpn.system.text import one_line
from itpn.system.writing import check_writable, writing_to

SHOWN = ("1", "50", "99")  # percentiles in the table
CHANNELS = 64  # rows of the table
PATIENCE = 10.0  # seconds after which a log is told what is being done


@contextmanager
def reading_progress() -> Iterator[Callable[[int, int], None]]:
    """Show how many of how many images have been read: by a bar in a terminal, else by a line if it takes long."""
    console = Output(stderr=True, quiet=not is_main_process())
    start = time.monotonic()
    said = console.is_terminal
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading statistics", total=None)

        def show(read: int, total: int) -> None:
            nonlocal said
            bar.update(task, completed=read, total=total)
            if not said and time.monotonic() - start > PATIENCE:
                said = True
                print_note(f"reading mean, std and value range of the images: {read:,} of {total:,} so far", console)

        yield show


def report_statistics(
    source: ImageSource, root: str, reading: ReadSettings, value_range: Sequence[str], sample: int | None, out: Path
) -> None:
    """Compute, print and write the statistics of images.

    Args:
        root: that they were found in.

    Raises:
        UserError: no image can be read, or images differ in channels or depth.
        MachineError: the file cannot be written.
    """
    check_writable(out)
    for note in source.notes:
        print_note(note)
    with reading_progress() as progress:
        found = compute_statistics(as_reader(source), reading, value_range, sample, progress, in_parts=True)
    found = replace(found, fingerprint=sign_images(source, root))
    for note in (*found.warnings, *found.notes):
        print_note(note)
    print_statistics(found)
    with writing_to(out):
        write_statistics(out, found)
    Output().print(one_line(str(out)), markup=False, highlight=False, soft_wrap=True)


def print_statistics(found: Statistics) -> None:
    """A table of channels, and what they have in common above it."""
    (low, wide), (high, wider) = found.smallest, found.largest
    sizes = f"{wide}x{low}" if found.smallest == found.largest else f"{wide}x{low} to {wider}x{high}"
    console = Output()
    lines = [
        f"{found.sampled:,} of {found.images:,} images, {sizes} px, {found.type}",
        f"without data: {found.nodata_fraction:.2%} of the pixels"
        + ("" if found.nodata is None else f" (value {found.nodata:g})"),
    ]
    console.print(*lines, sep="\n", markup=False, highlight=False)
    table = Table("channel", "min", *(f"{percent} %" for percent in SHOWN), "max", "mean", "std", "0 at", "1 at")
    for channel in range(min(found.channels, CHANNELS)):
        row = [found.minimum, *(found.percentiles[percent] for percent in SHOWN), found.maximum, found.mean, found.std]
        numbers = [*(values[channel] for values in row), *found.value_range[channel]]
        table.add_row(str(channel), *(f"{value:.5g}" for value in numbers))
    console.print(table)
    if found.channels > CHANNELS:
        print_note(f"{found.channels - CHANNELS} more channels are in the file")
    for name, values in {"mean": found.scaled_mean, "std": found.scaled_std}.items():
        shown = " ".join(f"{value:.4g}" for value in values)
        console.print(f"--data.{name} {shown}", markup=False, highlight=False, soft_wrap=True)
