"""Worker processes that read data, for all commands: their start, and errors when one is lost."""

import atexit
import contextlib
import ctypes
import functools
import multiprocessing.process
import multiprocessing.queues
import multiprocessing.util
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from multiprocessing.sharedctypes import RawValue
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from itpn.errors import MachineError, UserError
from itpn.system.shared_memory import (
    CANNOT_SEND,
    MORE_SHARED_MEMORY,
    SHARED_MEMORY,
    describe_lost_worker,
    free_shared_memory,
    megabytes,
)

POLL = 5.0  # seconds between checks of the worker processes while a batch is awaited
PATIENCE = 600.0  # seconds without a single image read, after which worker processes count as hung
PR_SET_PDEATHSIG = 1  # of Linux's prctl
MAX_SOCKET_FOLDER = 70  # bytes; the path of a socket has at most 107, of which Python's names take 33

_streams: list[Any] = []  # torch's iterators with live worker processes
_beats: Any = None  # in a worker process: number of images that all workers of the loader have read


class WorkerLoader(DataLoader[Any]):
    """A DataLoader of whole batches that reports worker processes that die, hang or lack shared memory.

    Args:
        where: name of the data, for messages.
        dataset, sampler, num_workers, pin_memory: as of `DataLoader`; an item is a whole batch.

    Raises:
        MachineError: while iterating: a worker process is killed, none reads an image for `PATIENCE` seconds (see
            `beat`), or shared memory is too small, which is checked with the first batch.
        UserError, OSError, MemoryError: while iterating: as the data set raises them in a worker process.
    """

    def __init__(
        self, dataset: Dataset[Any], sampler: Any, num_workers: int, where: str, pin_memory: bool = False
    ) -> None:
        self._where = where
        self._beats = RawValue("Q") if num_workers else None
        self._to_shared_memory = _ToSharedMemory(num_workers)
        super().__init__(
            dataset,
            sampler=sampler,
            batch_size=None,  # items are whole batches
            collate_fn=self._to_shared_memory,
            num_workers=num_workers,
            worker_init_fn=functools.partial(
                start_worker, self._beats, threading.current_thread() is threading.main_thread()
            ),
            pin_memory=pin_memory,
            generator=torch.Generator(),  # or else the loader draws from the global one
            timeout=POLL if num_workers else 0,
        )

    def check_worker_number_rationality(self) -> None:
        """Where torch warns of more workers than cores: there are as many as --data.num-workers says."""

    def __iter__(self) -> Generator[Any, None, None]:  # type: ignore[override]  # nothing else of torch's iterators is used
        if self._beats is None:
            yield from super().__iter__()
            return
        self._to_shared_memory.free = free_shared_memory()
        _make_folder()
        stream: Any = super().__iter__()
        streams, kill = _streams, _kill  # an abandoned stream may be closed after this module's globals are gone
        streams.append(stream)
        try:
            count, silence = self._beats.value, 0.0
            while True:
                try:
                    batch = next(stream)
                except StopIteration:
                    return
                except Exception as error:
                    if not str(error).startswith("DataLoader timed out"):
                        raise _explain(error, stream._workers) from error
                    pinning = getattr(stream, "_pin_memory_thread", None)
                    if pinning is not None and not pinning.is_alive():
                        raise MachineError("the thread that copies batches to pinned memory died") from None
                    # counted in checks, not by the clock: a suspended job is not hung
                    silence = silence + POLL if self._beats.value == count else 0.0
                    count = self._beats.value
                    if silence >= PATIENCE:
                        raise MachineError(
                            f"no image of {self._where} was read for {silence:.0f} s, worker processes hang: "
                            "check that its disk or network mount still answers, then repeat the command"
                        ) from None
                    continue
                count, silence = self._beats.value, 0.0
                yield batch
        finally:
            if stream in streams:  # or else the exit handler has ended it
                kill(stream)


def _make_folder() -> None:
    """Make one folder for the sockets of all workers, which this process removes; killed workers would leave theirs."""
    directory = tempfile.gettempdir()
    try:
        if len(os.fsencode(directory)) > MAX_SOCKET_FOLDER:
            tempfile.tempdir = "/tmp"
        folder = multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = directory
    os.makedirs(folder, 0o700, exist_ok=True)  # a cleaner of temporary files may have removed it


