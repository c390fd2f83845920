"""Runs that are stopped and resumed, and whether they end with the very bits of one that was not."""

import csv
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from itpn.cli import main
from itpn.errors import RunStopped, UserError
from itpn.tasks.configs import PretrainingConfig
from itpn.tasks.evaluation import Validation
from itpn.tasks.run import train
from itpn.training import loop
from itpn.training.run_state import read_state


def stop_at(monkeypatch, step: int, signum: int = signal.SIGINT) -> None:
    """Send this process a signal in the middle of a pass (counted over the whole run)."""

    def take_pass(run, *args, original=loop.take_pass):
        if run.passes == step:
            os.kill(os.getpid(), signum)
        return original(run, *args)

    monkeypatch.setattr(loop, "take_pass", take_pass)


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


def assert_stops_early(config, epoch: int, monkeypatch, capsys) -> None:
    """The second of four evaluations is the best: with a patience of two, the fourth is the last.

    Args:
        epoch: steps of one, after which there is an evaluation.
    """
    scores = [0.5, 0.6, 0.6, 0.55, 0.9, 0.1]

    def evaluate(self, fabric):
        self.score = scores.pop(0)
        return dict.fromkeys(self.metrics, self.score)

    def end() -> tuple[bool, bool, int]:
        summary = json.loads((folder / "summary.json").read_text())
        return summary["finished"], summary["stopped_early"], summary["steps"]

    def best() -> int:
        return read_state(folder / "checkpoints/best.ckpt")["global_step"]

    monkeypatch.setattr(Validation, "evaluate", evaluate)
    config.trainer.max_epochs, config.evaluation.patience = 6, 2
    folder = train(config, "test")
    assert (end(), best(), len(scores)) == ((True, True, 4 * epoch), 2 * epoch, 2)
    assert read_state(folder / "checkpoints/last.ckpt")["global_step"] == 4 * epoch
    assert (folder / "model.safetensors").exists()
    said = (
        f"stopped early at step {4 * epoch}: 2 evaluations have found nothing better than step {2 * epoch}, which is "
    )
    assert said + str(folder / "checkpoints/best.ckpt") in capsys.readouterr().out

    train(config, "test")  # there is nothing to do
    assert f"is complete at step {4 * epoch}; raise --evaluation.patience to train" in capsys.readouterr().out
    assert len(scores) == 2
    config.evaluation.patience = 3
    train(config, "test")
    assert (end(), best(), len(scores)) == ((True, False, 6 * epoch), 5 * epoch, 0)


def losses(run: Path) -> list[tuple[str, str, str]]:
    with (run / "metrics.csv").open() as file:
        return [(row["step"], row["loss"], row["lr"]) for row in csv.DictReader(file)]


def resume_without_start(config, weights: Path, train_until, how: str) -> tuple[Path, Path]:
    """The folders of two runs from start weights: one in one go, one stopped and resumed from the command line.

    Args:
        weights: where they are; they are "corrupt" or "gone" when the run resumes.
        train_until: the fixture.
    """
    config = replace(config, model=replace(config.model, checkpoint=str(weights)))
    straight = train(replace(config, name="straight"), "test")
    train_until(replace(config, name="stopped"), 4)
    weights.write_bytes(weights.read_bytes()[:1000]) if how == "corrupt" else weights.unlink()
    with pytest.raises(UserError, match=rf"{weights} {'is corrupt' if how == 'corrupt' else 'does not exist'}"):
        train(replace(config, name="new"), "test")
    assert main(["train", str(straight / "config.yaml"), "--name", "new"]) == 2
    assert main(["train", str(straight.parent / "stopped/config.yaml")]) == 0
    return straight, train(replace(config, name="stopped"), "test")


def run_straight_and_stopped(config: PretrainingConfig, monkeypatch, step: int) -> tuple[Path, Path]:
    """The folders of two runs: one in one go, one stopped in mid-pass and resumed."""
    straight = train(replace(config, name="straight"), "test")
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(RunStopped):
            train(replace(config, name="stopped"), "test")
    return straight, train(replace(config, name="stopped"), "test")
