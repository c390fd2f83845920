"""Accidents of the machine, provoked: one line, exit code 1, and nothing half-written or left behind."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from options import change
from PIL import Image
from safetensors import SafetensorError

import itpn.data.evaluation
import itpn.data.files
import itpn.data.readers
import itpn.tasks.prediction
import itpn.tasks.pretraining
from itpn.cli import main
from itpn.data.skipped import SkippedImages, nothing_readable
from itpn.errors import MachineError, UserError
from itpn.system.accidents import guard
from itpn.tasks.run import train
from itpn.training import loop
from itpn.training.config import write_yaml

SCRIPT = Path(__file__).with_name("misbehaving.py")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
OPTIONS = ["--data.batch-size", "4", "--data.num-workers", "2", "--data.img-size", "32", "--trainer.max-steps", "6"]


def line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("itpn: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "runs: No space left on device; make room on that disk"),
        (OSError(errno.EROFS, "Read-only file system", "/x/a"), r"/x/a \(runs\): Read-only file system; it is mounted"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/a"), "/x/a .*: Permission denied; check the permiss"),
        (
            OSError(errno.ESTALE, "Stale file handle", "/x/a"),
            "/x/a .*: Stale file handle; look whether its disk or net",
        ),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files; raise the limit of open files .ulimit -n"),
        (OSError("a library's own words"), "runs: a library's own words"),
        (MemoryError(), "the machine's memory, .* is exhausted: .*--data.num-workers or --data.batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "machine's memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "GPU's memory is full: .*batch-size"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "runs: No space",
        ),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "runs cannot be written"),
        (
            RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. "),
            "worker process .* was killed .Killed",
        ),
        (RuntimeError("unable to allocate shared memory(shm) for file </t>: No space left on device (28)"), "shm-size"),
        (RuntimeError("received 0 items of ancdata"), "too many open files for worker processes"),
        (MachineError("as it is"), "^as it is$"),
    ],
)
def test_an_accident_is_a_line(error, words):
    with pytest.raises(MachineError, match=words) as found, guard("runs"):
        raise error
    assert "\n" not in str(found.value)


def test_what_is_no_accident_is_raised_as_it_is():
    for error in (KeyError("x"), RuntimeError("Connection closed by peer"), UserError("x"), ValueError("x")):
        with pytest.raises(type(error)) as found, guard():
            raise error
        assert found.value is error


def test_an_accident_that_was_taken_for_a_mistake():
    def read(number: int):
        try:
            raise OSError(number, os.strerror(number), "classes.txt")
        except OSError:
            raise UserError("classes.txt cannot be read") from None

    with pytest.raises(UserError), guard():
        read(errno.ENOENT)
    for number in (errno.EACCES, errno.EIO):
        with pytest.raises(MachineError, match=r"classes\.txt cannot be read"), guard():
            read(number)


def kill_a_worker(monkeypatch, where) -> None:
    """In a worker process, while it decodes."""
    decode = where.open_sample
    main_process = os.getpid()

    def die(*arguments):
        if os.getpid() != main_process:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(*arguments)

    monkeypatch.setattr(where, decode.__name__, die)


def test_training_with_a_killed_worker(photos, tmp_path, monkeypatch, capsys):
    def take_pass(run, *args, original=loop.take_pass):
        if run.step == 3:
            os.kill(run.loader._stream.gi_frame.f_locals["stream"]._workers[0].pid, signal.SIGKILL)
            time.sleep(1)
        return original(run, *args)

    monkeypatch.setattr(loop, "take_pass", take_pass)
    command = ["train", "itpn-pixel_nano", "--data.root", str(photos), *OPTIONS, "--output-dir", str(tmp_path)]
    command = change(command, ["--trainer.max-steps", "100"])
    assert main([*command, "--trainer.checkpoint-every-n-steps", "2"]) == 1
    last = tmp_path / "itpn-pixel_nano/default/checkpoints/last.ckpt"
    assert re.match(
        r"itpn: a worker process that reads was killed \(Killed\), .*--data\.num-workers", error := line(capsys)
    )
    assert error.endswith(f"; the same command resumes from {last}\n")
    # at once by torch's handler of SIGCHLD, which Lightning takes away after the first run of a process; or else when
    # the batches that were ready are used up
    assert torch.load(last, weights_only=True)["global_step"] in range(2, 20, 2)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A checkpoint, and labelled images for it."""
    folder = tmp_path_factory.mktemp("labelled")
    for split, count in (("train", 6), ("val", 6)):
        for number in range(count):
            path = folder / f"images/{split}/{'ab'[number % 2]}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((40, 40)).save(path)
    options = ["--model.scratch", "--model.name", "itpn_nano", "--model.patch-size", "8", "--data.img-size", "32"]
    short = ["--trainer.max-steps", "1", "--data.batch-size", "2", "--data.num-workers", "0"]
    command = ["train", "classifier_small", "--data.root", str(folder / "images"), *options, *short]
    assert main([*command, "--output-dir", str(folder)]) == 0
    return folder / "images", folder / "classifier_small/default/model.safetensors"


