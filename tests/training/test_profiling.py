"""Profiles of real steps, beside real runs."""

import gzip
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from options import change
from PIL import Image

from itpn.cli import main
from itpn.errors import RunStopped
from itpn.tasks.configs import (
    ClassificationConfig,
    ClassificationDataConfig,
    ClassificationModelConfig,
    FineTuningConfig,
    TrainerConfig,
)
from itpn.tasks.pretraining.module import PretrainingModule
from itpn.tasks.run import train
from itpn.training import profiling
from itpn.training.launch import Launch
from itpn.training.profile_trace import read_device
from itpn.training.profiling import Clock, make_plan

FILES = {"trace.json.gz", "summary.txt", "summary.json"}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(profiling, "STEPS", 3)


def bytes_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_summary(folder):
    assert {path.name for path in folder.iterdir()} == FILES
    summary = json.loads((folder / "summary.json").read_text())
    assert sum(summary["host_ms"].values()) == pytest.approx(summary["step_ms"])
    assert all(ms >= 0 for ms in summary["host_ms"].values())
    # a small network's arithmetic outweighs what surrounds it
    assert summary["host_ms"]["forward"] + summary["host_ms"]["backward"] > 0.3 * summary["step_ms"]
    assert summary["images_per_second"] == pytest.approx(1e3 * summary["batch"] / summary["step_ms"])
    assert sum(summary["groups"].values()) == pytest.approx(1)
    assert {"products", "attention", "optimizer", "data wait"} <= summary["groups"].keys()
    assert len(summary["longest"]) == 10
    assert summary["gpu_ms"] is None
    assert summary["advice"]
    with gzip.open(folder / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 3
    assert {"itpn: data wait", "itpn: forward", "itpn: backward", "itpn: optimizer"} <= set(names)
    device = read_device(events)  # as of a GPU without work
    assert not device.operations
    assert sum(device.idle.values()) == pytest.approx(3e3 * summary["recorded_step_ms"], rel=0.5)
    assert device.idle["forward"] > device.idle["optimizer"] > 0
    text = (folder / "summary.txt").read_text()
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "aten::" in text
    return summary


def test_profile_where_no_run_exists(settings, capsys):
    config = settings(max_steps=2)  # fewer than a profile takes
    folder = train(config, "test", profile=True)
    summary = check_summary(folder)
    assert folder == Path(config.output_dir) / "test/default/profile"
    assert bytes_of(Path(config.output_dir)).keys() == {Path("test/default/profile", name) for name in FILES}
    assert (summary["batch"], summary["steps"]) == (4, 3)
    assert "profile of test / default" in capsys.readouterr().out
    train(config, "test")  # and a run may come after it


def test_an_existing_run_is_untouched_and_resumes(settings, train_until):
    config = settings()
    train_until(config, 7)
    run = Path(config.output_dir) / "test/default"
    before = bytes_of(run)
    train(replace(config, seed=5), "test", profile=True)  # as which the run could not go on
    check_summary(run / "profile")
    after = bytes_of(run)
    assert before == {name: content for name, content in after.items() if name.parts[0] != "profile"}
    train(config, "test")
    assert json.loads((run / "summary.json").read_text())["steps"] == 18

    straight = replace(config, name="straight")
    train(straight, "test")
    one, two = (
        torch.load(run.parent / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("default", "straight")
    )
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_a_classifier_with_accumulated_passes(tmp_path):
    for name, colour in {"red": (200, 50, 40), "blue": (40, 60, 200)}.items():
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (40, 36), colour).save(tmp_path / "train" / name / f"{i}.png")
    config = ClassificationConfig(
        model=ClassificationModelConfig(name="itpn_nano", scratch=True, patch_size=8),
        data=ClassificationDataConfig(root=(str(tmp_path / "train"),), img_size=32, batch_size=2, num_workers=0),
        optimizer=FineTuningConfig(lr=1e-3),
        trainer=TrainerConfig(max_epochs=2, accumulate_grad_batches=2),
        output_dir=str(tmp_path / "runs"),
    )
    plan = make_plan(config, False)
    assert (plan.warmup, plan.timed, plan.recorded) == (3, 2, 2)
    folder = train(config, "test", profile=True)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["batch"], summary["steps"], summary["task"]) == (4, 2, "classification")
    assert sum(summary["host_ms"].values()) == pytest.approx(summary["step_ms"])


