"""How all processes of a run stop at the same step."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from itpn.distributed import start_maximum
from itpn.errors import RunStopped
from itpn.system.signals import SignalHandlers
from itpn.training.state import Training


class StopRequest:
    """A signal to stop, obeyed after a whole step.

    Several processes vote, and stop a step after the one in which the signal came: to wait for the result at once would
    make the host wait for the device in every step, and the device then for the host.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.signals = SignalHandlers(self._handle)
        self._pending: tuple[Tensor, Callable[[], Any]] | None = None
        self._stream: torch.cuda.Stream | None = None

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise RunStopped(signum)  # the second Ctrl-C does not wait for the step to end
        self.signum = signum

    def decide(self, run: Training) -> bool:
        """Whether to stop at this step, the same on all processes, which call this after every step."""
        if run.at_end:
            return False  # all that is left is to write the files
        if run.processes == 1:
            return self.signum is not None
        before, self._pending = self._pending, self._vote(run.device)
        if before is None:
            return False
        flag, wait = before
        wait()
        return bool(flag)

    def _vote(self, device: torch.device) -> tuple[Tensor, Callable[[], Any]]:
        """The result over all processes, and how to wait for it."""
        if device.type == "cuda":
            # beside the stream that computes, which must not wait for what the other processes say either
            self._stream = self._stream or torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            flag = torch.full((), int(self.signum is not None), device=device)
            work = start_maximum(flag)
            if self._stream is None:
                return flag, work.wait
            work.wait()  # the stream does, not the host
            return flag.to("cpu", non_blocking=True), self._stream.record_event().synchronize
