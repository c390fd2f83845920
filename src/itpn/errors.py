"""What ends a command before its time."""

import signal


class UserError(Exception):
    """A mistake that its maker can mend: the command line prints the message as one line and exits with 2."""


class MachineError(Exception):
    """An accident of the machine (disk full, shared memory full, a worker killed, no permission): the command line
    prints the message as one line and exits with 1. The message says what happened, what is kept and what to do.
    """


class NonFiniteLoss(Exception):
    """The loss became infinite or not a number; the message says where the evidence is. Exit code 1."""


class ExportFailed(Exception):
    """An exported file computes something else than the network, and was not kept. Exit code 1."""


class RunStopped(BaseException):
    """A signal asked the run to stop, and its checkpoint is written. Exit code 128 + signal.

    No :class:`Exception`: a decoder on the way would take it for a broken image.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)  # as it is pickled between processes
        self.signum = signum

    def __str__(self) -> str:
        return signal.Signals(self.signum).name
