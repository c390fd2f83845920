"""A run that was stopped and taken up again ends with the very bits of one that was not."""

import csv
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from itpn.errors import MachineError, RunStopped, UserError
from itpn.tasks.configs import PretrainingConfig
from itpn.tasks.pretraining.module import PretrainingTask
from itpn.tasks.run import train
from itpn.training.checkpointing import Checkpointing


def stop_at(monkeypatch, step: int, signum: int = signal.SIGINT) -> None:
    """Send this process a signal in the middle of a pass (counted over the whole run)."""
    original = PretrainingTask.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.fit_loop.epoch_loop.total_batch_idx == step:
            os.kill(os.getpid(), signum)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(PretrainingTask, "training_step", training_step)


def assert_same_run(one: Path, other: Path) -> None:
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    states = [torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (one, other)]
    moments = [state["optimizer_states"][0]["state"] for state in states]
    for index, moment in moments[0].items():
        assert torch.equal(moment["exp_avg_sq"], moments[1][index]["exp_avg_sq"])
    assert states[0]["global_step"] == states[1]["global_step"]
    assert states[0]["callbacks"]["Monitor"] == states[1]["callbacks"]["Monitor"]


def losses(run: Path) -> list[tuple[str, str, str]]:
    with (run / "metrics.csv").open() as file:
        return [(row["step"], row["loss"], row["lr"]) for row in csv.DictReader(file)]


def run_straight_and_stopped(config: PretrainingConfig, monkeypatch, step: int) -> tuple[Path, Path]:
    """The folders of two runs: one in one go, one stopped in mid-pass and taken up again."""
    straight = train(replace(config, name="straight"), "test")
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(RunStopped):
            train(replace(config, name="stopped"), "test")
    return straight, train(replace(config, name="stopped"), "test")


@pytest.mark.parametrize(
    ("workers", "accumulate", "stop"),
    [(0, 1, 2), (0, 1, 5), (0, 1, 6), (0, 1, 11), (2, 1, 8), (0, 2, 2), (0, 2, 3), (0, 4, 7)],
    ids=lambda value: str(value),
)
def test_stopped_and_resumed_equals_uninterrupted(settings, monkeypatch, workers, accumulate, stop):
    config = settings(accumulate_grad_batches=accumulate)
    config.data.num_workers = workers
    straight, resumed = run_straight_and_stopped(config, monkeypatch, stop)
    assert_same_run(straight, resumed)
    assert losses(straight) == losses(resumed)
    assert len(losses(straight)) == 3 * -(-6 // accumulate)


def test_stopped_twice_and_with_other_workers(settings, monkeypatch):
    config = settings()
    straight = train(replace(config, name="straight"), "test")
    for stop, workers in ((4, 0), (13, 2)):
        config.data.num_workers = workers
        with monkeypatch.context() as patch:
            stop_at(patch, stop, signal.SIGTERM)
            with pytest.raises(RunStopped):
                train(replace(config, name="stopped"), "test")
    assert_same_run(straight, train(replace(config, name="stopped"), "test"))


def test_a_killed_run_goes_on_from_its_last_checkpoint(settings, monkeypatch):
    """As after kill -9: what was done since the checkpoint is done again."""
    config = settings()
    config.trainer.checkpoint_every_n_steps = 4
    straight = train(replace(config, name="straight"), "test")

    class Killed(BaseException):
        pass

    def training_step(self, batch, batch_idx, original=PretrainingTask.training_step):
        if self.trainer.global_step == 10:
            raise Killed
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainingTask, "training_step", training_step)
        with pytest.raises(Killed):
            train(replace(config, name="killed"), "test")
    folder = Path(config.output_dir) / "test/killed"
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 8
    resumed = train(replace(config, name="killed"), "test")
    assert_same_run(straight, resumed)
    assert losses(straight) == losses(resumed)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(settings, monkeypatch, damage, capsys):
    config = settings()
    config.trainer.checkpoint_every_n_steps = 4
    straight = train(replace(config, name="straight"), "test")
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        with pytest.raises(RunStopped):
            train(replace(config, name="stopped"), "test")
    checkpoints = Path(config.output_dir) / "test/stopped/checkpoints"
    last = checkpoints / "last.ckpt"
    data = bytearray(last.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    last.write_bytes(data[: {"truncated": len(data) // 2, "flipped": len(data), "empty": 0}[damage]])
    (checkpoints / "unfinished.tmp").write_bytes(b"half-written")

    resumed = train(replace(config, name="stopped"), "test")
    assert "last.ckpt is damaged" in capsys.readouterr().err
    assert_same_run(straight, resumed)
    assert not (checkpoints / "unfinished.tmp").exists()
    assert (checkpoints / "last.damaged").exists()
    for path in checkpoints.glob("*.ckpt"):  # the one that was fallen back to was not overwritten with the damaged one
        torch.load(path, weights_only=True)


def test_the_best_checkpoint_is_the_last_resort(settings, capsys):
    config = settings(keep_checkpoints=1)
    config.trainer.checkpoint_every_n_steps = 4
    folder = train(config, "test")
    last, best = folder / "checkpoints/last.ckpt", folder / "checkpoints/best.ckpt"
    whole = best.read_bytes()
    last.unlink()
    best.write_bytes(whole)
    last.write_bytes(whole[:1000])
    train(config, "test")
    assert "is damaged" in capsys.readouterr().err
    last.write_bytes(whole[:1000])
    best.write_bytes(whole[:1000])
    for path in (folder / "checkpoints").glob("step-*"):
        path.unlink()
    with pytest.raises(UserError, match="none of the checkpoints"):
        train(config, "test")


def test_a_second_interrupt_does_not_wait(settings, monkeypatch):
    def training_step(self, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(PretrainingTask, "training_step", training_step)
    before = signal.getsignal(signal.SIGINT)  # in a shell's background it is ignored
    with pytest.raises(RunStopped):
        train(settings(), "test")
    assert signal.getsignal(signal.SIGINT) is before


def test_only_the_newest_checkpoints_are_kept(settings):
    config = settings(keep_checkpoints=2)
    config.trainer.checkpoint_every_n_steps = 4
    folder = train(config, "test")
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "best.ckpt", "step-00000016.ckpt"}


def test_the_last_checkpoint_only_appears_whole(settings, monkeypatch):
    """A crash while a checkpoint is written leaves the one before under its name."""
    config = settings()
    config.trainer.checkpoint_every_n_steps = 4
    original = Checkpointing.save

    def save(self, trainer, batch):
        if trainer.global_step == 8:
            trainer.save_checkpoint = lambda path: (_ for _ in ()).throw(OSError("disk full"))
        original(self, trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointing, "save", save)
        with pytest.raises(MachineError, match="disk full"):
            train(config, "test")
    last = Path(config.output_dir) / "test/default/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4


def test_a_finished_run_is_left_alone_and_can_be_prolonged(settings, capsys):
    config = settings()
    folder = train(config, "test")
    before = (folder / "model.safetensors").read_bytes()
    train(config, "test")
    assert "complete at step 18" in " ".join(capsys.readouterr().out.split())
    assert (folder / "model.safetensors").read_bytes() == before
    config.trainer.max_epochs = 4
    train(config, "test")
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 24


def test_a_run_is_prolonged_more_than_once(settings):
    config = settings()
    for epochs in (1, 2, 3, 5):
        config.trainer.max_epochs = epochs
        folder = train(config, "test")
    assert [step for step, *_ in losses(folder)] == [str(step) for step in range(1, 31)]
    with (folder / "metrics.csv").open() as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == [step // 6 for step in range(30)]
