"""Several processes do what one does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchrun import run_command, run_script

import itpn
from itpn.errors import UserError
from itpn.tasks.configs import ClassificationConfig, ClassificationDataConfig
from itpn.training.config import write_yaml
from itpn.training.launch import read_launch
from itpn.training.sharding import check_strategy

SCRIPT = Path(__file__).with_name("gradient_of_a_step.py")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_gradient_of_two_processes_is_that_of_the_whole_batch(settings, tmp_path):
    """And the processes tell one another no more than they must. So with shards of the network, also when resumed, and
    where the compiler fails in one of them."""
    cases = dict.fromkeys(("plain", "compiled", "failing"), (1, None)) | {"ema": (1, "ema")}
    cases |= {"accumulated": (2, None), "sharded": (2, None)}
    for processes, batch in ((1, 8), (2, 4)):
        files = []
        for case, (accumulate, teacher) in [*cases.items(), ("resumed", (2, None))]:
            config = settings(max_steps=2 * accumulate, accumulate_grad_batches=accumulate)
            config.trainer.log_every_n_steps = 100
            config.name, config.data.batch_size, config.model.drop_path_rate = f"{case}-{processes}", batch, 0.0
            if case == "compiled":
                config.trainer.compile, config.model.grad_checkpointing = processes == 2, True
            if case in ("sharded", "resumed"):
                config.name, config.optimizer.clip_grad = f"sharded-{processes}", 0.1
                config.trainer.strategy = "fsdp" if processes == 2 else "ddp"
                config.trainer.max_steps = 4 if case == "sharded" else 6
            if teacher:
                config.teacher.name, config.model.feature_weight = teacher, 0.5
                config.model.pyramid_weights = (0.1, 0.2, 0.3)
            files.append(tmp_path / f"{case}-{processes}.yaml")
            write_yaml(files[-1], "test", config)
        said = run_script(SCRIPT, *files, folder=tmp_path, processes=processes)
        refused = "torch.compile failed: RuntimeError: no compiler here; steps are not compiled"
        assert (refused in said) == (processes == 2)
    runs = Path(config.output_dir) / "test"
    for case, (accumulate, _) in cases.items():
        names = [f"{case}-{processes}" for processes in (1, 2)]
        one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in names)
        assert one.keys() == two.keys()
        for name, gradient in one.items():
            assert (two[name] - gradient).norm() <= 1e-5 * gradient.norm(), (case, name)
        summaries = [json.loads((runs / name / "summary.json").read_text()) for name in names]
        assert [s["processes"] for s in summaries] == [1, 2]
        assert summaries[0]["images_seen"] == summaries[1]["images_seen"]
        seen = 72 if case == "sharded" else {1: 16, 2: 48}[accumulate]  # three passes end in a single one
        assert summaries[0]["images_seen"] == seen

    one, two = (itpn.load(runs / f"sharded-{processes}/model.safetensors").state_dict() for processes in (1, 2))
    assert one.keys() == two.keys()
    for name, weights in one.items():
        assert torch.allclose(weights, two[name], atol=2e-5), name
    one, two = (
        itpn.load(runs / "sharded-2" / name).state_dict() for name in ("model.safetensors", "checkpoints/last.ckpt")
    )
    assert all(torch.equal(weights, two[name]) for name, weights in one.items())

    _, _, _, first, second, _ = json.loads((tmp_path / "accumulated-2.json").read_text())
    assert first == []  # the first of two passes of a step
    assert second == 3 * ["c10d::allreduce_"]  # two buckets of gradients, and the vote on stopping


def fine_tune(config):
    return ClassificationConfig(data=ClassificationDataConfig(root=config.data.root), trainer=config.trainer)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: setattr(c.trainer, "devices", 1), "needs several processes"),
        (lambda c: setattr(c.trainer, "precision", "fp16"), "has no loss scaling"),
        (lambda c: setattr(c.teacher, "name", "ema"), "keeps no EMA"),
        (lambda c: setattr(c.probe, "root", "photos"), "cannot probe"),
        (lambda c: setattr(c.trainer, "compile", True), "does not go with --trainer.compile"),
        (fine_tune, "is not for runs of classification"),
    ],
)
def test_what_cannot_be_sharded(settings, change, reason):
    config = settings(strategy="fsdp", devices=2, accelerator="cpu")
    with pytest.raises(UserError, match=f"^--trainer.strategy fsdp {reason}"):
        check_strategy(change(config) or config, read_launch())


def run_on_two_machines(*arguments) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    machines = [subprocess.Popen([*command, *arguments], env=ENV) for _ in range(2)]
    assert [machine.wait() for machine in machines] == [0, 0]


def test_two_processes_stop_together_and_resume(settings, tmp_path):
    """A signal ends both at the same step, and the resumed run equals an uninterrupted one of two machines."""
    config = settings()
    config.data.batch_size = 2
    config.trainer.max_epochs = 10  # 60 steps
    command = [sys.executable, "-m", *TORCHRUN, "-m", "itpn", "train"]
    for name in ("straight", "stopped"):
        write_yaml(tmp_path / f"{name}.yaml", "test", replace(config, name=name))
    run_on_two_machines("-m", "itpn", "train", tmp_path / "straight.yaml")

    runs = Path(config.output_dir) / "test"
    assert json.loads((runs / "straight/summary.json").read_text())["processes"] == 2
    assert len((runs / "straight/metrics.csv").read_text().splitlines()) == 61
    metrics = runs / "stopped/metrics.csv"
    with subprocess.Popen(
        [*command, tmp_path / "stopped.yaml"], env=ENV, start_new_session=True, stderr=subprocess.PIPE
    ) as process:
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
            time.sleep(0.05)
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        errors = process.stderr.read()
    stopped = torch.load(runs / "stopped/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert 0 < stopped < 60
    assert b"FileNotFoundError" not in errors
    assert json.loads((runs / "stopped/summary.json").read_text())["steps"] == stopped
    run_command("train", tmp_path / "stopped.yaml", folder=tmp_path)
    one, other = (load_file(runs / name / "model.safetensors") for name in ("straight", "stopped"))
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_corrupt_files_of_all_processes_are_counted(settings, photos, tmp_path):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for i, path in enumerate([*photos.iterdir()] * 3):
        (mixed / f"{i:02d}.png").write_bytes(path.read_bytes())
    for i in range(4):
        (mixed / f"bad{i}.png").write_text("not an image")
    config = settings()
    config.data.root = (str(mixed),)
    write_yaml(tmp_path / "run.yaml", "test", config)
    said = run_command("train", tmp_path / "run.yaml", folder=tmp_path)
    summary = json.loads((Path(config.output_dir) / "test/default/summary.json").read_text())
    assert summary["images_skipped"] == 4
    assert all(said.count(f"bad{i}.png") == 1 for i in range(4))