@pytest.mark.parametrize("options", [[], ["--knn"]])
def test_evaluation_with_a_killed_worker(classifier, tmp_path, monkeypatch, capsys, options):
    images, weights = classifier
    kill_a_worker(monkeypatch, itpn.data.evaluation)
    command = ["evaluate", "classifier_small", "--data.root", str(images), "--checkpoint", str(weights), *options]
    assert main([*command, "--data.num-workers", "2", "--out", str(tmp_path / "out")]) == 1
    assert "a worker process that reads was killed (Killed)" in line(capsys)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_leaves_no_folder(classifier, photos, tmp_path, monkeypatch, capsys):
    images, weights = classifier
    monkeypatch.chdir(tmp_path)
    where, files = ["--data.root", str(images)], ["--checkpoint", str(weights)]
    probe = ["--model.checkpoint", str(weights), "--model.freeze"]
    capsys.readouterr()
    for command in (
        ["train", "itpn-pixel_nano", "--data.root", str(photos)],
        ["train", "itpn-pixel_nano", "--data.root", str(photos), "--profile"],
        ["train", "classifier_small", *where, *probe],
        ["evaluate", "classifier_small", *where, *files, "--out", "evaluation"],
        ["evaluate", "classifier_small", *where, *files, "--knn", "--out", "evaluation"],
    ):
        assert main([*command, "--trainer.accelerator", "gpu"]) == 2
        assert "cannot compute on these devices: " in line(capsys)
        assert not list(tmp_path.iterdir()), command


def refuse_to_write(monkeypatch, number: int, name: str) -> None:
    replace_file = Path.replace

    def refuse(path, target):
        if Path(target).name == name:
            raise OSError(number, os.strerror(number))
        return replace_file(path, target)

    monkeypatch.setattr(Path, "replace", refuse)


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EACCES, 1), (errno.EROFS, 1)])
def test_results_that_cannot_be_written(classifier, tmp_path, monkeypatch, capsys, number, code):
    images, weights = classifier
    out = tmp_path / "out"
    for name, command in {
        "evaluation.json": ["evaluate", "classifier_small", "--data.root", images, "--checkpoint", weights],
        "predictions.csv": ["predict", weights, images],
    }.items():
        with monkeypatch.context() as patched:
            refuse_to_write(patched, number, name)
            capsys.readouterr()
            assert main([*map(str, command), "--out", str(out)]) == code
        assert f"--out {out} cannot be written: {os.strerror(number)}" in line(capsys)
        assert not list(out.glob("*.tmp"))
        assert not (out / name).exists()