def test_warming_up_uses_what_workers_read_ahead(settings):
    config = settings()
    assert make_plan(config, False).warmup == 5
    config.data.num_workers = 4
    assert make_plan(config, False).warmup == 13
    assert make_plan(config, True).warmup == 18


def test_parts_of_a_step_add_up(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: now[0])
    clock = Clock()
    now[0] += 1
    for seconds, part in ((2, "forward"), (4, "optimizer"), (8, "forward")):
        with clock.part(part):
            now[0] += seconds
    now[0] += 16
    seconds = clock.read()
    assert seconds["forward"] == 2 + 8
    assert seconds["optimizer"] == 4
    assert seconds["other"] == 1 + 16
    assert sum(seconds.values()) == 31


@pytest.mark.parametrize("at", [2, 11])  # warming up, recording
def test_a_signal_ends_it(settings, monkeypatch, at):
    take_step = profiling.take_step

    def interrupt(run, *args):
        take_step(run, *args)
        if run.step == at:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(profiling, "take_step", interrupt)
    before = signal.getsignal(signal.SIGINT)
    config = settings()
    with pytest.raises(RunStopped) as stopped:
        train(config, "test", profile=True)
    assert stopped.value.signum == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before
    assert not bytes_of(Path(config.output_dir))


def test_a_signal_while_the_trace_is_written(settings, monkeypatch):
    def copy(content, packed):
        packed.write(content.read(1000))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(profiling.shutil, "copyfileobj", copy)
    config = settings()
    with pytest.raises(RunStopped):
        train(config, "test", profile=True)
    assert not bytes_of(Path(config.output_dir))


def test_processes_beside_the_first_take_the_same_steps(settings, monkeypatch):
    config = settings()
    steps = []
    monkeypatch.setattr(PretrainingModule, "after_step", lambda task, step, total_steps: steps.append(step))
    monkeypatch.setattr(profiling, "read_launch", lambda: Launch(LightningEnvironment(), main=False))
    train(config, "test", profile=True)
    assert steps == [*range(make_plan(config, False).total)]
    assert not bytes_of(Path(config.output_dir))


def test_command(photos, tmp_path, capsys):
    few = ["--data.batch-size", "2", "--data.num-workers", "0", "--data.img-size", "32", "--model.patch-size", "8"]
    command = ["train", "itpn-pixel_nano", "--data.root", str(photos), "--output-dir", str(tmp_path), *few]
    assert main([*command, "--profile"]) == 0
    assert "ms a step of 2 images" in capsys.readouterr().out
    check_summary(tmp_path / "itpn-pixel_nano/default/profile")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--profile=yes"], "--profile"),
        (["--profile", "yes"], "unexpected 'yes'"),
        (["--no-profile"], "did you mean --profile?"),
        (["--prof"], "unknown option --prof; did you mean --profile?"),
        (["--profile", "--data.num-worker", "2"], "did you mean --data.num-workers?"),
        (["--profile", "--output-dir", __file__], "cannot be written"),
    ],
)
def test_mistakes(options, complaint, photos, tmp_path, capsys):
    command = ["train", "itpn-pixel_nano", "--data.root", str(photos), "--output-dir", str(tmp_path)]
    assert main(change(command, options)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert complaint in said
    assert not list(tmp_path.iterdir())


def test_features_computed_once_have_no_steps(photos, capsys):
    options = ["--model.checkpoint", str(photos), "--data.root", str(photos), "--profile"]
    assert main(["train", "linear-probe", *options]) == 2
    assert "--model.freeze takes none" in capsys.readouterr().err


def test_help_names_it(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--profile" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "itpn-pixel_nano", "--help"])
    assert "--profile" in capsys.readouterr().out
