"""Worker processes that are killed, hang, or find no shared memory: one line, and never a hang."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

import itpn.data.readers
import itpn.data.workers
from itpn.data.readers import FileReader, read_file
from itpn.data.workers import WorkerLoader, beat
from itpn.errors import MachineError, UserError
from itpn.system.processes import conclude


class Misbehaving(Dataset[dict[str, Any]]):
    """Batches of a tensor; the fourth does what the test asks for."""

    def __init__(self, action: str) -> None:
        self.action = action

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number == 3:
            match self.action:
                case "hang":
                    os.open(os.environ["FIFO"], os.O_RDONLY)  # as a lost mount: no answer
                case "slow":
                    for _ in range(8):
                        time.sleep(0.1)
                        beat()
                case "disk":
                    raise OSError(errno.EIO, "Input/output error", "/photos/1.jpg")
                case "user error":
                    raise UserError("a mistake of the user's")
                case "lines":
                    raise UserError("a name\nof two lines: x\nitpn.errors.MachineError: none")
                case "memory":
                    raise MemoryError("no more")
                case "bug":
                    raise KeyError("a bug")
                case "unsendable":
                    return {"image": torch.zeros(4), "key": lambda: None}
                case "none":
                    pass
                case signum:
                    os.kill(os.getpid(), int(signum))
        return {"image": torch.full((100,), number), "key": [str(number)]}


def run(action: str, workers: int = 2) -> list[int]:
    return [int(batch["image"][0]) for batch in WorkerLoader(Misbehaving(action), range(9), workers, "photos")]


def test_more_workers_than_cores_are_no_warning(monkeypatch):
    """In any command: torch would warn as a loader is made, and again as it is read."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert run("none") == list(range(9))


@pytest.mark.parametrize("length", [0, 100])  # too long for a socket
def test_workers_leave_no_folders_behind(monkeypatch, length):
    """Worker processes share a folder that the main process removes when it ends; killed ones would leave theirs."""
    settings = multiprocessing.current_process()._config
    monkeypatch.setitem(settings, "tempdir", None)
    with tempfile.TemporaryDirectory(suffix="x" * length) as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        assert run("none") == list(range(9))
        assert tempfile.tempdir == folder
        assert [str(path) for path in Path(folder).iterdir()] == ([] if length else [settings["tempdir"]])
        assert os.listdir(settings["tempdir"]) == []


def alive() -> list[str]:
    """Worker processes; not the server of other tests that starts processes."""
    command = ["ps", "-ww", "-o", "pid,stat,args", "--ppid", str(os.getpid())]
    children = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[1:]
    return [line for line in children if not any(word in line for word in (" ps ", " Z", "forkserver", "tracker"))]


@pytest.mark.parametrize(
    ("action", "kind", "message"),
    [
        (
            str(int(signal.SIGKILL)),
            MachineError,
            r"killed \(Killed\), for want of memory perhaps: lower --data",
        ),
        (
            str(int(signal.SIGBUS)),
            MachineError,
            r"bus error: shared memory /dev/shm is full \(.*--shm-size",
        ),
        (str(int(signal.SIGSEGV)), MachineError, r"killed \(Segmentation fault\)"),
        ("unsendable", MachineError, "cannot send what it has read"),
        ("disk", OSError, r"^\[Errno 5\] Input/output error: '/photos/1.jpg'$"),
        ("memory", MemoryError, "^no more$"),
        ("user error", UserError, "^a mistake of the user's$"),
        ("bug", KeyError, "Original Traceback"),
    ],
)
def test_a_lost_worker(action, kind, message, capfd):
    begin = time.monotonic()
    with pytest.raises(kind, match=message) as error:
        run(action)
    assert time.monotonic() - begin < 20
    assert kind is KeyError or "\n" not in str(error.value)
    assert not alive()
    assert capfd.readouterr().err == ""  # the command prints the only line


def test_a_message_of_several_lines(capsys):
    """All of it comes from the worker, of the kind that it had there, and a command prints it as one line."""
    with pytest.raises(UserError) as error:
        run("lines")
    assert str(error.value) == "a name\nof two lines: x\nitpn.errors.MachineError: none"
    assert conclude(error.value) == 2
    assert capsys.readouterr().err == "itpn: a name of two lines: x itpn.errors.MachineError: none\n"


def test_a_worker_that_hangs(tmp_path, monkeypatch):
    """Others still work for a while; and one that only takes long is waited for."""
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setenv("FIFO", str(tmp_path / "fifo"))
    monkeypatch.setattr(itpn.data.workers, "POLL", 0.2)
    monkeypatch.setattr(itpn.data.workers, "PATIENCE", 0.4)
    with pytest.raises(MachineError, match=r"^no image of photos was read for \S+ s, worker processes hang: check"):
        run("hang")
    assert not alive()
    assert run("slow") == list(range(9))


