"""Nothing of a run is lost, whatever happens to its process or its disk."""

import errno
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from killing import run_killed
from PIL import Image
from safetensors.torch import load_file
from torchrun import run_command

from itpn.checkpoints import io as checkpoint_io
from itpn.cli import main
from itpn.errors import MachineError, RunStopped, UserError
from itpn.system.writing import remove_partial_files
from itpn.tasks.configs import ClassificationConfig, ClassificationDataConfig
from itpn.tasks.evaluation import Validation
from itpn.tasks.recipe_files import parse_settings, read_settings
from itpn.tasks.run import train
from itpn.training import loop, run_state
from itpn.training.checkpointing import Checkpointing
from itpn.training.config import StoredSettings, to_dict, write_yaml
from itpn.training.metrics_file import append_row, complete_row, keep_rows, read_steps
from itpn.training.run_folder import RunFolder
from itpn.training.run_state import CorruptCheckpoint, find_settings, read_state

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Killed(BaseException):
    """As SIGKILL, where no file is half written."""


def raise_killed(*arguments, **options):
    raise Killed


@pytest.fixture
def short(settings):
    """A run of two steps, a checkpoint after each."""

    def make(steps: int = 2, **trainer):
        config = settings(max_steps=steps, **trainer)
        config.trainer.checkpoint_every_n_steps = 1
        return config

    return make


@pytest.fixture
def labelled(photos, tmp_path):
    """A classifier's run of two steps."""
    for i, path in enumerate(sorted(photos.iterdir())):
        folder = tmp_path / "labelled" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)

    def make(steps: int = 2) -> ClassificationConfig:
        config = ClassificationConfig(output_dir=str(tmp_path / "runs"))
        config.model.name, config.model.scratch, config.model.patch_size = "itpn_nano", True, 8
        config.data = ClassificationDataConfig(root=(str(tmp_path / "labelled"),), val_fraction=0.3, img_size=32)
        config.data.batch_size, config.data.num_workers, config.data.mixup, config.data.cutmix = 4, 0, 0.0, 0.0
        config.trainer.max_steps, config.trainer.max_epochs = steps, 100
        config.trainer.checkpoint_every_n_steps = config.trainer.log_every_n_steps = 1
        config.evaluation.every_n_epochs = 100
        return config

    return make


def folder_of(config) -> Path:
    return Path(config.output_dir) / "test" / config.name


def assert_complete(folder: Path, steps: int) -> None:
    """Everything that a run writes is there, and of its last step."""
    state = read_state(folder / "checkpoints/last.ckpt")
    assert state["global_step"] == steps
    weights = load_file(folder / "model.safetensors")
    stored = {name.removeprefix("model."): tensor for name, tensor in state["state_dict"].items()}
    for name, tensor in weights.items():
        assert torch.equal(tensor, stored.get(name, stored.get(name.removeprefix("backbone.")))), name
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["finished"], summary["steps"]) == (True, steps)
    assert summary["metrics"]["loss"] > 0
    assert summary["images_seen"] == 4 * steps
    assert summary["images_per_second"] > 0
    assert summary["duration_seconds"] > 0
    assert read_steps(folder / "metrics.csv") == list(range(1, steps + 1))
    assert read_settings(folder / "config.yaml")[0] == "test"
    best = read_state(folder / "checkpoints/best.ckpt")
    assert best["global_step"] == state["callbacks"]["Checkpointing"]["best_step"]
    pictures = folder / ("predictions" if (folder / "predictions").exists() else "reconstructions")
    assert Image.open(pictures / f"step-{steps:08d}.png").size[0] > 32
    assert not [path for path in folder.rglob("*") if path.suffix in (".tmp", ".corrupt")]


# --- killed at any moment


def kill_everywhere(config, prepare, moments) -> set[int]:
    """Kill runs at moments, and take each up again; returns the steps at which they were taken up."""
    steps = set()
    for moment in moments:
        own = replace(config, name=f"moment-{moment}")
        prepare(own)
        if run_killed(own, moment) == 0:
            break
        last = folder_of(own) / "checkpoints/last.ckpt"
        steps.add(read_state(last)["global_step"] if last.exists() else 0)
        train(own, "test")
        assert_complete(folder_of(own), 2)
        one, other = (load_file(folder / "model.safetensors") for folder in (folder_of(config), folder_of(own)))
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items()), moment
    return steps


