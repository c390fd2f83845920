"""What ends a command before its time."""

import errno
import os
import signal

# a path that a user can correct; what else an operating system refuses is an accident
WRONG_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
# the file system or the machine, and not the file that is read: it may pass
_LOST = (
    *("EIO", "ESTALE", "ENOTCONN", "ENXIO", "ENODEV", "EREMOTEIO", "ECOMM", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH"),
    *(
        "ENETDOWN",
        "ENETUNREACH",
        "ESHUTDOWN",
        "ECONNABORTED",
        "ECONNRESET",
        "ECONNREFUSED",
        "EMFILE",
        "ENFILE",
        "ENOMEM",
    ),
)
LOST = {getattr(errno, name) for name in _LOST if hasattr(errno, name)}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
ACCIDENTS = LOST | FULL | {errno.EROFS}  # whatever file it happens to


class UserError(Exception):
    """A mistake that its maker can mend: the command line prints the message as one line and exits with 2."""


class MachineError(Exception):
    """An accident of the machine (disk full, shared memory full, a worker killed, no permission): the command line
    prints the message as one line and exits with 1. The message says what happened, what is kept and what to do.
    """


class PeerLost(MachineError):
    """Another process of the same run has ended."""


def refusal(what: str, error: OSError) -> UserError | MachineError:
    """What to raise for a refused file operation: a wrong path is the user's mistake, all else an accident.

    Args:
        what: e.g. "FILE cannot be written"; the reason and what to do are added.
    """
    message = f"{what}: {error.strerror or error}"
    if error.errno in WRONG_PATH:
        return UserError(message)
    if error.errno in FULL:
        return MachineError(f"make room on the disk: {message}")
    return MachineError("; ".join(filter(None, [message, remedy(error)])))


def remedy(error: OSError) -> str:
    """What to do about a refused file operation; empty where nothing in particular helps."""
    if error.errno in FULL:
        return "make room on that disk, then repeat the command"
    if error.errno == errno.EROFS:
        return "it is mounted read-only: mount it for writing, or choose another folder"
    if error.errno in FORBIDDEN:
        return "check the permissions of the file and of its folders"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n), or lower --data.num-workers"
    if error.errno in (errno.ENOMEM, errno.EAGAIN):
        return "end other processes, or lower --data.num-workers or --data.batch-size"
    if error.errno in LOST:
        return "look whether its disk or network mount is still there, then repeat the command"
    return ""


def errno_in(text: str) -> int | None:
    """The number of the accident whose text stands in a message of a library that hides the OSError."""
    return next((number for number in ACCIDENTS if os.strerror(number) in text), None)


class NonFiniteLoss(Exception):
    """The loss became infinite or not a number; the message says where the evidence is. Exit code 1."""


class ExportFailed(Exception):
    """An exported file computes something else than the network, and was not kept. Exit code 1."""


class RunStopped(BaseException):
    """A signal stopped the run, and its checkpoint is written. Exit code 128 + signal.

    No :class:`Exception`: a decoder on the way would take it for a corrupt image.

    Attributes:
        reported: it has been printed how far the command came.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)  # as it is pickled between processes
        self.signum = signum
        self.reported = False

    def __str__(self) -> str:
        return signal.Signals(self.signum).name
