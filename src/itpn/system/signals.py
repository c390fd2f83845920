"""Handlers of the signals that stop a command."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from itpn.errors import MachineError, RunStopped, UserError
from itpn.system.processes import STOPPING, several

RETRY_AFTER, MAX_RETRIES = 0.05, 100  # seconds after which a signal without effect is repeated; how often in an import


class SignalHandlers:
    """Handles signals until the handlers before are restored.

    Args:
        handle: called with the signal's number and the frame.
    """

    def __init__(self, handle: Callable[[int, FrameType | None], None], signums: Sequence[int] = STOPPING) -> None:
        self._handle = handle
        self._signums = signums
        self._before: dict[int, Any] = {}

    def set(self) -> None:
        """Again as well, where a library has put handlers of its own in their place."""
        for signum in self._signums:
            if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                continue  # nohup: the command is to outlive its terminal
            before = signal.signal(signum, self._handle)
            self._before.setdefault(signum, before)

    def restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


def stop_at_once(signum: int, frame: FrameType | None) -> None:
    if several() and isinstance(sys.exc_info()[1], Exception):
        return  # of several processes one has failed, and torchrun ends the others: the failure is still to be reported
    raise RunStopped(signum)


class _Stop:
    """Raises RunStopped for a signal, after the import at hand; once more where Python can raise nothing.

    Args:
        entered: the frame below which an import counts.
    """

    def __init__(self, entered: FrameType) -> None:
        self._entered = entered
        self.pending: int | None = None  # the signal that is yet to stop the command
        self._retries = 0
        self._waiting = False
        self._alarm = SignalHandlers(self.handle, (signal.SIGALRM,))
        self._before = sys.unraisablehook

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGALRM:
            self._waiting = False
        else:
            self.pending = signum
        if self.pending is None:
            return
        if self._retries < MAX_RETRIES and self._is_import(frame):
            self._retries += 1
            self._repeat()
            return
        stop_at_once(self.pending, frame)
        self.pending = None  # it was passed over

    def pass_on(self, lost: "sys.UnraisableHookArgs") -> None:
        """For sys.unraisablehook: what was raised in what runs at a fork, or when an object goes."""
        if isinstance(lost.exc_value, RunStopped):
            self.pending = lost.exc_value.signum
            self._repeat()
        else:
            self._before(lost)

    def restore(self) -> None:
        if self._waiting:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self._alarm.restore()

    def _repeat(self) -> None:
        self._alarm.set()
        self._waiting = True
        signal.setitimer(signal.ITIMER_REAL, RETRY_AFTER)  # no thread: its start could wait for a lock that we hold

    def _is_import(self, frame: FrameType | None) -> bool:
        while frame is not None and frame is not self._entered:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                return True
            frame = frame.f_back
        return False


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise RunStopped on Ctrl-C, SIGTERM and SIGHUP, after the import at hand.

    Modules of C code that are being imported would print its traceback, and raise an error of their own instead.
    """
    if threading.current_thread() is not threading.main_thread():  # the only one that may handle signals
        yield
        return
    stop = _Stop(sys._getframe(2))  # of the with statement; between them is contextlib
    handlers = SignalHandlers(stop.handle, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    handlers.set()
    before, sys.unraisablehook = sys.unraisablehook, stop.pass_on
    try:
        yield
    except Exception as error:
        if stop.pending is None or isinstance(error, UserError | MachineError):
            raise
        raise RunStopped(stop.pending) from error  # what an import, say, made of a RunStopped in it
    finally:
        sys.unraisablehook = before
        stop.restore()
        handlers.restore()