def test_killed_at_any_moment_a_run_completes(short):
    config = short()
    train(config, "test")
    assert kill_everywhere(config, lambda own: None, range(1, 1000)) == {0, 1, 2}


def test_killed_at_any_moment_of_its_start_a_run_resumes(short):
    config = short()
    train(config, "test")
    for moment in range(10, 40):  # how many there are before the first checkpoint differs between versions
        begun = folder_of(replace(config, name=f"begun-{moment}"))
        run_killed(replace(config, name=begun.name), moment)
        last = begun / "checkpoints/last.ckpt"
        if last.exists() and read_state(last)["global_step"] == 1:
            break
    else:
        pytest.fail("no moment after the first checkpoint")
    keep_rows(begun / "metrics.csv", lambda step: step <= 1)

    def prepare(own) -> None:
        shutil.copytree(begun, folder_of(own))

    assert 1 in kill_everywhere(config, prepare, range(1, 12))


def test_a_signal_in_the_middle_of_a_checkpoint_is_no_full_disk(tmp_path, monkeypatch):
    """torch raises an error of its own when what it writes to raises one."""

    def write(self, data):
        raise RunStopped(signal.SIGINT)

    monkeypatch.setattr(checkpoint_io._Sink, "write", write)
    with (tmp_path / "last.ckpt").open("wb") as file, pytest.raises(RunStopped):
        checkpoint_io.save_to(file, {"weight": torch.zeros(3)})


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_in_the_last_step_leaves_a_complete_run(short, monkeypatch, signum):
    def take_pass(run, *args, original=loop.take_pass):
        if run.step == 1:
            os.kill(os.getpid(), signum)
        return original(run, *args)

    monkeypatch.setattr(loop, "take_pass", take_pass)
    assert_complete(train(short(), "test"), 2)


def test_a_run_under_nohup_outlives_its_terminal(short, monkeypatch):
    """As under nohup."""

    def take_pass(*args, original=loop.take_pass):
        os.kill(os.getpid(), signal.SIGHUP)
        return original(*args)

    monkeypatch.setattr(loop, "take_pass", take_pass)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert_complete(train(short(), "test"), 2)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_stops_a_run(settings, tmp_path):
    """Every process that it started gets SIGHUP, and nothing can be printed any more."""
    config = settings(max_steps=10**6)
    config.data.num_workers = 2
    write_yaml(tmp_path / "run.yaml", "test", config)
    process, terminal = pty.fork()
    if process == 0:
        os.execve(sys.executable, [sys.executable, "-m", "itpn", "train", str(tmp_path / "run.yaml")], ENV)
    shown = b""
    while b"loss" not in shown:
        shown += os.read(terminal, 2**16)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGHUP
    assert read_state(folder_of(config) / "checkpoints/last.ckpt")["global_step"] > 0
    assert json.loads((folder_of(config) / "summary.json").read_text())["finished"] is False


def test_a_signal_in_the_final_evaluation_leaves_a_complete_run(labelled, monkeypatch):
    def evaluate(self, fabric, original=Validation.evaluate):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, fabric)

    monkeypatch.setattr(Validation, "evaluate", evaluate)
    folder = train(labelled(), "test")
    assert "val_top1" in json.loads((folder / "summary.json").read_text())["metrics"]
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize("kind", ["short", "labelled"])
def test_a_run_killed_after_its_last_checkpoint_gets_its_files(request, monkeypatch, capsys, kind):
    """The same as those of a run that was not killed."""
    config = request.getfixturevalue(kind)()
    straight = train(replace(config, name="straight"), "test")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish", raise_killed)
        with pytest.raises(Killed):
            train(config, "test")
    folder = folder_of(config)
    assert not (folder / "model.safetensors").exists()
    capsys.readouterr()
    train(config, "test")
    said = " ".join(capsys.readouterr().out.split())
    assert "complete at step 2" in said
    assert "writing the weights and summary it lacked" in said
    if kind == "short":
        assert_complete(folder, 2)
    one, other = (load_file(run / "model.safetensors") for run in (straight, folder))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    one, other = (json.loads((run / "summary.json").read_text()) for run in (straight, folder))
    assert one.keys() == other.keys()
    measured = {"name", "images_per_second", "data_wait_fraction", "duration_seconds", "peak_memory_gb", "metrics"}
    assert {name: one[name] for name in one.keys() - measured} == {
        name: other[name] for name in other.keys() - measured
    }
    for name in one["metrics"].keys() - measured:
        assert one["metrics"][name] == other["metrics"][name]

    before = (folder / "summary.json").read_bytes(), (folder / "model.safetensors").stat()
    train(config, "test")
    assert before == ((folder / "summary.json").read_bytes(), (folder / "model.safetensors").stat())
    assert "it lacked" not in capsys.readouterr().out


