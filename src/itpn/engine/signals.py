"""What a signal to stop does outside training, which answers it between two steps."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from itpn.errors import RunStopped


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise RunStopped on Ctrl-C and SIGTERM."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise RunStopped(signum)

    handlers = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