def test_files_that_are_lost_are_not_corrupt(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(itpn.data.readers, "RETRY_AFTER", ())

    def lost(name, *_):
        raise OSError(errno.EIO, "Input/output error", name)

    monkeypatch.setattr(itpn.data.readers, "read_bounded", lost)
    command = ["train", "itpn-pixel_nano", "--data.root", str(photos), *OPTIONS, "--output-dir", str(tmp_path)]
    assert main(command) == 1
    assert re.match(r"itpn: .*\.png cannot be read: Input/output error; look whether its disk or network", line(capsys))


def test_files_that_vanished_are_not_corrupt(tmp_path):
    skipped = SkippedImages(10)
    skipped.update([(str(tmp_path / "1.jpg"), os.strerror(errno.ENOENT))])
    with pytest.raises(MachineError, match=r"1 of 10 images cannot be read, .*network mount is still there"):
        skipped.check(10)
    with pytest.raises(MachineError, match=r"none of 1 images in a row .*Permission denied; check the permissions of"):
        raise nothing_readable([(str(tmp_path / "1.jpg"), os.strerror(errno.EACCES))])
    (tmp_path / "1.jpg").symlink_to("nothing")  # which never led anywhere
    with pytest.raises(UserError, match="Repair or remove the corrupt files"):
        skipped.check(10)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_prediction_and_evaluation_stop_with_a_line(classifier, tmp_path, monkeypatch, capsys, signum, code):
    images, weights = classifier
    save_whole = itpn.tasks.prediction.save_whole

    def stop(*arguments):
        save_whole(*arguments)
        os.kill(os.getpid(), signum)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(itpn.tasks.prediction, "save_whole", stop)
    assert main(["predict", str(weights), str(images), "--out", str(tmp_path / "out")]) == code
    assert line(capsys) == f"itpn: stopped by {signum.name}; files that were not complete are not kept\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["prediction-0000.png"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_stopped_before_it_begins_says_so(photos, tmp_path, monkeypatch, capsys, signum):
    monkeypatch.setattr(itpn.tasks.pretraining, "find_training_images", lambda *_: os.kill(os.getpid(), signum))
    command = ["train", "itpn-pixel_nano", "--data.root", str(photos), *OPTIONS, "--output-dir", str(tmp_path)]
    assert main(command) == 128 + signum
    assert line(capsys) == f"itpn: stopped by {signum.name}; files that were not complete are not kept\n"


# --- several processes


def run_two(config, tmp_path: Path, behaviour: str, torchrun: bool = False) -> tuple[int, str]:
    """Exit code and what was printed on stderr, when all processes have ended."""
    config.trainer.checkpoint_every_n_steps = 1
    config.data.batch_size = 2
    if not torchrun:
        config.trainer.devices, config.trainer.accelerator = 2, "cpu"
    write_yaml(tmp_path / "run.yaml", "test", config)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if torchrun else []
    command = [sys.executable, *launcher, SCRIPT, "train", tmp_path / "run.yaml"]
    done = subprocess.run(
        command,
        env={**ENV, "MISBEHAVE": behaviour},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    left = subprocess.run(["pgrep", "-f", str(tmp_path / "run.yaml")], capture_output=True, text=True).stdout
    assert left == ""
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("behaviour", "code", "words"),
    [
        ("1 2 die", 1, r"the process of rank 1 was killed \(SIGKILL\), .*; the same command resumes from .*last\.ckpt"),
        ("1 2 mistake", 2, "a mistake of one process"),
        ("0 2 accident", 1, r"an accident of one process; the same command resumes from .*last\.ckpt"),
    ],
)
def test_two_processes_end_together(settings, tmp_path, behaviour, code, words):
    """Those that Lightning starts."""
    found, errors = run_two(settings(), tmp_path, behaviour)
    assert re.fullmatch(f"itpn: {words}\n", errors)
    assert found == code


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("0 2 die", r"another process of this run ended unexpectedly, .*; the same command resumes from .*last\.ckpt"),
        ("1 2 accident", r"an accident of one process; the same command resumes from .*last\.ckpt"),
    ],
)
def test_two_processes_of_torchrun_end_together(settings, tmp_path, behaviour, words):
    """torchrun adds a report of its own, which is no affair of ours."""
    code, errors = run_two(settings(), tmp_path, behaviour, torchrun=True)
    assert code == 1
    ours = [text for text in errors.splitlines() if text.startswith("itpn: ")]
    assert len(ours) == 1
    assert re.fullmatch(f"itpn: {words}", ours[0])
    assert errors.count("Traceback (most recent call last)") == 1
    assert "ChildFailedError" in errors


def test_a_run_says_what_is_kept(settings, monkeypatch):
    """Where nothing is, nothing."""
    config = settings()

    def take_pass(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(loop, "take_pass", take_pass)
    with pytest.raises(MachineError, match=r"^run folder \S+/test/first: Input/output error; [^;]*$"):
        train(replace(config, name="first"), "test")
