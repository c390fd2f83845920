"""What a run leaves behind, refuses and reports."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import itpn
from itpn.data.loader import TrainingLoader
from itpn.errors import NonFiniteLoss, UserError
from itpn.tasks.pretraining import evaluation, prediction
from itpn.tasks.pretraining.module import PretrainingModule
from itpn.tasks.recipe_files import read_settings
from itpn.tasks.run import train
from itpn.training import progress
from itpn.training.checkpointing import Checkpointing
from itpn.training.launch import choose_precision, read_launch
from itpn.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """A finished run of three epochs, with its settings."""
    from itpn.tasks.configs import (
        OptimizerConfig,
        PretrainingConfig,
        PretrainingDataConfig,
        PretrainingModelConfig,
        TrainerConfig,
    )

    config = PretrainingConfig(
        model=PretrainingModelConfig(
            "itpn_nano", patch_size=8, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2
        ),
        data=PretrainingDataConfig(root=(str(photos),), img_size=32, batch_size=8, num_workers=0),
        optimizer=OptimizerConfig(lr=2e-3),
        trainer=TrainerConfig(max_epochs=20, log_every_n_steps=5, visualize_every_n_steps=20),
        output_dir=str(tmp_path_factory.mktemp("finished")),
    )
    return train(config, "small"), config


def test_every_file_is_there(finished):
    run, config = finished
    assert run == Path(config.output_dir) / "small/default"
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    visualizations = {f"reconstructions/step-{step:08d}.png" for step in (0, 20, 40, 60)}
    expected = {"config.yaml", "metrics.csv", "model.safetensors", "summary.json", "checkpoints/last.ckpt"}
    assert expected | visualizations | {"checkpoints/best.ckpt"} <= names
    assert any("tfevents" in name for name in names)
    found = {"dtype": "photo", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}  # of the images
    resolved = replace(
        config,
        model=replace(config.model, in_chans=3, norm_pix_floor=0.0),
        data=replace(config.data, **found),
    )
    assert read_settings(run / "config.yaml") == ("small", resolved)


def test_summary(finished):
    run, _ = finished
    summary = json.loads((run / "summary.json").read_text())
    assert summary["recipe"] == "small"
    assert (summary["epochs"], summary["steps"], summary["images_seen"]) == (20, 60, 480)
    assert summary["images_skipped"] == 0
    assert summary["images_per_second"] > 0
    assert 0 <= summary["data_wait_fraction"] < 1
    assert 0 < summary["peak_memory_gb"] < 20
    assert summary["duration_seconds"] > 0
    assert {"torch", "itpn", "lightning"} <= summary["versions"].keys()
    rows = (run / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 12
    assert float(rows[-1].split(",")[2]) == summary["metrics"]["loss"]


def test_speed_is_that_of_training(settings, photos, tmp_path, monkeypatch, capsys):
    """Visualizations, evaluations and checkpoints take 1000 s each by this clock, and count in no speed."""
    late = 0.0

    def slow(method):
        def take_longer(*args, **kwargs):
            nonlocal late
            late += 1000
            return method(*args, **kwargs)

        return take_longer

    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + late)
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(prediction, "draw_predictions", slow(prediction.draw_predictions))
    monkeypatch.setattr(evaluation.ProbeEvaluator, "score", slow(evaluation.ProbeEvaluator.score))
    monkeypatch.setattr(Checkpointing, "save", slow(Checkpointing.save))
    for folder in ("train/ant", "train/bee", "val/ant", "val/bee"):
        shutil.copytree(photos, tmp_path / "probe" / folder)
    config = settings()
    config.trainer.visualize_every_n_steps = config.trainer.checkpoint_every_n_steps = 1
    config.probe.root, config.probe.every_n_epochs = str(tmp_path / "probe"), 1
    run = train(config, "small")
    assert late >= 18 * 1000 + 18 * 1000 + 3 * 1000
    summary = json.loads((run / "summary.json").read_text())
    with (run / "metrics.csv").open(newline="") as file:
        speeds = [float(row["images_per_second"]) for row in csv.DictReader(file)]
    assert len(speeds) == 18
    assert min(*speeds, summary["images_per_second"]) > 4 / 500  # a step takes 4 images
    assert max(summary["data_wait_fraction"], 0) <= 1
    shown = [float(found) for found in re.findall(r"([\d.]+) images/s", capsys.readouterr().out)]
    assert shown
    assert min(shown) >= 1


def test_the_loss_falls(finished):
    run, _ = finished
    losses = [float(row.split(",")[2]) for row in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert losses[-1] < 0.9 * losses[0]


def test_tensorboard_has_curves_and_visualizations(finished):
    run, _ = finished
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(5, 61, 5))
    assert [e.step for e in events.Images("reconstructions")] == [0, 20, 40, 60]


def test_visualizations_show_the_reconstruction(finished, photos):
    """Visible patches are unchanged in all three columns, masked ones grey in the second."""
    run, _ = finished
    image = np.asarray(Image.open(run / "reconstructions/step-00000060.png"))
    # 32 pixels are shown as 224
    columns = [image[24 : 24 + 224, 4 + 228 * i : 4 + 228 * i + 224][::7, ::7] for i in range(3)]
    original, masked, reconstructed = columns
    grey = np.array([124, 116, 104])  # the mean
    is_masked = np.zeros((4, 4), dtype=bool)
    for row in range(4):
        for col in range(4):
            patch = np.s_[row * 8 : row * 8 + 8, col * 8 : col * 8 + 8]
            is_masked[row, col] = (np.abs(masked[patch].astype(int) - grey) <= 1).all()
            if not is_masked[row, col]:
                assert (np.abs(original[patch].astype(int) - masked[patch]) <= 1).all()
                assert (original[patch] == reconstructed[patch]).all()
    assert is_masked.sum() == 12


def test_weights_rebuild_the_model(finished):
    run, _ = finished
    with safe_open(run / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "itpn"
    assert json.loads(metadata["preprocessing"])["size"] == [32, 32]
    from_weights, from_checkpoint = itpn.load(run / "model.safetensors"), itpn.load(run / "checkpoints/last.ckpt")
    images = torch.randn(2, 3, 32, 32)
    for level, other in zip(from_weights.extract_pyramid(images), from_checkpoint.extract_pyramid(images), strict=True):
        assert torch.equal(level, other)
    larger = itpn.load(run / "model.safetensors", img_size=64)
    assert larger.backbone.grid_size == (8, 8)
    with pytest.raises(UserError, match=r"has another shape: backbone.patch_embed.proj.weight is 32x3x2x2 there"):
        itpn.load(run / "model.safetensors", patch_size=16)


def test_epochs_that_end_before_max_steps_are_named(settings, capsys):
    config = settings(max_steps=1000)
    config.trainer.max_epochs = 1
    folder = train(config, "test")
    steps = json.loads((folder / "summary.json").read_text())["steps"]
    said = " ".join(capsys.readouterr().out.split())
    end = f"the run ends at step {steps}, after --trainer.max-epochs 1, before --trainer.max-steps 1000"
    assert said.count(end) == 1
    config = settings(max_steps=1)
    config.name = "short"
    train(config, "test")
    assert "before --trainer.max-steps" not in capsys.readouterr().out


def test_starting_from_weights(finished, settings, capsys):
    run, config = finished
    weights = str(run / "model.safetensors")
    config = replace(config, output_dir=settings().output_dir)
    config.model = replace(config.model, checkpoint=weights)
    config.trainer = replace(config.trainer, max_steps=1)
    config.optimizer = replace(config.optimizer, lr=0.0)
    same = train(config, "again")
    ours, theirs = (itpn.load(folder / "model.safetensors").state_dict() for folder in (same, run))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())

    config.model = replace(config.model, decoder_depth=2)
    config.data = replace(config.data, img_size=64)
    capsys.readouterr()
    other = itpn.load(train(replace(config, name="other"), "again") / "model.safetensors").state_dict()
    said = " ".join(capsys.readouterr().out.split())
    assert "it is randomly initialized" in said
    assert "is made for another image size: backbone.pos_embed resampled to 8x8 patches" in said
    for name, tensor in theirs.items():
        if not name.startswith("decoder.") and name != "backbone.pos_embed":
            assert torch.equal(other[name], tensor), name


def test_a_folder_in_use_is_refused(settings):
    config = settings()
    folder = RunFolder(config, "test")
    folder.path.mkdir(parents=True)
    holder = (
        "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire();"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(folder.path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="in use by another process"):
            train(config, "test")
        process.kill()  # as kill -9: the lock goes with its holder
    train(replace(config, trainer=replace(config.trainer, max_steps=1)), "test")
    assert FileLock(folder.path / ".lock").acquire(timeout=0)


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("model", {"decoder_depth": 2}),
        ("data", {"img_size": 64}),
        ("data", {"batch_size": 2}),
        ("optimizer", {"weight_decay": 0.1}),
        ("trainer", {"accumulate_grad_batches": 2}),
    ],
)
def test_another_run_under_the_same_name_is_refused(settings, section, change):
    config = settings(max_steps=1)
    train(config, "test")
    other = replace(config, **{section: replace(getattr(config, section), **change)})
    with pytest.raises(UserError, match=f"holds a run with --{section}"):
        train(other, "test")


def test_a_loss_that_is_not_finite(settings):
    config = settings()
    config.optimizer.lr = 1e30
    with pytest.raises(NonFiniteLoss, match=r"try a lower --optimizer\.lr"):
        train(config, "test")
    folder = Path(config.output_dir) / "test/default"
    [evidence] = folder.glob("nonfinite-step-*.pt")
    evidence = torch.load(evidence, weights_only=True)
    assert evidence["batch"]["image"].shape == (4, 3, 32, 32)
    assert evidence["nonfinite_parameters"] or not np.isfinite(evidence["loss"])
    assert not list((folder / "checkpoints").iterdir())  # none is written with such weights


def test_corrupt_images_are_skipped_and_counted(settings, photos, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for i, path in enumerate([*photos.iterdir()] * 2):
        (mixed / f"{i}.png").write_bytes(path.read_bytes())
    (mixed / "00-text.jpg").write_text("not an image")
    (mixed / "00-cut.png").write_bytes((mixed / "0.png").read_bytes()[:200])
    config = settings()
    config.data.root = (str(mixed),)
    run = train(config, "test")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["images_skipped"] == 2
    out = capsys.readouterr().out
    assert out.count("00-text.jpg") == out.count("00-cut.png") == 1
    config.data.max_corrupt = 0.03
    with pytest.raises(UserError, match="2 of 54 images cannot be read"):
        train(replace(config, name="strict"), "test")


def test_shards(settings, photos, tmp_path):
    import tarfile

    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for path in sorted(photos.iterdir())[shard::2]:
                tar.add(path, path.name)
    config = settings()
    config.data.root = (str(tmp_path / "0.tar"), str(tmp_path / "1.tar"))
    summary = json.loads((train(config, "test") / "summary.json").read_text())
    assert (summary["steps"], summary["images_seen"]) == (18, 72)


def test_grey_images(settings):
    config = settings(max_steps=2)
    config.model.in_chans = 1
    config.data.mean, config.data.std = (0.45,), (0.25,)
    module = PretrainingModule(itpn.load(train(config, "test") / "model.safetensors"), config, "test")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    grey = module.normalize.undo(module.normalize(images)).float()
    luma = (images * torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)).sum(1, keepdim=True)
    assert (grey - luma).abs().max() <= 0.51


SLURM = {
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NAME": "x",
    "SLURM_JOB_ID": "1",
}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8", "RANK": "5"}


@pytest.mark.parametrize(
    ("env", "environment", "main", "processes", "machines"),
    [
        ({}, "LightningEnvironment", True, None, None),
        ({"LOCAL_RANK": "1"}, "LightningEnvironment", False, None, None),
        (TORCHRUN, "TorchElasticEnvironment", False, 4, 2),
        ({**TORCHRUN, "RANK": "0"}, "TorchElasticEnvironment", True, 4, 2),
        ({**SLURM, "SLURM_PROCID": "0"}, "SLURMEnvironment", True, 4, 2),
        ({**SLURM, "SLURM_PROCID": "3"}, "SLURMEnvironment", False, 4, 2),
        # torchrun as the one task of a Slurm job, and a plain command in one
        ({**SLURM, "SLURM_PROCID": "0", **TORCHRUN}, "TorchElasticEnvironment", False, 4, 2),
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "LightningEnvironment", True, None, None),
    ],
)
def test_launchers(monkeypatch, env, environment, main, processes, machines):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    launch = read_launch()
    assert type(launch.environment).__name__ == environment
    assert (launch.main, launch.processes, launch.machines) == (main, processes, machines)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE must be a number above 0, not 'x'"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK must be a number, not ''"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT must be a number, not '-1'"),
        ({**TORCHRUN, "RANK": "1.5"}, "RANK must be a number, not '1.5'"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE must be a number above 0, not '0'"),
        ({"TORCHELASTIC_RUN_ID": "x"}, "LOCAL_WORLD_SIZE is missing"),
        ({**SLURM, "SLURM_NTASKS": "2(x3)"}, r"SLURM_NTASKS must be a number above 0, not '2\(x3\)'"),
        (SLURM, "SLURM_PROCID is missing"),
    ],
)
def test_variables_of_launchers_that_are_none(monkeypatch, env, words):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        read_launch()


def test_precision(monkeypatch):
    assert choose_precision("auto", cuda=False) == "32-true"
    for has_bf16, expected in ((True, "bf16-mixed"), (False, "16-mixed")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bf16: has)
        assert choose_precision("auto", cuda=True) == expected
    assert choose_precision("bf16", cuda=False) == "bf16-mixed"


def test_half_precision_trains(settings):
    config = settings(precision="bf16-mixed", max_steps=3)
    config.optimizer.clip_grad = 1.0
    summary = json.loads((train(config, "test") / "summary.json").read_text())
    assert summary["precision"] == "bf16-mixed"
    assert np.isfinite(summary["metrics"]["loss"])


def test_the_loader_gets_the_settings(settings, monkeypatch):
    seen = {}
    original = TrainingLoader.__init__

    def init(self, source, transform, **kwargs):
        seen.update(kwargs, transform=transform)
        original(self, source, transform, **kwargs)

    monkeypatch.setattr(TrainingLoader, "__init__", init)
    config = settings(max_steps=1)
    config.data.crop_scale, config.data.hflip, config.seed = (0.5, 0.9), 0.0, 7
    train(config, "test")
    assert (seen["batch_size"], seen["seed"], seen["rank"], seen["world_size"]) == (4, 7, 0, 1)
    assert (seen["transform"].scale, seen["transform"].hflip) == ((0.5, 0.9), 0.0)


def test_what_pre_training_reads(tmp_path, settings, photos, capsys):
    """The training part, a plain image a sample, whatever files are called; what is left out is told, a line each."""
    root = tmp_path / "data"
    images = [path.read_bytes() for path in sorted(photos.iterdir())]
    for folder, names in {
        b"Train": [b"a.jfif", b"b.JPE", b"caf\xe9.png", b"x\ny.png", b"[red].png", b"c.fff"],
        b"Val": [b"v.png"],
        b"extra": [b"e.png"],
    }.items():
        (root / os.fsdecode(folder)).mkdir(parents=True)
        for name, image in zip(names, images, strict=False):
            with open(os.path.join(os.fsencode(root), folder, name), "wb") as file:
                file.write(image)
    with open(os.path.join(os.fsencode(root), b"Train", b"bad\n\xff[red].png"), "wb") as file:
        file.write(b"none")
    config = settings(max_steps=2)
    config.data = replace(config.data, root=(str(root),), max_corrupt=0.5, batch_size=3)
    folder = train(config, "names")
    printed = capsys.readouterr()
    assert printed.err == f"{root}: for training: Train; left out: Val, extra\nnot read: 1 .fff\n"
    assert "6 images (files)" in printed.out
    assert f"skipped {root}/Train/bad\\n\\xff[red].png: " in printed.out
    assert json.loads((folder / "summary.json").read_bytes())["images_skipped"] == 1

    (tmp_path / "shards").mkdir()
    for split in ("train", "val"):
        with tarfile.open(tmp_path / "shards" / f"{split}-0.tar", "w") as tar:
            for number in range(6):
                for ending in ("png", "seg.png"):
                    tar.add(photos / f"{number:02d}.png", f"v1.0/{number}.{ending}")
    config = settings(max_steps=1)
    config.data = replace(config.data, root=(str(tmp_path / "shards"),))
    train(config, "plain")
    printed = capsys.readouterr()
    shard = tmp_path / "shards" / "train-0.tar"
    assert printed.err == (
        f"{tmp_path}/shards: for training: train-0.tar; left out: val-0.tar\n"
        f"{shard}: not read are 6 .seg.png (see --data.members)\n"
    )
    assert "6 images (shards)" in printed.out
    config.data = replace(config.data, members=("all",))
    train(config, "all")
    assert "12 images (shards)" in capsys.readouterr().out
    config.data = replace(config.data, members=("webp",))
    with pytest.raises(UserError, match=r"train-0\.tar holds no images that end in webp, but 6 \.png, 6 \.seg\.png"):
        train(config, "none")
