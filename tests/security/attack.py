"""Attacks in a process of their own, whose memory and time are limited."""

import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from servers import servers

from itpn.cli import main

GIB = 2**30


def _limited(
    what: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    log: str,
    memory: int,
    answers: Any,
) -> None:
    os.environ.update(environment)  # the server's is that of its start
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        answer = what(*arguments)
    except BaseException as error:
        traceback.print_exc()
        answer = error
    sys.stdout.flush()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    answers.send((answer if isinstance(answer, int | str | tuple | None) else repr(answer), grown))


def limited(what: Callable[..., Any], *arguments: Any, memory: int = GIB, seconds: float = 120) -> tuple[Any, str]:
    """What a function returns (or the repr of what it raises), and what it printed.

    Fails if it takes longer (it hangs), or if its memory grows by more than ``memory`` bytes.
    """
    receiver, sender = servers.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile() as log:
        process = servers.Process(
            target=_limited, args=(what, arguments, dict(os.environ), log.name, 3 * memory, sender)
        )
        process.start()
        sender.close()
        try:
            assert receiver.poll(seconds), f"still running after {seconds} s"
            answer, grown = receiver.recv()
        except EOFError:
            process.join(10)
            raise AssertionError(f"ended with {process.exitcode}") from None
        finally:
            process.kill()
            process.join()
        printed = Path(log.name).read_text(errors="replace")
    assert grown < memory, f"{grown / GIB:.1f} GiB: {printed[-500:]}"
    return answer, printed


def refused(*arguments: Any, memory: int = GIB, seconds: float = 120) -> str:
    """The one line with which `itpn ARGUMENTS` refuses, with exit code 2."""
    code, printed = limited(main, [str(argument) for argument in arguments], memory=memory, seconds=seconds)
    lines = printed.strip().splitlines()
    assert code == 2, f"{code}: {printed[-2000:]}"
    errors = [line for line in lines if line.startswith("itpn: ")]
    assert lines
    assert errors == lines[-1:], printed[-2000:]
    assert "Traceback" not in printed
    return lines[-1]
