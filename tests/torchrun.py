"""What torchrun does, with processes that are forked from one that has imported torch, which takes seconds."""

import os
import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from servers import servers


def run_command(*arguments: object, folder: Path, processes: int = 2) -> str:
    """Run `itpn` with some arguments in several processes; all have to end well.

    Returns:
        What they printed on stdout, one after the other.
    """
    return run(_command, [str(argument) for argument in arguments], folder=folder, processes=processes)


def run_script(path: Path, *arguments: object, folder: Path, processes: int = 2) -> str:
    """The same for a script."""
    return run(_script, [str(path), *map(str, arguments)], folder=folder, processes=processes)


def run(target: Callable[[list[str]], Any], arguments: list[str], *, folder: Path, processes: int) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        servers.Process(target=_take_part, args=(target, arguments, rank, processes, port, folder))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(300)
        errors = "".join((folder / f"stderr-{rank}").read_text() for rank in range(processes))
        assert [process.exitcode for process in started] == [0] * processes, errors
    finally:
        for process in started:
            process.kill()
    return "".join((folder / f"stdout-{rank}").read_text() for rank in range(processes))


def _take_part(
    target: Callable[[list[str]], Any], arguments: list[str], rank: int, processes: int, port: int, folder: Path
) -> None:
    import torch

    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
        os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    for number, name in ((1, "stdout"), (2, "stderr")):
        with open(folder / f"{name}-{rank}", "w") as file:
            os.dup2(file.fileno(), number)
    sys.exit(target(arguments))


def _command(arguments: list[str]) -> int:
    from itpn.cli import main

    return main(arguments)


def _script(arguments: list[str]) -> None:
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