def test_files_of_an_earlier_length_are_replaced(short, monkeypatch):
    folder = train(short(2), "test")
    earlier = (folder / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish", raise_killed)
        with pytest.raises(Killed):
            train(short(3), "test")
    assert (folder / "model.safetensors").read_bytes() == earlier
    train(short(3), "test")
    assert_complete(folder, 3)
    for content in (earlier, b"", earlier[:1000]):  # however they came there
        (folder / "model.safetensors").write_bytes(content)
        train(short(3), "test")
        assert_complete(folder, 3)


def test_what_follows_from_the_last_checkpoint_is_made_again(labelled, train_until, capsys):
    """A run that is ended where it was stopped has neither been evaluated nor drawn there."""
    train_until(labelled(4), 3)
    folder = train(labelled(3), "test")
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert metrics["val_top1"] is not None
    assert metrics["loss"] > 0
    assert (folder / "predictions/step-00000003.png").exists()
    *_, last = (folder / "metrics.csv").read_text().splitlines()
    assert last.startswith("3,")
    assert read_steps(folder / "metrics.csv") == [1, 2, 3]
    assert f"{metrics['val_top1']}" in last.split(",")
    capsys.readouterr()
    train(labelled(3), "test")
    assert "it lacked" not in capsys.readouterr().out
    straight = train(replace(labelled(3), name="straight"), "test")
    ours = json.loads((straight / "summary.json").read_text())["metrics"]
    assert metrics.keys() == ours.keys()


def test_several_processes_complete_a_run_as_one_does(settings, tmp_path):
    config = settings(max_steps=2)
    config.data.batch_size = 2
    write_yaml(tmp_path / "run.yaml", "test", config)
    folder = folder_of(config)
    for files in ((), ("model.safetensors", "summary.json", "checkpoints/best.ckpt")):
        for name in files:
            (folder / name).unlink()
        said = run_command("train", tmp_path / "run.yaml", folder=tmp_path)
        assert said.count("it lacked") == (1 if files else 0)
        assert_complete(folder, 2)


def test_a_run_continues_when_nobody_reads_what_it_prints(short, tmp_path, monkeypatch, capsys):
    """As of `itpn train ... | head -1`."""
    write_yaml(tmp_path / "run.yaml", "test", short())
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert main(["train", str(tmp_path / "run.yaml")]) == 0
    assert_complete(folder_of(short()), 2)
    assert capsys.readouterr().err == (
        "nobody reads standard output any more: the command continues; see its files for the results\n"
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_run_continues_when_its_log_is_full(short, tmp_path, monkeypatch, capsys):
    write_yaml(tmp_path / "run.yaml", "test", short())
    with open("/dev/full", "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert main(["train", str(tmp_path / "run.yaml")]) == 0
    assert_complete(folder_of(short()), 2)
    assert capsys.readouterr().err == (
        "standard output cannot be written (No space left on device): the command continues; see its files for the "
        "results\n"
    )


# --- checkpoints that cannot be read


class FailingFile(io.FileIO):
    """Fails where it is read behind its middle, as a disk or a network does."""

    def readinto(self, buffer):
        if self.tell() > os.fstat(self.fileno()).st_size // 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().readinto(buffer)


def fail_to_read(monkeypatch, problem) -> str:
    """Let checkpoints not be read; returns what is to be said of it."""
    if problem == "EIO":
        original = Path.open

        def open_failing(self, mode="r", *args, **options):
            if self.suffix == ".ckpt" and mode == "rb":
                return io.BufferedReader(FailingFile(self, "rb"))
            return original(self, mode, *args, **options)

        monkeypatch.setattr(Path, "open", open_failing)
        return "Input/output error"

    def load(*arguments, **options):
        raise problem

    monkeypatch.setattr(run_state.torch, "load", load)
    return getattr(problem, "strerror", None) or str(problem) or type(problem).__name__


PROBLEMS = {
    "in the middle": "EIO",
    "permission": PermissionError(errno.EACCES, "Permission denied"),
    "stale": OSError(errno.ESTALE, "Stale file handle"),
    "memory": MemoryError(),
    "map": RuntimeError("unable to mmap 99 bytes from file </x>: Cannot allocate memory (12)"),
}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_a_read_error_is_no_corruption(short, monkeypatch, capsys, problem):
    folder = train(short(2), "test")
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        reason = fail_to_read(patch, problem)
        with pytest.raises(MachineError, match=r"last\.ckpt cannot be read: ") as caught:
            train(short(3), "test")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    capsys.readouterr()
    train(short(3), "test")
    assert "step 2" in capsys.readouterr().out
    assert_complete(folder, 3)


def drop_rights(*command) -> subprocess.CompletedProcess:
    """Run a command of root's that may not read everything."""
    lose = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    return subprocess.run([*lose, *command], env=ENV, capture_output=True, text=True)


@pytest.mark.parametrize("locked", ["checkpoints/last.ckpt", "checkpoints"])
def test_no_permission(short, tmp_path, locked):
    if os.geteuid() == 0 and (not shutil.which("setpriv") or drop_rights("true").returncode):
        pytest.skip("root reads everything, and cannot drop that right here")
    config = short(2)
    folder = train(config, "test")
    config.trainer.max_steps = 3
    write_yaml(tmp_path / "run.yaml", "test", config)
    (folder / locked).chmod(0)
    command = [sys.executable, "-m", "itpn", "train", tmp_path / "run.yaml"]
    done = (
        drop_rights(*command) if os.geteuid() == 0 else subprocess.run(command, env=ENV, capture_output=True, text=True)
    )
    (folder / locked).chmod(0o755)
    assert done.returncode == 1
    assert done.stderr.startswith("itpn: ")
    assert done.stderr.count("\n") == 1
    assert str(folder / locked) in done.stderr
    assert "Permission denied" in done.stderr
    assert {path.name for path in (folder / "checkpoints").iterdir()} >= {"last.ckpt", "best.ckpt"}


def test_corrupt_checkpoints_are_never_passed_over_for_step_0(short, capsys):
    folder = train(short(2), "test")
    checkpoints = folder / "checkpoints"
    names = sorted(path.name for path in checkpoints.iterdir())
    for path in checkpoints.iterdir():
        content = path.read_bytes()
        path.unlink()  # another name may be of the same file
        path.write_bytes(content[:-100])
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of the checkpoints .* can be read: last\.ckpt is corrupt"):
            train(short(3), "test")
        assert sorted(path.name for path in checkpoints.iterdir()) == names
    for path in checkpoints.iterdir():
        path.rename(path.with_suffix(".corrupt"))
    with pytest.raises(UserError, match="none of the checkpoints"):
        train(short(3), "test")


def test_a_corrupt_file_is_told_from_others(tmp_path):
    path = tmp_path / "a.ckpt"
    parts = {"epoch": 0, "loops": {}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": []}
    torch.save({**parts, "global_step": 1, "state_dict": {"x": torch.arange(1000)}}, path)
    whole = path.read_bytes()
    assert read_state(path)["global_step"] == 1
    corrupt = [b"", b"text", whole[:-1], whole[: len(whole) // 2], whole[1:], bytes(len(whole))]
    corrupt += [whole.replace(b"global_step", b"global_stop"), whole[:2000] + b"\x01" + whole[2001:]]
    for content in corrupt:
        path.write_bytes(content)
        with pytest.raises(CorruptCheckpoint):
            read_state(path)
    torch.save({"other": 1}, path)
    with pytest.raises(CorruptCheckpoint):
        read_state(path)
    for other in (tmp_path, tmp_path / "none.ckpt"):
        with pytest.raises(MachineError, match="cannot be read"):
            read_state(other)


ODD = [
    *[("state_dict", odd, "its state_dict is a (list|str)") for odd in ([], "x")],
    ("state_dict", {"a": 1}, "its weight a is a int"),
    ("state_dict", {"a": torch.ones(1)}, "RuntimeError: Error.*in loading state_dict"),
    ("global_step", "x", "its global_step is a str"),
    ("global_step", -1, "its global_step is -1"),
    ("loops", None, "its loops is a NoneType"),
    ("loops", {}, "KeyError: 'fit_loop'"),
    ("optimizer_states", {}, "its optimizer_states is a dict"),
    ("optimizer_states", ["x"], "AttributeError"),
    ("lr_schedulers", [{}], "KeyError"),
    ("callbacks", {"Monitor": "x"}, "TypeError"),
    ("callbacks", {"Checkpointing": {"best_score": "x"}}, "ValueError"),
    ("itpn", 3, "its settings are none"),
    ("itpn_loader", {"epoch": 0, "batch": []}, "TypeError"),
    ("itpn_processes", None, "was trained by None processes"),
]


def test_a_checkpoint_with_odd_keys_stops_the_run(short):
    """Its bytes are whole, but no run can be restored from it."""
    folder = train(short(2), "test")
    last = folder / "checkpoints/last.ckpt"
    sound = torch.load(last, weights_only=True)
    for path in last.parent.iterdir():
        path.unlink()
    for key, odd, reason in ODD:
        torch.save({**sound, key: odd}, last)
        before = last.read_bytes()
        with pytest.raises(UserError, match=reason) as caught:
            train(short(3), "test")
        assert "\n" not in str(caught.value)
        assert "corrupt" in str(caught.value) or key == "itpn_processes"
        assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]
        assert last.read_bytes() == before
    torch.save(sound, last)
    assert_complete(train(short(3), "test"), 3)


def test_settings_of_odd_checkpoints(short):
    settings = {"recipe": "test", "task": "pretraining", "config": to_dict(short())}
    assert find_settings({"itpn": settings}) == StoredSettings("test", "pretraining", to_dict(short()))
    assert find_settings({}) is None  # of another program, or of an early version
    for odd in (3, [], {**settings, "task": []}, {**settings, "config": [1]}):
        with pytest.raises(CorruptCheckpoint, match="its settings are none"):
            find_settings({"itpn": odd})
    with pytest.raises(CorruptCheckpoint, match="KeyError: 'recipe'"):
        find_settings({"itpn": {"task": "pretraining", "config": {}}})
    for wrong, reason in (({"data": "x"}, "last.ckpt is not a run's"), ({"newer": 1}, "unknown setting newer")):
        with pytest.raises(UserError, match=reason):
            parse_settings(Path("last.ckpt"), StoredSettings("test", "pretraining", wrong))


@pytest.mark.parametrize("linked", ["checkpoints", "checkpoints/last.ckpt"])
def test_a_link_to_a_disk_that_is_not_mounted(short, tmp_path, linked):
    folder = train(short(2), "test")
    disk = tmp_path / "disk"
    (folder / linked).rename(disk)
    (folder / linked).symlink_to(disk)
    disk.rename(tmp_path / "unmounted")
    with pytest.raises(MachineError, match="cannot be read: No such file"):
        train(short(3), "test")
    (tmp_path / "unmounted").rename(disk)
    assert_complete(train(short(3), "test"), 3)


def test_a_run_without_a_checkpoint_yet_says_so(short, monkeypatch, capsys):
    config = short(3)
    config.trainer.checkpoint_every_n_steps = 100
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointing, "save", raise_killed)  # of the last step: with rows, and without a checkpoint
        with pytest.raises(Killed):
            train(config, "test")
    assert read_steps(folder_of(config) / "metrics.csv") == [1, 2, 3]
    assert "starting at step 0" not in capsys.readouterr().out
    train(config, "test")
    assert "was stopped before its first checkpoint: starting at step 0" in capsys.readouterr().out
    assert_complete(folder_of(config), 3)


@pytest.mark.parametrize("finished", [True, False])
def test_checkpoints_that_have_gone_stop_the_run(short, finished):
    folder = train(short(3), "test")
    shutil.rmtree(folder / "checkpoints")
    if not finished:
        (folder / "summary.json").unlink()
    rows = (folder / "metrics.csv").read_bytes()
    with pytest.raises(MachineError, match=r"there are no checkpoints in .* not mounted"):
        train(short(4), "test")
    assert (folder / "metrics.csv").read_bytes() == rows
    shutil.rmtree(folder)
    assert_complete(train(short(3), "test"), 3)


# --- files that cannot be written


def fail_to_write(monkeypatch, pattern: str, after: int) -> None:
    """Let the disk be full when a file of that name is written for the so manieth time, after some bytes."""
    original, count = Path.open, 0

    class Full(io.FileIO):
        def write(self, data):
            half = memoryview(data).cast("B")[: len(data) // 2]
            super().write(half)
            raise FULL

    def open_full(self, mode="r", *arguments, **options):
        nonlocal count
        if self.match(pattern) and set(mode) & set("wa"):
            count += 1
            if count > after:
                return io.BufferedWriter(Full(self, mode.replace("b", "")))
        return original(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_full)


@pytest.mark.parametrize(
    ("pattern", "after"),
    [
        ("config.yaml*", 0),
        ("step-00000000.png*", 0),
        ("step-00000002.png*", 0),
        ("metrics.csv*", 0),
        ("metrics.csv*", 1),
        ("last.ckpt*", 0),
        ("last.ckpt*", 1),
        ("model.safetensors*", 0),
        ("summary.json*", 0),
    ],
)
def test_a_full_disk_is_one_line_and_the_run_resumes(short, tmp_path, monkeypatch, capsys, pattern, after):
    config = short()
    write_yaml(tmp_path / "run.yaml", "test", config)
    folder = folder_of(config)
    with monkeypatch.context() as patch:
        fail_to_write(patch, pattern, after)
        assert main(["train", str(tmp_path / "run.yaml")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"itpn: the disk is full: {folder}/")
    assert "cannot be written: No space left on device" in error
    step = read_state(folder / "checkpoints/last.ckpt")["global_step"] if any(folder.glob("*/last.ckpt")) else 0
    kept = f"is of step {step}: once there is room, the same command resumes from {folder}/checkpoints/last.ckpt"
    assert error.endswith(
        f"{kept if step else 'is yet to come: once there is room, the same command starts at step 0'}\n"
    )
    assert not list(folder.rglob("*.tmp"))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    assert_complete(folder, 2)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EROFS, errno.ESTALE, errno.EDQUOT])
def test_other_write_errors(short, monkeypatch, code):
    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(MachineError, match=f"cannot be written: {os.strerror(code)}; the last "):
        train(short(), "test")


def test_an_event_file_that_cannot_be_written(short, tmp_path):
    """A real error, in TensorBoard's own thread: no file may grow over some size."""
    config = short()
    config.trainer.log_every_n_steps = 1
    write_yaml(tmp_path / "run.yaml", "test", config)
    script = (
        "import resource, sys; from itpn.cli import main; from itpn.training.loggers import tensorboard as e; "
        "inner = e.EventFiles.log_metrics\n"
        "def log(self, *a, **k):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))\n"
        "    inner(self, *a, **k); self.flush()\n"
        "e.EventFiles.log_metrics = log\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "train", tmp_path / "run.yaml"], env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"itpn: {folder_of(config)}/tensorboard cannot be written: File too large; "
        "the last complete checkpoint is yet to come: once that is mended, the same command starts at step 0\n"
    )
    assert_complete(train(config, "test"), 2)


def test_a_disk_that_is_full(tmp_path, settings, capfd):
    """A real one, of every size, until there is room for the run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root mounts a small disk, where it may")
    config = settings(max_steps=2)
    config.trainer.checkpoint_every_n_steps = 1
    config.output_dir = str(disk)
    write_yaml(tmp_path / "run.yaml", "test", config)
    reasons = []
    try:
        for kilobytes in (64, 20_000, 200_000):
            subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", disk], check=True)
            code = main(["train", str(tmp_path / "run.yaml")])
            assert not list(disk.rglob("*.tmp"))
            if code == 0:
                break
            assert code == 1
            error = capfd.readouterr().err
            assert error.count("\n") == 1, error
            assert "No space left on device" in error
            reasons.append(error)
        assert len(reasons) == 2
        assert_complete(folder_of(config), 2)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_checkpoints_do_not_pass_through_the_folder_of_temporary_files(short, monkeypatch, tmp_path):
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert_complete(train(short(), "test"), 2)


def test_what_killed_processes_left_is_removed(short):
    folder = train(short(2), "test")
    names = ["config.yaml", "metrics.csv", "model.safetensors", "checkpoints/last.ckpt", "reconstructions/step-1.png"]
    for name in names:
        (folder / f"{name}.tmp").write_bytes(b"half")
    train(short(2), "test")
    assert_complete(folder, 2)


# --- settings, rows and the best checkpoint


@pytest.mark.parametrize("content", [b"", b"\0" * 99, b"recipe: test\ntask: pret", b"\xff\xfe\x00", b"a: [", b"- 1"])
@pytest.mark.parametrize("by", ["recipe", "config.yaml"])
def test_settings_come_back_from_the_checkpoint(short, capsys, content, by):
    config = short(2)
    folder = train(config, "test")
    whole = (folder / "config.yaml").read_bytes()
    (folder / "config.yaml").write_bytes(content)
    if by == "recipe":
        train(config, "test")
    else:
        assert main(["train", str(folder / "config.yaml")]) == 0
    assert "config.yaml is corrupt: its settings are taken from" in " ".join(capsys.readouterr().err.split())
    assert (folder / "config.yaml").read_bytes() == whole
    (folder / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match="holds a run with --seed 0, not 1"):
        train(replace(config, seed=1), "test")


def test_odd_files_beside_the_checkpoints(short):
    """A summary and rows that are none, of a run whose checkpoints are whole."""
    folder = train(short(2), "test")
    for steps, content in enumerate((b"", b"[1, 2]", b"[" * 10**5), start=3):
        (folder / "summary.json").write_bytes(content)
        train(short(steps), "test")
        assert json.loads((folder / "summary.json").read_text())["steps"] == steps
    for content in (b"", b"[1, 2]"):
        steps += 1
        (folder / "metrics.csv").write_bytes(content)
        train(short(steps), "test")
        assert read_steps(folder / "metrics.csv") == [steps]


NAMES = ["metrics.csv", "summary.json", "config.yaml", "model.safetensors", ".lock", "checkpoints/last.ckpt"]


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "new"])
@pytest.mark.parametrize("name", [*NAMES, "checkpoints/best.ckpt", "checkpoints", "reconstructions", "tensorboard"])
def test_entries_of_another_kind(short, tmp_path, capsys, name, complete):
    """Pipes would be waited for, and what else cannot be opened would be named by its folder alone."""
    config = short()
    folder = folder_of(config)
    write_yaml(tmp_path / "run.yaml", "test", config)
    if complete:
        train(config, "test")
    entry = folder / name
    entry.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(entry, ignore_errors=True)
    entry.unlink(missing_ok=True)
    kinds = {"file": Path.touch} if "." not in name else {"pipe": os.mkfifo, "folder": os.mkdir}
    for kind, make in kinds.items():
        make(entry)
        capsys.readouterr()
        assert main(["train", str(tmp_path / "run.yaml")]) == 2
        wanted = "folder" if kind == "file" else "file"
        assert capsys.readouterr().err == (
            f"itpn: {entry} is a {kind}, where a run has a {wanted}: move it away, or choose another --name\n"
        )
        (entry.rmdir if kind == "folder" else entry.unlink)()


def test_folders_are_no_partial_files(tmp_path):
    (tmp_path / "mine.tmp").mkdir()
    (tmp_path / "mine.tmp" / "kept").touch()
    (tmp_path / "half.tmp").touch()
    (tmp_path / "link.tmp").symlink_to(tmp_path / "nowhere")
    remove_partial_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.tmp"]
    assert (tmp_path / "mine.tmp" / "kept").exists()


@pytest.mark.parametrize("kind", ["a file", "below a file"])
def test_an_output_folder_that_can_be_none(short, tmp_path, capsys, kind):
    (tmp_path / "file").touch()
    config = replace(short(), output_dir=str(tmp_path / ("file" if kind == "a file" else "file/below")))
    write_yaml(tmp_path / "run.yaml", "test", config)
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"itpn: run folder {config.output_dir}/test/default (see --output-dir) cannot be written")
    assert error.count("\n") == 1


def test_corrupt_settings_of_a_run_without_checkpoints(short, tmp_path):
    config = short(2)
    folder_of(config).mkdir(parents=True)
    (folder_of(config) / "config.yaml").write_bytes(b"")
    assert_complete(train(config, "test"), 2)


def write_rows(path: Path, count: int) -> None:
    rows = "".join(f"{step},{step // 6},{1 / step},,0.001,12.5,0.25\r\n" for step in range(1, count + 1))
    path.write_text("step,epoch,loss,val_top1,lr,images_per_second,data_wait_fraction\r\n" + rows, newline="")


def test_rows_are_kept_at_once(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    write_rows(path, 10_000)
    before = path.read_bytes().splitlines()
    times = []
    for _ in range(3):
        begin = time.process_time()
        keep_rows(path, lambda step: step <= 9_900)
        times.append(time.process_time() - begin)
    assert path.read_bytes().splitlines() == before[:9_901]
    assert min(times) < 0.1
    monkeypatch.setattr(Path, "replace", raise_killed)
    with pytest.raises(Killed):
        keep_rows(path, lambda step: step <= 10)
    assert len(read_steps(path)) == 9_900


@pytest.mark.parametrize(
    ("end", "steps"),
    [
        (b"4,0,0.2", [1, 2, 3]),
        (b"4,0,0.25,,0.001,12.5,0.2", [1, 2, 3]),  # cut off in its last number
        (b"4,0,0.25,,0.001\r\n", [1, 2, 3]),
        (b"\0" * 500, [1, 2, 3]),
        (b"\0\0\0\r\n", [1, 2, 3]),
        (b"4,0,0.25,,0.001,12.5,0.25\r\n", [1, 2, 3, 4]),
        (b"\xff\xfe\r\n", [1, 2, 3]),
    ],
)
def test_a_row_that_was_cut_off_is_dropped(tmp_path, end, steps):
    path = tmp_path / "metrics.csv"
    write_rows(path, 3)
    with path.open("ab") as file:
        file.write(end)
    keep_rows(path, lambda step: step <= 10)
    assert read_steps(path) == steps
    append_row(path, {"step": 11, "epoch": 1, "loss": 0.5, "new": 1.0})
    append_row(path, {"step": 12, "loss": 0.25, "epoch": 1})
    complete_row(path, {"step": 12, "val_top1": 0.75})
    assert read_steps(path) == [*steps, 11, 12]
    assert path.read_text().splitlines()[0].endswith(",new")
    assert path.read_text().splitlines()[-1] == "12,1,0.25,0.75,,,,"


@pytest.mark.parametrize("content", [b"", b"step,epo", b"\0" * 100, b"other,file\r\n1,2\r\n"])
def test_a_file_without_rows_is_begun_anew(tmp_path, content):
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    keep_rows(path, lambda step: True)
    append_row(path, {"step": 1, "loss": 0.5})
    assert path.read_bytes() == b"step,loss\r\n1,0.5\r\n"


def test_a_row_that_cannot_be_written_leaves_no_part(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    write_rows(path, 3)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        fail_to_write(patch, "metrics.csv", 0)
        with pytest.raises(OSError, match="No space left"):
            append_row(path, {"step": 4, "epoch": 0, "loss": 0.123456789})
    assert path.read_bytes() == before


def test_best_is_as_good_as_the_best_score(short, monkeypatch):
    """Whatever comes between a checkpoint and its second name."""
    config = short(2)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointing, "score", lambda self: float(self.run.step))
        patch.setattr(RunFolder, "put_best", raise_killed)
        with pytest.raises(Killed):
            train(config, "test")
    best = folder_of(config) / "checkpoints/best.ckpt"
    assert not best.exists()
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointing, "score", lambda self: -float(self.run.step))
        train(config, "test")
    assert read_state(best)["global_step"] == 1
    for corrupt in (False, True):
        best.unlink()  # the step before the last is of the same bytes
        if corrupt:
            best.write_bytes(b"")
        train(config, "test")
        assert read_state(best)["global_step"] == 1


def test_without_hard_links(short, monkeypatch):
    def link(*arguments, **options):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    folder = train(short(3, keep_checkpoints=2), "test")
    assert_complete(folder, 3)
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "step-00000002.ckpt", "best.ckpt"}
