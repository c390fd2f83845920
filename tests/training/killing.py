"""Runs of test_run_state.py in processes of their own that are killed at a chosen moment."""

import os
import pathlib
import signal

from servers import servers

from itpn.tasks.configs import RunConfig

CALLS = ((os, "fsync"), (os, "replace"), (os, "link"), (pathlib.Path, "replace"), (pathlib.Path, "unlink"))


def run_killed(config: RunConfig, moment: int) -> int | None:
    """Train in another process until it has called so many functions that change the names of files, or sync them.

    Returns:
        The exit code of the process: -9 if it was killed, 0 if the run ended before.
    """
    process = servers.Process(target=_train, args=(config, moment))
    process.start()
    process.join()
    return process.exitcode


def _train(config: RunConfig, moment: int) -> None:
    import torch

    from itpn.tasks.run import train

    torch.set_num_threads(1)
    count = 0

    def kill_before(call):
        def counted(*arguments, **options):
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counted

    for owner, name in CALLS:
        setattr(owner, name, kill_before(getattr(owner, name)))
    train(config, "test")