def test_the_end_of_a_worker_is_noticed_where_its_signal_was_missed(monkeypatch):
    """As in the middle of decoding, where whatever is raised is a fault of the image."""
    monkeypatch.setattr(itpn.data.workers, "POLL", 0.2)
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_set_SIGCHLD_handler", lambda: None)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        with pytest.raises(MachineError, match=r"a worker process that reads was killed \(Killed\)"):
            run(str(int(signal.SIGKILL)))
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_workers_end_with_the_process_that_started_them(tmp_path):
    """Even those that hang, when it is killed."""
    if sys.platform != "linux":
        pytest.skip("only Linux notifies a process that its parent has ended")
    os.mkfifo(tmp_path / "fifo")
    code = """
        import sys; sys.path[:0] = {path!r}
        from test_workers import *
        loader = WorkerLoader(Misbehaving("hang"), range(9), 2, "photos")
        stream = iter(loader); next(stream)
        print(*(worker.pid for worker in itpn.data.workers._streams[0]._workers), flush=True)
        time.sleep(1000)
    """
    code = textwrap.dedent(code).format(path=[str(Path(__file__).parent), *sys.path])
    with subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "FIFO": str(tmp_path / "fifo")}, stdout=subprocess.PIPE
    ) as process:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}/cmdline").exists() and _cmdline(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_streams_that_are_given_up_say_nothing_at_the_end():
    code = """
        import sys; sys.path[:0] = {path!r}
        from test_workers import *
        streams = [iter(WorkerLoader(Misbehaving("none"), range(9), 1, "photos")) for _ in range(3)]
        print([int(next(stream)["image"][0]) for stream in streams])
        plain, circle, sys.kept = streams
        del streams
        circle = [circle]; circle.append(circle)
        raise SystemExit(3)
    """
    code = textwrap.dedent(code).format(path=[str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "[0, 0, 0]\n", "")


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()  # empty where only its exit code is left of it
    except OSError:
        return b""


def test_too_little_shared_memory_is_refused_at_the_first_batch(monkeypatch):
    """Three batches of two workers each, and the one at hand: five pages."""
    monkeypatch.setattr(itpn.data.workers, "free_shared_memory", lambda: 5 * 4096)
    assert run("none") == list(range(9))
    monkeypatch.setattr(itpn.data.workers, "free_shared_memory", lambda: 5 * 4096 - 1)
    with pytest.raises(MachineError, match=r"^shared memory /dev/shm is too small: 0\.0 MB .*--shm-size.*num-workers"):
        run("none")
    assert run("none", workers=0) == list(range(9))


IN_SMALL_MEMORY = """
    import sys; sys.path[:0] = {path!r}
    import contextlib
    from test_workers import *
    class Large(Dataset):
        def __getitem__(self, number):
            return dict(image=torch.full((64 * 1024,), number, dtype=torch.uint8))
    stream = iter(WorkerLoader(Large(), range(100), 2, "photos"))
    next(stream)
    try:
        with open("/dev/shm/other", "wb", buffering=0) as other:
            for batch in stream:
                with contextlib.suppress(OSError):
                    while True:
                        other.write(bytes(4096))
    except MachineError as error:
        print(error)
"""


def test_shared_memory_that_fills_up_later():
    code = textwrap.dedent(IN_SMALL_MEMORY).format(path=[str(Path(__file__).parent), *sys.path])
    command = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=900k tmpfs /dev/shm && exec "$@"', "sh"]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount a small /dev/shm")
    done = subprocess.run([*command, sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.stdout.startswith("shared memory /dev/shm is full (0.")
    assert done.stdout.count("\n") == 1


def test_a_passing_read_error_is_no_fault_of_the_image(tmp_path, monkeypatch):
    path = str(tmp_path / "1.jpg")
    Path(path).write_bytes(b"content")
    monkeypatch.setattr(itpn.data.readers, "RETRY_AFTER", (0.0, 0.0))
    failures: list[int] = []

    read_bounded = itpn.data.readers.read_bounded

    def refuse(name, most):
        if failures:
            number = failures.pop()
            raise OSError(number, os.strerror(number), name)
        return read_bounded(name, most)

    monkeypatch.setattr(itpn.data.readers, "read_bounded", refuse)
    failures += [errno.ESTALE, errno.EIO]
    assert FileReader([path])[0] == (path, b"content")
    assert read_file(path, 3, 2) == b"te"
    failures += [errno.ENOTCONN] * 3
    message = "1.jpg cannot be read: Transport endpoint is not connected; look whether its disk or network mount"
    with pytest.raises(MachineError, match=message):
        FileReader([path])[0]
    failures += [errno.EMFILE] * 3
    with pytest.raises(MachineError, match=r"Too many open files; raise the limit of open files \(ulimit -n\)"):
        FileReader([path])[0]
    failures += [errno.EACCES]
    assert str(FileReader([path])[0][1]) == "Permission denied"  # of this one image