def start_worker(beats: Any, by_main_thread: bool, worker: int) -> None:
    """Prepare a worker process: signals, threads, and reports of its failures."""
    global _beats
    _beats = beats
    if by_main_thread and sys.platform == "linux":  # Linux kills us when the thread that started us ends
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # A signal to stop often goes to all processes. The main process handles it: it needs our batches to finish its
    # step, and then ends us. If it does not, an alarm ends us.
    for signum in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
    for signum in (signal.SIGBUS, signal.SIGSEGV):  # torch's handlers write a line of their own
        signal.signal(signum, signal.SIG_DFL)
    # a batch that cannot be sent would be dropped with a traceback, and the main process would wait for it
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(  # type: ignore[attr-defined]
        lambda error, item: os._exit(CANNOT_SEND)
    )
    torch.set_num_threads(1)


def beat() -> None:
    """Report to the main process that an image was read, so that a slow worker does not count as hung."""
    if _beats is not None:
        _beats.value += 1


class _ToSharedMemory:
    """Moves the tensors of a batch to shared memory in the worker process, which can still report a failure.

    Attributes:
        free: bytes of shared memory before the worker processes started; None if unknown.
    """

    def __init__(self, num_workers: int) -> None:
        # those that each worker prefetches, and the current one
        self.in_flight = 2 * num_workers + 1
        self.free: int | None = None

    def __call__(self, batch: Any) -> Any:
        if get_worker_info() is None:
            return batch
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes()]
        sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        need = self.in_flight * sum(-(-size // 4096) * 4096 for size in sizes.values())
        if self.free is not None and need > self.free:
            raise MachineError(
                f"shared memory {SHARED_MEMORY} is too small: {megabytes(self.free)} MB are free, and the batches of "
                f"worker processes need about {megabytes(need)} MB: {MORE_SHARED_MEMORY}"
            )
        self.free = None  # checked once, with the memory that was free at the start
        try:
            for tensor in tensors:
                tensor.share_memory_()
        except RuntimeError as error:
            raise _explain(error) from error
        return batch


def _explain(error: Exception, workers: Sequence[Any] = ()) -> Exception:
    """The error itself, or its cause: a worker's own error without traceback, or the loss of a worker."""
    text = str(error)
    if workers and not text.startswith("Caught "):  # it may be a connection to a worker that is ending
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline and not any(worker.exitcode for worker in workers):
            with contextlib.suppress(RuntimeError):  # raised by torch's own signal handler
                time.sleep(0.02)
        for worker in workers:
            if worker.exitcode:
                how = f"exit code {worker.exitcode}"
                if worker.exitcode < 0:
                    how = f"killed by signal: {signal.strsignal(-worker.exitcode)}"
                text = f"DataLoader worker (pid {worker.pid}) {how}"
    if text.startswith("Caught ") and " in DataLoader worker process " in text:
        # a message of ours may have several lines
        own = re.search(r"^(itpn\.errors\.\w+): (.*)\Z", text.rstrip(), re.DOTALL | re.MULTILINE)
        name, _, reason = (own[0] if own else text.rstrip().splitlines()[-1]).partition(": ")
        kind = {"itpn.errors.UserError": UserError, "itpn.errors.MachineError": MachineError}.get(name)
        if kind is not None:
            return kind(reason)
        if isinstance(error, MemoryError):
            return MemoryError(reason)
        if isinstance(error, OSError) and (found := re.match(r"\[Errno (\d+)\] (.*?)(?:: '(.*)')?$", reason)):
            return OSError(int(found[1]), found[2], found[3])
        text = reason
    accident = describe_lost_worker(text)
    return error if accident is None else MachineError(accident)


def _kill(stream: Any) -> None:
    """Kill the workers of a stream. torch waits for each, and hangs if one was killed while it sent a batch."""
    _streams.remove(stream)
    if stream._shutdown:
        return  # it has ended
    stream._shutdown = True
    if stream._worker_pids_set:
        _remove_worker_pids(id(stream))  # or else their end counts as a failure
        stream._worker_pids_set = False
    if hasattr(stream, "_pin_memory_thread_done_event"):
        stream._pin_memory_thread_done_event.set()
    for worker in stream._workers:
        worker.kill()
    deadline = time.monotonic() + 5
    for worker in stream._workers:
        worker.join(timeout=max(0.0, deadline - time.monotonic()))
        if worker.is_alive():  # it waits for a lost disk and cannot be killed; Python would wait for it at exit
            multiprocessing.process._children.discard(worker)  # type: ignore[attr-defined]


@atexit.register  # before multiprocessing's handler, which waits for busy workers
def _kill_all() -> None:
    for stream in [*_streams]:
        _kill(stream)
