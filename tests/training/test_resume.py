"""A run that was stopped and taken up again ends with the very bits of one that was not."""

import csv
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from resuming import assert_same_run, losses, resume_without_start, run_straight_and_stopped, stop_at

from itpn.errors import MachineError, RunStopped, UserError
from itpn.tasks.run import train
from itpn.training import checkpointing, loop


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


@pytest.mark.parametrize("how", ["corrupt", "gone"])
def test_a_begun_run_needs_its_start_weights_no_more(settings, tmp_path, train_until, capsys, how):
    weights = train(settings(max_steps=1), "first") / "model.safetensors"
    straight, resumed = resume_without_start(settings(), weights, train_until, how)
    assert_same_run(straight, resumed)
    assert losses(straight) == losses(resumed)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count(f"starting from the weights of {weights}") == 2
    assert "resuming from" in said
    # another network is another run, whatever file it begins with
    config = replace(settings(), name="stopped")
    config.model = replace(config.model, checkpoint=str(resumed / "model.safetensors"), name="itpn_tiny")
    with pytest.raises(UserError, match=r"holds a run with --model\.name itpn_nano, not itpn_tiny"):
        train(config, "test")


def test_a_killed_run_resumes_from_its_last_checkpoint(settings, monkeypatch):
    """As after kill -9: what was done since the checkpoint is done again."""
    config = settings()
    config.trainer.checkpoint_every_n_steps = 4
    straight = train(replace(config, name="straight"), "test")

    class Killed(BaseException):
        pass

    def take_pass(run, *args, original=loop.take_pass):
        if run.step == 10:
            raise Killed
        return original(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_pass", take_pass)
        with pytest.raises(Killed):
            train(replace(config, name="killed"), "test")
    folder = Path(config.output_dir) / "test/killed"
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 8
    resumed = train(replace(config, name="killed"), "test")
    assert_same_run(straight, resumed)
    assert losses(straight) == losses(resumed)


@pytest.mark.parametrize(
    ("damage", "started"), [("truncated", False), ("flipped", False), ("empty", False), ("flipped", True)]
)
def test_a_corrupt_last_checkpoint_falls_back_to_the_one_before(settings, monkeypatch, damage, started, capsys):
    config = settings()
    if started:
        config.model.checkpoint = str(train(settings(max_steps=1), "first") / "model.safetensors")
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
    assert "last.ckpt is corrupt" in capsys.readouterr().err
    assert_same_run(straight, resumed)
    assert not (checkpoints / "unfinished.tmp").exists()
    assert (checkpoints / "last.corrupt").exists()
    for path in checkpoints.glob("*.ckpt"):  # the one that was fallen back to was not overwritten with the corrupt one
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
    assert "is corrupt" in capsys.readouterr().err
    last.write_bytes(whole[:1000])
    best.write_bytes(whole[:1000])
    for path in (folder / "checkpoints").glob("step-*"):
        path.unlink()
    with pytest.raises(UserError, match="none of the checkpoints"):
        train(config, "test")


def test_a_second_interrupt_does_not_wait(settings, monkeypatch):
    def take_pass(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, "take_pass", take_pass)
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

    def save_to(file, state, original=checkpointing.save_to):
        original(file, state)
        if state["global_step"] == 8:
            raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "save_to", save_to)
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


def test_scaled_losses_are_clipped_and_resumed(settings, monkeypatch):
    """With fp16 gradients are unscaled before they are clipped, and the scale is part of the run's state."""

    def make_training_fabric(*_):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=2)
        return Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])

    monkeypatch.setattr(loop, "make_training_fabric", make_training_fabric)
    config = settings(max_steps=1)
    config.optimizer.clip_grad, config.optimizer.betas = 0.01, (0.5, 0.95)
    state = torch.load(train(config, "test") / "checkpoints/last.ckpt", weights_only=True)
    assert state["MixedPrecision"]["scale"] == 2.0**6
    moments = [own["exp_avg"].flatten() for own in state["optimizer_states"][0]["state"].values()]
    assert float(torch.cat(moments).norm()) == pytest.approx(0.5 * 0.01, rel=1e-3)

    config.trainer.max_steps = 6
    straight, resumed = run_straight_and_stopped(config, monkeypatch, 3)
    assert_same_run(straight, resumed)
    one, two = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (straight, resumed))
    assert one["MixedPrecision"] == two["MixedPrecision"]
    assert one["MixedPrecision"]["scale"] == 2.0**9  # doubled every second step
