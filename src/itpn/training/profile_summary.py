"""The summary of a profile: tables, and what could be done."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from itpn.system.console import make_table, unfolded

NOT_HERE = "n/a: the trace has no GPU"


def advise(metrics: dict[str, Any]) -> list[str]:
    """What could be done about it, from few metrics that speak clearly; a sentence each."""
    gpu = metrics["gpu_ms"]
    step, workers, cores = metrics["step_ms"], metrics["num_workers"], metrics["cores"]
    idle = 0.0 if gpu is None else gpu["idle"] / step
    # while a GPU still has work, waiting for data costs nothing
    waiting = metrics["host_ms"]["data wait"] / step if gpu is None else idle * metrics["gpu_idle_during"]["data wait"]
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
        if 2 * metrics["threads"] <= cores and metrics["threads"] + workers < cores:
            advice.append(f"torch computes with {metrics['threads']} of {cores} cores: set OMP_NUM_THREADS={cores}")
        return advice or ["nothing stands out: the time goes into the network's own work"]
    room = f" ({metrics['peak_memory_gb']:.0f} of {metrics['gpu_memory_gb']:.0f} GB are used)"
    larger = f"a larger --data.batch-size{room}"
    means = larger if metrics["compiled"] else f"--trainer.compile, or {larger}"
    if idle - waiting > 0.15:
        elsewhere = {part: fraction for part, fraction in metrics["gpu_idle_during"].items() if part != "data wait"}
        most = max(elsewhere, key=lambda part: elsewhere[part])
        advice.append(
            f"the GPU is idle for {idle - waiting:.0%} of a step while the host is slower than it, mostly in {most}: "
            + means
        )
    groups = metrics["groups"]
    if groups.get("communication", 0.0) > 0.2:
        advice.append(
            f"{groups['communication']:.0%} of the GPU's time goes into the other processes: a larger "
            "--data.batch-size, or --trainer.accumulate-grad-batches"
        )
    if metrics["precision"].startswith("32"):
        advice.append("products are in 32 bits: --trainer.precision bf16-mixed halves their work")
    useful = groups.get("products", 0.0) + groups.get("attention", 0.0)
    if useful < 0.5 and idle < 0.5:
        advice.append(f"products and attention are only {useful:.0%} of the GPU's time: {means}")
    return advice or ["nothing stands out: the time goes into the network's own work"]


def draw_summary(metrics: dict[str, Any], advice: Sequence[str], folder: Path) -> Group:
    """The summary as tables."""
    step, gpu, syncs = metrics["step_ms"], metrics["gpu_ms"], metrics["host_syncs"]
    more = metrics["recorded_step_ms"] / step - 1
    recorded = f"recorded steps took {abs(more):.0%} {'less' if more < 0 else 'more'} time"
    processes = f" on {metrics['processes']} processes" if metrics["processes"] > 1 else ""
    rows = {
        "speed": f"{metrics['images_per_second']:,.1f} images/s, {step:,.1f} ms a step of {metrics['batch']} images"
        f"{processes} (mean of {metrics['steps']} without the profiler; {recorded})",
        "device": f"{metrics['device']}, {metrics['precision']}, {'' if metrics['compiled'] else 'not '}compiled",
        **(
            {"idle": describe_idle(metrics), "host waits": describe_syncs(syncs)}
            if gpu
            else {"idle, host waits": NOT_HERE}
        ),
        "peak memory": f"{metrics['peak_memory_gb']:.2f} GB"
        + (f" of {metrics['gpu_memory_gb']:.0f}" if metrics["gpu_memory_gb"] else ""),
    }
    side_by_side = Table.grid(padding=(0, 4))
    side_by_side.add_row(draw_parts(metrics), draw_groups(metrics))
    longest = _table("kernel" if gpu else "operator", "ms a step", _whole(metrics), "calls a step")
    longest.expand, longest.columns[0].ratio, longest.columns[0].no_wrap = True, 1, True  # names give way to numbers
    for row in metrics["longest"]:
        numbers = f"{row['ms']:,.2f}", f"{row['fraction']:.1%}", f"{row['calls']:,.4g}"
        longest.add_row(Text(shorten(row["name"])), *numbers)
    lines = Table.grid(padding=(0, 1))
    for line in advice:
        lines.add_row("->", Text(line, style="bold"))
    return Group(
        make_table(f"profile of {metrics['recipe']} / {metrics['name']}", rows),
        Padding(side_by_side, (1, 0)),
        longest,
        Padding(lines, (1, 0)),
        unfolded(f"in {folder}: trace.json.gz, summary.txt, summary.json"),
        Text("the trace opens at https://ui.perfetto.dev or chrome://tracing"),
    )


def describe_idle(metrics: dict[str, Any]) -> str:
    idle = metrics["gpu_ms"]["idle"] / metrics["step_ms"]
    during = {part: idle * fraction for part, fraction in metrics["gpu_idle_during"].items()}
    longest = sorted(during.items(), key=lambda item: -item[1])
    most = ", ".join(f"{fraction:.0%} in {part}" for part, fraction in longest if fraction > 0.005)
    return f"the GPU was idle for {idle:.0%} of a step" + (f", by what the host did: {most}" if most else "")


def describe_syncs(syncs: dict[str, float]) -> str:
    """How often the host stops until the GPU has caught up."""
    found = ", ".join(f"{count:.3g} in {part}" for part, count in sorted(syncs.items(), key=lambda item: -item[1]))
    return f"{sum(syncs.values()):.3g} a step for the GPU to catch up" + (f": {found}" if found else "")


def draw_parts(metrics: dict[str, Any]) -> Table:
    step, host, gpu = metrics["step_ms"], metrics["host_ms"], metrics["gpu_ms"]
    table = _table("part of a step", "ms", "%", *(["GPU ms", "%"] if gpu else []))
    for part in [*host, *(["idle"] if gpu else [])]:
        cells: list[str] = []
        for times in (host, gpu) if gpu else (host,):
            cells += [f"{times[part]:,.1f}", f"{times[part] / step:.1%}"] if part in times else ["", ""]
        table.add_row(part, *cells)
    return table


def draw_groups(metrics: dict[str, Any]) -> Table:
    table = _table("kind of work", _whole(metrics))
    for group, fraction in metrics["groups"].items():
        table.add_row(group, f"{fraction:.1%}")
    return table


def shorten(name: str) -> str:
    """A kernel's name without what all of them have."""
    return re.sub(r"^void |at::native::|\(anonymous namespace\)::", "", name)


def _whole(metrics: dict[str, Any]) -> str:
    return "of GPU's work" if metrics["gpu_ms"] else "of a step"


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=None, pad_edge=False, header_style="bold")
    for title in others:
        table.add_column(title, justify="right", no_wrap=True, min_width=len(title))
    return table
