"""Statistics of a folder's images for people to read: `itpn stats`."""

from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress
from rich.table import Table

from itpn.data.files import ImageSource
from itpn.data.statistics import Statistics, compute_statistics, write_statistics
from itpn.data.stored import Reading
from itpn.system.console import Output, print_note
from itpn.system.text import one_line
from itpn.system.writing import check_writable, writing_to
from itpn.tasks.pixels import as_reader

SHOWN = ("1", "50", "99")  # percentiles in the table
CHANNELS = 64  # rows of the table


def report_statistics(
    source: ImageSource, reading: Reading, value_range: Sequence[str], sample: int | None, out: Path
) -> None:
    """Compute, print and write the statistics of images.

    Raises:
        UserError: no image can be read, or images differ in channels or depth.
        MachineError: the file cannot be written.
    """
    check_writable(out)
    for note in source.notes:
        print_note(note)
    reader = as_reader(source)
    total = len(reader) if sample is None else min(sample, len(reader))
    console = Output(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=total)
        found = compute_statistics(
            reader, reading, value_range, sample, lambda read: progress.update(task, completed=read)
        )
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
