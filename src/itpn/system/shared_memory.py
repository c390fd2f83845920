"""The shared memory of worker processes, and what torch's messages about lost workers mean."""

import contextlib
import os
import re

from itpn.errors import errno_in, remedy

SHARED_MEMORY = "/dev/shm"
MORE_SHARED_MEMORY = (
    "give it more (docker run --shm-size 8g), or lower --data.num-workers (0 needs none) or --data.batch-size"
)
CANNOT_SEND = 113  # exit code of a worker whose batch cannot be sent


def free_shared_memory() -> int | None:
    """Bytes; None where there is no such file system."""
    with contextlib.suppress(OSError):
        status = os.statvfs(SHARED_MEMORY)
        return status.f_bavail * status.f_frsize
    return None


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:.1f}"


def describe_lost_worker(text: str) -> str | None:
    """What torch's words about a lost worker, or about shared memory, mean; None where they are about something else.

    They can come up anywhere in the main process: torch raises them from a handler of SIGCHLD.
    """
    if "shared memory" in text and ("unable to" in text or "bytes" in text) and "DataLoader worker" not in text:
        number = errno_in(text)
        if number is not None and "No space" not in text:
            return f"shared memory cannot be used: {os.strerror(number)}; {remedy(OSError(number, ''))}"
        free = free_shared_memory()
        return (
            f"shared memory {SHARED_MEMORY} is full{'' if free is None else f' ({megabytes(free)} MB are free)'}: end "
            f"other processes that use it, {MORE_SHARED_MEMORY}"
        )
    if "Too many open files" in text or "ancdata" in text:
        return "too many open files for worker processes: raise their limit (ulimit -n), or lower --data.num-workers"
    if not text.startswith("DataLoader worker (pid"):
        return None
    if "Bus error" in text:
        return (
            f"a worker process that reads died of a bus error: shared memory {SHARED_MEMORY} is full "
            f"({MORE_SHARED_MEMORY}), or a file that it read through a mapping was lost"
        )
    if f"exit code {CANNOT_SEND}" in text:
        return (
            "a worker process cannot send what it has read: memory, shared memory or open files are exhausted; "
            "lower --data.num-workers, or raise the limits (ulimit -n, docker run --shm-size)"
        )
    killed = re.search(r"killed by signal: ([^.]+)", text)
    how = f"was killed ({killed[1]}), for want" if killed else "ended unexpectedly, killed for want"
    return (
        f"a worker process that reads {how} of memory perhaps: lower --data.num-workers or --data.batch-size, or give "
        "the job more memory, then repeat the command"
    )
