"""`itpn demo`, with fewer images and steps, and the processes that it runs in."""

import dataclasses
import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch
from PIL import Image
from rich.console import Console

from itpn.cli import main
from itpn.data.shapes import write_shapes
from itpn.errors import MachineError, RunStopped, UserError
from itpn.tasks import demo
from itpn.tasks.parallel_runs import PlannedRun, train_side_by_side


def test_the_whole_story(monkeypatch, tmp_path, capsys):
    def write_few(root, *, train, val, img_size):
        return write_shapes(root, train=8, val=6, img_size=img_size)

    monkeypatch.setattr(demo, "write_shapes", write_few)
    monkeypatch.setattr(demo, "PRETRAINING_STEPS", 2)
    monkeypatch.setattr(demo, "TASKS", tuple(dataclasses.replace(task, steps=2) for task in demo.TASKS))
    assert main(["demo", "--output-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for task in ("classify", "detect", "segment"):
        (row,) = [line for line in lines if line.startswith(f"│ {task} ")]
        assert row.count("%") == 2  # from scratch and pre-trained
        (weights,) = [line.split()[1] for line in lines if line.startswith(f"{task}:")]
        assert (tmp_path / weights).is_file()
        assert weights.endswith("pre-trained/model.safetensors")
    with Image.open(tmp_path / "demo.png") as image:
        assert image.width > 5 * 288  # 48 px, six times
        assert image.height > 4 * 288
        assert len(image.getcolors(2**24)) > 1000


def test_a_signal_stops_all_runs_and_the_same_call_resumes(settings, tmp_path):
    plans = {}
    for title in ("one", "other"):
        config = dataclasses.replace(settings(max_steps=100), name=title)
        config.trainer.max_epochs = 100
        plans[title] = PlannedRun("test", config)
    folders = [plan.folder for plan in plans.values()]

    def stop():
        while not all(folder.metrics.exists() for folder in folders):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(RunStopped) as stopped:
        train_side_by_side(plans, tmp_path / "logs", Console(quiet=True))
    assert stopped.value.signum == signal.SIGTERM
    assert not multiprocessing.active_children()
    steps = [torch.load(folder.last, weights_only=True)["global_step"] for folder in folders]
    assert min(steps) > 0

    train_side_by_side(plans, tmp_path / "logs", Console(quiet=True))
    assert all(folder.weights.exists() for folder in folders)
    log = "".join((tmp_path / "logs/one.log").read_text().split())  # lines are broken anywhere
    assert f"resumingfrom{folders[0].last},step{steps[0]}" in log


def test_a_process_that_was_killed_is_one_line(settings, tmp_path):
    plan = PlannedRun("test", settings())
    plan.config.trainer.max_epochs = 10**4

    def kill():
        while not plan.folder.metrics.exists():
            time.sleep(0.05)
        (child,) = multiprocessing.active_children()
        child.kill()

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(MachineError, match=r"killed.*one\.log"):
        train_side_by_side({"one": plan}, tmp_path / "logs", Console(quiet=True), workers=1)


def test_what_fails_is_told_and_nothing_follows(settings, tmp_path):
    bad, good = (dataclasses.replace(settings(), name=name) for name in ("bad", "good"))
    bad.data = dataclasses.replace(bad.data, root=(str(tmp_path / "nowhere"),))
    plans = {"bad": PlannedRun("test", bad), "good": PlannedRun("test", good, after="bad")}
    with pytest.raises(UserError, match="nowhere"):
        train_side_by_side(plans, tmp_path / "logs", Console(quiet=True), workers=1)
    assert not multiprocessing.active_children()
    assert not (tmp_path / "logs/good.log").exists()
