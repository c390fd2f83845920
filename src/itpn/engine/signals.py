"""Who answers the signals that ask to stop."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from itpn.engine.peers import several
from itpn.errors import RunStopped

# Ctrl-C, the end of a job, a terminal or connection that was closed, and Slurm's warning of the end
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
LOOK, MOST_LOOKS = 0.05, 100  # seconds after which a signal comes again that came in vain, and how often in an import


class SignalHandlers:
    """Answers signals until what answered before is restored.

    Args:
        answer: called with the signal's number and the frame.
    """

    def __init__(self, answer: Callable[[int, FrameType | None], None], signums: Sequence[int] = STOPPING) -> None:
        self._answer = answer
        self._signums = signums
        self._before: dict[int, Any] = {}

    def set(self) -> None:
        """Again as well, where a library has put handlers of its own in their place."""
        for signum in self._signums:
            if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                continue  # nohup: the command is to outlive its terminal
            before = signal.signal(signum, self._answer)
            self._before.setdefault(signum, before)

    def restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


def stop_at_once(signum: int, frame: FrameType | None) -> None:
    if several() and isinstance(sys.exc_info()[1], Exception):
        return  # of several processes one has failed, and torchrun ends the others: what failed is still to be said
    raise RunStopped(signum)


def _is_import(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise RunStopped on Ctrl-C, SIGTERM and SIGHUP, after the import at hand.

    Modules of C code that are being imported would print its traceback, and raise an error of their own instead.
    """
    if threading.current_thread() is not threading.main_thread():  # the only one that may answer signals
        yield
        return
    asked: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        asked.append(asked[-1] if signum == signal.SIGALRM else signum)
        if _is_import(frame) and len(asked) < MOST_LOOKS:
            come_again()
            return
        stop_at_once(asked[-1], frame)
        asked.clear()  # it was passed over

    def come_again() -> None:
        alarm.set()
        signal.setitimer(signal.ITIMER_REAL, LOOK)  # no thread: its start could wait for a lock that we hold

    def pass_on(lost: "sys.UnraisableHookArgs") -> None:
        if isinstance(lost.exc_value, RunStopped):  # in what runs at a fork, or when an object goes
            asked.append(lost.exc_value.signum)
            come_again()
        else:
            before(lost)

    alarm = SignalHandlers(stop, (signal.SIGALRM,))
    handlers = SignalHandlers(stop, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    handlers.set()
    before, sys.unraisablehook = sys.unraisablehook, pass_on
    try:
        yield
    except Exception as error:
        if not asked:
            raise
        raise RunStopped(asked[0]) from error
    finally:
        if asked:
            signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = before
        alarm.restore()
        handlers.restore()
