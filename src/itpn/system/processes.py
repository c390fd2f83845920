"""The processes of one run: when one ends, all end, and one prints the reason. Without torch, which may be missing."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

from itpn.errors import PeerLost, UserError
from itpn.system.console import print_error
from itpn.system.environment import read_number

LOST_PEER = "another process of this run ended unexpectedly"
GRACE = 10.0  # seconds in which a process learns from its broken connections that another has ended
# Ctrl-C, the end of a job, a terminal or connection that was closed, and Slurm's warning of the end
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
STOPPED = tuple(128 + signum for signum in STOPPING)  # exit codes

_children: list[subprocess.Popen[bytes]] = []  # that Lightning has started, ranks 1, 2, ... of this machine
_watching = False


def several() -> bool:
    """Whether this process belongs to a run of several, whoever started them."""
    # Lightning takes WORLD_SIZE away again when a run ends
    return bool(_children) or _watching or read_number("WORLD_SIZE", "SLURM_NTASKS", default=1) > 1


def watch_children(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """In the place of Lightning's observer, which kills this process as well as soon as a child fails."""
    _children[:] = children
    threading.Thread(target=_end_with_children, daemon=True).start()


def watch_parent() -> None:
    """End this process, one of those that Lightning has started, soon after the one that started it."""
    global _watching
    if not _watching:
        _watching = True
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def conclude(error: Exception) -> int:
    """Print why the command ends, unless another process of the run has, and end the processes that this one started.

    Returns:
        The exit code.
    """
    message, code = " ".join(str(error).split()), 2 if isinstance(error, UserError) else 1
    if isinstance(error, PeerLost) and _children:
        reason, code = _blame()
        message = message.replace(LOST_PEER, reason) if reason else ""
    if message and is_first():
        print_error(message)
    end_children(0)
    return code


def disconnect() -> None:
    """Close the connections to the other processes, once all have sent what they had to.

    A thread of torch's that still holds one while the interpreter ends aborts the process now and then (SIGABRT), and
    torchrun reports a complete run as failed.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def end_children(patience: float) -> None:
    """Kill the processes that this one started, those that are still there after some seconds."""
    deadline = time.monotonic() + patience
    for child in _children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, deadline - time.monotonic()))
        if child.poll() is None:
            child.kill()
            child.wait()
    _children.clear()


def _blame() -> tuple[str, int]:
    """Which child has ended, "" where it has printed that itself; and the exit code that follows."""
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline:
        for rank, child in enumerate(_children, start=1):
            code = child.poll()
            if code is not None and code < 0:
                return f"the process of rank {rank} was killed ({signal.Signals(-code).name})", 1
            if code:
                return "", 2 if code == 2 else 1
        time.sleep(0.1)
    return LOST_PEER, 1


def _end_with_children() -> None:
    while True:
        time.sleep(1)
        codes = [child.poll() for child in _children]
        if all(code == 0 for code in codes):
            return
        if any(code is not None and code != 0 and code not in STOPPED for code in codes):
            time.sleep(GRACE)  # the main thread learns of it, and prints what is kept; unless it waits for a GPU
            os._exit(conclude(PeerLost(f"{LOST_PEER}; the same command resumes")))


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(GRACE)
    os._exit(conclude(PeerLost("the first process of this run ended unexpectedly; the same command resumes")))


def is_first() -> bool:
    """Whether no other process of the run has printed yet why it ends; they agree through the run's own server."""
    host, port = os.environ.get("MASTER_ADDR"), read_number("MASTER_PORT", default=0)
    if not several():
        return True
    rank = read_number("RANK", "SLURM_PROCID", "LOCAL_RANK", default=0)
    if "torch" in sys.modules and host and port:
        with contextlib.suppress(OSError, OverflowError, RuntimeError):
            socket.create_connection((host, port), timeout=2).close()  # quieter than torch, which tries again
            from torch.distributed import TCPStore

            store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=2), wait_for_workers=False)
            return bool(store.add("itpn/ended", 1) == 1)
    return rank <= 1  # not started yet, or the first process, which kept it, has ended
