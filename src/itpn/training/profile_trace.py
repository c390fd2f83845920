"""What a trace of torch.profiler says: which operations took how long, and when a GPU had nothing to do."""

import bisect
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch.autograd.profiler_util import FunctionEvent

Interval = tuple[float, float]  # begin, end
Range = tuple[float, float, str]  # begin, end, what for

PARTS = ("data wait", "copy to device", "forward", "backward", "optimizer")  # of a step of the loop
OTHER = "other"
MARK = "itpn: "  # begins the names of our ranges in a trace
OURS = "profiler"  # the part in which we wait for the GPU ourselves

# the first that fits; optimizer and data are told by the part that they are in
GROUPS = (
    ("communication", r"nccl|gloo|c10d|all_?reduce|all_?gather"),
    ("pointwise, norms, others", r"^(triton|cpp)_(poi|red|per|fused)"),  # named after all that it fuses, products too
    ("attention", r"scaled_dot_product|flash|fmha|attention"),
    ("products", r"gemm|gemv|\bmm\b|addmm|bmm|matmul|aten::linear|conv(?!ert)|cutlass|xmma|nvjet|cublas|triton_tem"),
    ("copies", r"memcpy|memset|copy|clone|contiguous|\bcat\b|CatArray"),
)
POINTWISE = "pointwise, norms, others"
# ranges around operators: what is left of them when those are taken out is no operator's
FRAMES = (MARK, "ProfilerStep", "enumerate(DataLoader)", "DistributedDataParallel")
PYTHON = "outside operators (Python)"

TOP = 10


@dataclass(frozen=True)
class Operation:
    """A kernel's run on a GPU, or an operator's on a CPU without the operators that it calls."""

    name: str
    part: str
    micros: float


@dataclass(frozen=True)
class DeviceTime:
    """What a GPU did in the recorded steps; microseconds.

    Attributes:
        busy: by the part that launched it; what runs at the same time is counted once.
        idle: by the part that the host was in meanwhile.
        syncs: how often the host waited for the GPU, by part.
    """

    operations: list[Operation]
    busy: dict[str, float]
    idle: dict[str, float]
    syncs: Counter[str]


def read_operators(events: Iterable[FunctionEvent]) -> list[Operation]:
    """The operators of a CPU, without those inside them."""
    operations = []
    for event in events:
        parent: FunctionEvent | None = event
        while parent is not None and not parent.name.startswith(MARK):
            parent = parent.cpu_parent
        part = OTHER if parent is None else parent.name.removeprefix(MARK)
        name = event.name
        if name.startswith(FRAMES):
            name = "waiting for data" if part == "data wait" else PYTHON
        operations.append(Operation(name, part, event.self_cpu_time_total))
    return operations


def read_device(events: Sequence[dict[str, Any]]) -> DeviceTime:
    """What a GPU did, from the events of a trace in Chrome's format as torch.profiler writes it.

    Work belongs to the part in which the host launched it, whichever thread did (backward has its own).
    """
    whole = [event for event in events if event.get("ph") == "X"]
    ranges = [
        (event["ts"], event["ts"] + event["dur"], event["name"]) for event in whole if event["cat"] == "user_annotation"
    ]
    steps = [(begin, end) for begin, end, name in ranges if name.startswith("ProfilerStep#")]
    begin, end = min(step[0] for step in steps), max(step[1] for step in steps)
    parts = fill([(b, e, name.removeprefix(MARK)) for b, e, name in ranges if name.startswith(MARK)], begin, end)
    calls = [event for event in whole if event["cat"] in ("cuda_runtime", "cuda_driver")]
    launched = {event["args"].get("correlation"): event["ts"] for event in calls}
    work: dict[str, list[Interval]] = defaultdict(list)
    operations = []
    for event in whole:
        if event["cat"] in ("kernel", "gpu_memcpy", "gpu_memset"):
            part = part_at(parts, launched.get(event["args"].get("correlation"), event["ts"]))
            work[part].append((event["ts"], event["ts"] + event["dur"]))
            operations.append(Operation(event["name"], part, event["dur"]))
    busy: dict[str, float] = {}
    all_work: list[Interval] = []
    for part in [*PARTS, OTHER]:
        before = find_gaps(all_work, begin, end)
        all_work += work[part]
        busy[part] = length(before) - length(find_gaps(all_work, begin, end))
    syncs = Counter(
        part_at(parts, event["ts"]) for event in calls if re.search(r"Synchronize$|^cudaMemcpy$", event["name"])
    )
    del syncs[OURS]
    return DeviceTime(operations, busy, divide_gaps(find_gaps(all_work, begin, end), parts), syncs)


