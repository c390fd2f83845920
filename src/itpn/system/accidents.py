"""Accidents of the machine in any command, as one line. Without torch, for commands that do not need it."""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator

from itpn.errors import ACCIDENTS, FORBIDDEN, MachineError, PeerLost, UserError, errno_in, remedy
from itpn.system.processes import LOST_PEER, several
from itpn.system.shared_memory import describe_lost_worker

GPU_FULL = re.compile(r"CUDA out of memory|CUDA error: out of memory|HIP out of memory|_STATUS_ALLOC_FAILED")
MEMORY_FULL = re.compile(r"can't allocate memory|std::bad_alloc|Cannot allocate memory|can't start new thread")
HALF_WRITTEN = re.compile(r"PytorchStreamWriter failed|file write failed|iostream error|unexpected pos \d+ vs")
DISCONNECTED = re.compile(
    r"Connection (closed|reset|refused) by (remote )?peer|Connection reset|Broken pipe|NCCL|gloo|Socket Timeout"
    r"|Timed out waiting|recvValue failed|failed to recv|Application timeout|wait timeout",
    re.IGNORECASE,
)


@contextlib.contextmanager
def guard(subject: str = "", kept: Callable[[], str] | None = None) -> Iterator[None]:
    """Raise MachineError, with one line that says what to do, for what an accident of the machine raises.

    Args:
        subject: what is being written, for an error that does not name its file.
        kept: what is not lost, for the end of the line.

    Raises:
        MachineError: instead of the error of an accident: of files (`OSError`, and what libraries make of it), memory,
            worker processes, or connections to other processes. Everything else is raised as it is.
    """
    try:
        yield
    except BrokenPipeError:  # of who reads what is printed
        raise
    except MachineError as error:
        if kept is None or not str(error):  # another process says it
            raise
        raise _finish(error, str(error), kept) from error
    except UserError as error:
        # an accident where an invalid value was expected
        cause = error.__cause__ or error.__context__
        forbidden = isinstance(cause, OSError) and cause.errno in FORBIDDEN
        if cause is None or not (forbidden or _accident_behind(cause)):
            raise
        raise _finish(error, str(error), kept) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # no accident, wherever it is found
            raise UserError(describe_accident(error, subject)) from error
        message = describe_accident(error, subject)
        if message is None:
            raise
        raise _finish(error, message, kept) from error


def _finish(error: Exception, message: str, kept: Callable[[], str] | None) -> MachineError:
    more = "" if kept is None else kept()
    kind = PeerLost if isinstance(error, PeerLost) or _is_disconnected(error) else MachineError
    return kind(f"{message}; {more}" if more and more not in message else message)


def describe_accident(error: Exception, subject: str = "") -> str | None:
    """An accident in a line; None for what is none."""
    text = str(error)
    if isinstance(error, OSError):
        return _describe_refusal(error, subject)
    if isinstance(error, RuntimeError) and (lost := describe_lost_worker(text)) is not None:
        return lost
    if _is_disconnected(error):
        return f"{LOST_PEER}, for want of memory perhaps"
    if type(error).__name__ == "OutOfMemoryError" or GPU_FULL.search(text):
        return (
            "the GPU's memory is full: lower the batch size (--data.batch-size, --evaluation.batch-size), or give "
            "--model.grad-checkpointing; --trainer.accumulate-grad-batches makes up for smaller batches"
        )
    if isinstance(error, MemoryError) or MEMORY_FULL.search(text):
        return (
            "the machine's memory, or the number of processes allowed, is exhausted: end other processes, or lower "
            "--data.num-workers or --data.batch-size"
        )
    cause = _accident_behind(error)
    if cause is not None:
        return _describe_refusal(cause, subject)
    if HALF_WRITTEN.search(text):
        return f"{subject or 'a file'} cannot be written whole: make room on its disk, then repeat the command"
    return None


def _is_disconnected(error: BaseException) -> bool:
    if not several() or not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError") or bool(
        DISCONNECTED.search(str(error))
    )


def _accident_behind(error: BaseException) -> OSError | None:
    """The accident that a library has wrapped into an error of its own."""
    cause: BaseException | None = error
    seen: set[int] = set()  # an error that is raised again while it is handled can be its own context
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, OSError) and cause.errno in ACCIDENTS:
            return cause
        number = errno_in(str(cause))
        if number is not None:
            return OSError(number, os.strerror(number))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def _describe_refusal(error: OSError, subject: str) -> str:
    name = error.filename if isinstance(error.filename, str | bytes | os.PathLike) else None
    what = subject or "a file or a connection" if name is None else os.fsdecode(name)
    if name is not None and subject and subject not in what:
        what = f"{what} ({subject})"
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return "; ".join(filter(None, [f"{what}: {reason}", remedy(error)]))
