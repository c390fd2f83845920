"""`itpn`, of which a process does as MISBEHAVE says, "rank step action", before a pass."""

import os
import signal
import sys
import time

from itpn.cli import main
from itpn.errors import MachineError, UserError
from itpn.training import loop

RANK, STEP, ACTION = os.environ["MISBEHAVE"].split()
take_pass = loop.take_pass


def misbehave(run, *args):
    if run.step == int(STEP) and run.fabric.global_rank == int(RANK):
        match ACTION:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "mistake":
                raise UserError("a mistake of one process")
            case "accident":
                raise MachineError("an accident of one process")
            case "bug":
                raise KeyError("a bug of one process")
            case "hang":
                time.sleep(1000)
    return take_pass(run, *args)


loop.take_pass = misbehave

if __name__ == "__main__":
    sys.exit(main())
