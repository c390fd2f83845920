"""`itpn`, of which a process does as MISBEHAVE says, "rank step action", in a training step."""

import os
import signal
import sys
import time

from itpn.cli import main
from itpn.errors import MachineError, UserError
from itpn.tasks.pretraining.module import PretrainingTask

RANK, STEP, ACTION = os.environ["MISBEHAVE"].split()
training_step = PretrainingTask.training_step


def misbehave(task, batch, batch_idx):
    if task.trainer.global_step == int(STEP) and task.global_rank == int(RANK):
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
    return training_step(task, batch, batch_idx)


PretrainingTask.training_step = misbehave

if __name__ == "__main__":
    sys.exit(main())
