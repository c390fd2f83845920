"""The summary of a profile: tables, and what could be done."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from itpn.training.summary import make_table

NOT_HERE = "n/a: the trace has no GPU"


def advise(figures: dict[str, Any]) -> list[str]:
    """What could be done about it, from few figures that speak clearly; a sentence each."""
    gpu = figures["gpu_ms"]
    step, workers, cores = figures["step_ms"], figures["num_workers"], figures["cores"]
    idle = 0.0 if gpu is None else gpu["idle"] / step
    # while a GPU still has work, waiting for data costs nothing
    waiting = figures["host_ms"]["data wait"] / step if gpu is None else idle * figures["gpu_idle_during"]["data wait"]
    advice = []
    if waiting > 0.05:
        what = f"{waiting:.0%} of a step is waiting for data: "
        if workers == 0:
            advice.append(f"{what}--data.num-workers {min(8, cores)} reads images beside the training")
        elif workers < cores:
            advice.append(f"{what}more --data.num-workers than {workers} ({cores} cores for each process)")
        else:
            advice.append(f"{what}no core is left to read with; `itpn shrink` makes large images quick to read")
    if gpu is None:
        if 2 * figures["threads"] <= cores and figures["threads"] + workers < cores:
            advice.append(f"torch computes with {figures['threads']} of {cores} cores: set OMP_NUM_THREADS={cores}")
        return advice or ["nothing stands out: the time goes into the network's own work"]
    room = f" ({figures['peak_memory_gb']:.0f} of {figures['gpu_memory_gb']:.0f} GB are used)"
    larger = f"a larger --data.batch-size{room}"
    means = larger if figures["compiled"] else f"--trainer.compile, or {larger}"
    if idle - waiting > 0.15:
        elsewhere = {part: share for part, share in figures["gpu_idle_during"].items() if part != "data wait"}
        most = max(elsewhere, key=lambda part: elsewhere[part])
        advice.append(
            f"the GPU is idle for {idle - waiting:.0%} of a step while the host is slower than it, mostly in {most}: "
            + means
        )
    groups = figures["groups"]
    if groups.get("communication", 0.0) > 0.2:
        advice.append(
            f"{groups['communication']:.0%} of the GPU's time goes into the other processes: a larger "
            "--data.batch-size, or --trainer.accumulate-grad-batches"
        )
    if figures["precision"].startswith("32"):
        advice.append("products are in 32 bits: --trainer.precision bf16-mixed halves their work")
    useful = groups.get("products", 0.0) + groups.get("attention", 0.0)
    if useful < 0.5 and idle < 0.5:
        advice.append(f"products and attention are only {useful:.0%} of the GPU's time: {means}")
    return advice or ["nothing stands out: the time goes into the network's own work"]


def draw_summary(figures: dict[str, Any], advice: Sequence[str], folder: Path) -> Group:
    """The summary as tables."""
    step, gpu, syncs = figures["step_ms"], figures["gpu_ms"], figures["host_syncs"]
    slower = figures["recorded_step_ms"] / step - 1
    processes = f" on {figures['processes']} processes" if figures["processes"] > 1 else ""
    rows = {
        "speed": f"{figures['images_per_second']:,.1f} images/s, {step:,.1f} ms a step of {figures['batch']} images"
        f"{processes} (mean of {figures['steps']} without the profiler; recording: {slower:+.0%})",
        "device": f"{figures['device']}, {figures['precision']}, {'' if figures['compiled'] else 'not '}compiled",
        **({"idle": tell_idle(figures), "host waits": tell_syncs(syncs)} if gpu else {"idle, host waits": NOT_HERE}),
        "peak memory": f"{figures['peak_memory_gb']:.2f} GB"
        + (f" of {figures['gpu_memory_gb']:.0f}" if figures["gpu_memory_gb"] else ""),
    }
    side_by_side = Table.grid(padding=(0, 4))
    side_by_side.add_row(draw_parts(figures), draw_groups(figures))
    longest = _table("kernel" if gpu else "operator", "ms a step", _whole(figures), "calls a step")
    longest.expand, longest.columns[0].ratio, longest.columns[0].no_wrap = True, 1, True  # names give way to figures
    for row in figures["longest"]:
        longest.add_row(Text(shorten(row["name"])), f"{row['ms']:,.2f}", f"{row['share']:.1%}", f"{row['calls']:,.4g}")
    lines = Table.grid(padding=(0, 1))
    for line in advice:
        lines.add_row("->", Text(line, style="bold"))
    return Group(
        make_table(f"profile of {figures['recipe']} / {figures['name']}", rows),
        Padding(side_by_side, (1, 0)),
        longest,
        Padding(lines, (1, 0)),
        Text(f"in {folder}: trace.json.gz, summary.txt, summary.json"),
        Text("the trace opens at https://ui.perfetto.dev or chrome://tracing"),
    )


def tell_idle(figures: dict[str, Any]) -> str:
    share = figures["gpu_ms"]["idle"] / figures["step_ms"]
    during = sorted(figures["gpu_idle_during"].items(), key=lambda item: -item[1])
    most = ", ".join(f"{share * part_share:.0%} in {part}" for part, part_share in during if share * part_share > 0.005)
    return f"the GPU was idle for {share:.0%} of a step" + (f", by what the host did: {most}" if most else "")


def tell_syncs(syncs: dict[str, float]) -> str:
    """How often the host stops until the GPU has caught up."""
    found = ", ".join(f"{count:.3g} in {part}" for part, count in sorted(syncs.items(), key=lambda item: -item[1]))
    return f"{sum(syncs.values()):.3g} a step for the GPU to catch up" + (f": {found}" if found else "")


def draw_parts(figures: dict[str, Any]) -> Table:
    step, host, gpu = figures["step_ms"], figures["host_ms"], figures["gpu_ms"]
    table = _table("part of a step", "ms", "%", *(["GPU ms", "%"] if gpu else []))
    for part in [*host, *(["idle"] if gpu else [])]:
        columns = [f"{times[part]:,.1f}" if part in times else "" for times in (host, gpu or {})]
        shares = [f"{times[part] / step:.1%}" if part in times else "" for times in (host, gpu or {})]
        cells = [columns[0], shares[0], columns[1], shares[1]]
        table.add_row(part, *cells[: 4 if gpu else 2])
    return table


def draw_groups(figures: dict[str, Any]) -> Table:
    table = _table("kind of work", _whole(figures))
    for group, share in figures["groups"].items():
        table.add_row(group, f"{share:.1%}")
    return table


def shorten(name: str) -> str:
    """A kernel's name without what all of them have."""
    return re.sub(r"^void |at::native::|\(anonymous namespace\)::", "", name)


def _whole(figures: dict[str, Any]) -> str:
    return "of GPU's work" if figures["gpu_ms"] else "of a step"


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=None, pad_edge=False, header_style="bold")
    for title in others:
        table.add_column(title, justify="right", no_wrap=True, min_width=len(title))
    return table