def fill(ranges: Sequence[Range], begin: float, end: float) -> list[Range]:
    """Ranges that follow each other, in any order, and between them :data:`OTHER`, from ``begin`` to ``end``."""
    known = sorted((max(b, begin), min(e, end), name) for b, e, name in ranges if b < end and e > begin)
    edges = [(begin, begin, ""), *known, (end, end, "")]
    between = [(one[1], two[0], OTHER) for one, two in pairwise(edges) if one[1] < two[0]]
    return sorted([*known, *between])


def part_at(parts: Sequence[Range], moment: float) -> str:
    """Which of the ranges that follow each other a moment is in; what is ours is no part of a step."""
    place = bisect.bisect_right(parts, moment, key=lambda part: part[0]) - 1
    return parts[place][2] if place >= 0 and moment <= parts[place][1] else OTHER


def find_gaps(work: Iterable[Interval], begin: float, end: float) -> list[Interval]:
    """When between ``begin`` and ``end`` no work was done; pieces of work may overlap."""
    gaps = []
    clock = begin
    for start, stop in sorted(work):
        if start > clock:
            gaps.append((clock, min(start, end)))
        clock = max(clock, stop)
        if clock >= end:
            return gaps
    return [*gaps, (clock, end)] if clock < end else gaps


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


def divide_gaps(gaps: Sequence[Interval], parts: Sequence[Range]) -> dict[str, float]:
    """How much of the gaps falls into each part; what is ours counts as :data:`OTHER`."""
    times: dict[str, float] = dict.fromkeys([*PARTS, OTHER], 0.0)
    for begin, end, name in parts:
        inside = (min(stop, end) - max(start, begin) for start, stop in gaps if start < end and stop > begin)
        times[name if name in times else OTHER] += sum(inside)
    return times


def summarize_device(device: DeviceTime | None, step_ms: float, steps: int) -> dict[str, Any]:
    """Milliseconds of a GPU in a step, by part and idle; None where there is no GPU.

    Recording slows the host, hardly the GPU: what it was busy is taken from the recorded steps, the length of a step
    from the timed ones.
    """
    if device is None:
        return {"gpu_ms": None, "gpu_idle_during": None, "host_syncs": None}
    busy = {part: micros / 1e3 / steps for part, micros in device.busy.items()}
    scale = min(1.0, step_ms / (sum(busy.values()) or 1.0))  # noise must not make it more than a step
    busy = {part: scale * ms for part, ms in busy.items()}
    idle = sum(device.idle.values()) or 1.0
    return {
        "gpu_ms": {**busy, "idle": step_ms - sum(busy.values())},
        "gpu_idle_during": {part: micros / idle for part, micros in device.idle.items()},
        "host_syncs": {part: count / steps for part, count in device.syncs.items()},
    }


def group_of(operation: Operation) -> str:
    if operation.part == "data wait":
        return "data wait"
    if operation.name == PYTHON:
        return PYTHON
    for group, pattern in GROUPS:
        if re.search(pattern, operation.name, re.IGNORECASE):
            if operation.part == "optimizer" and group != "communication":
                break
            return group
    return "optimizer" if operation.part == "optimizer" else POINTWISE


def summarize_operations(operations: Sequence[Operation], steps: int) -> dict[str, Any]:
    """Fractions of groups of operations, and those operations that take longest."""
    total = sum(operation.micros for operation in operations) or 1.0
    groups: dict[str, float] = defaultdict(float)
    times: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for operation in operations:
        groups[group_of(operation)] += operation.micros
        times[operation.name] += operation.micros
        calls[operation.name] += 1
    longest = sorted(times.keys() - {PYTHON}, key=lambda name: -times[name])[:TOP]
    return {
        "groups": {group: micros / total for group, micros in sorted(groups.items(), key=lambda item: -item[1])},
        "longest": [
            {
                "name": name,
                "ms": times[name] / 1e3 / steps,
                "fraction": times[name] / total,
                "calls": calls[name] / steps,
            }
            for name in longest
        ],
    }
