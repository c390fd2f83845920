"""Runs of classifiers: from a checkpoint to metrics, stopped and resumed, on one process and on two."""

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from public import save_public
from resuming import assert_same_run, assert_stops_early, resume_without_start
from safetensors.torch import load_file
from timm.layers import DropPath
from torchrun import run_command

import itpn
from itpn.cli import main
from itpn.errors import RunStopped, UserError
from itpn.metrics.classification import judge, score, write_scores
from itpn.tasks.configs import (
    ClassificationConfig,
    ClassificationDataConfig,
    ClassificationEvaluationConfig,
    ClassificationModelConfig,
    FineTuningConfig,
    TrainerConfig,
)
from itpn.tasks.run import train
from itpn.training.config import write_yaml
from itpn.training.stopping import StopRequest

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """24 images to train on and 12 others of three colours that are easily told apart."""
    root = tmp_path_factory.mktemp("coloured")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 25, (36, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture
def settings(coloured, tmp_path):
    """A run of 3 epochs of 4 steps."""

    def make(**model) -> ClassificationConfig:
        return ClassificationConfig(
            model=ClassificationModelConfig(
                **{
                    "name": "itpn_nano",
                    "scratch": True,
                    "patch_size": 8,
                    "drop_path_rate": 0.1,
                    "ema_decay": 0.9,
                    **model,
                }
            ),
            data=ClassificationDataConfig(
                root=(str(coloured),), img_size=32, batch_size=6, num_workers=0, crop_pct=1.0
            ),
            optimizer=FineTuningConfig(lr=2e-3, layer_decay=0.8),
            trainer=TrainerConfig(
                max_epochs=3, log_every_n_steps=1, checkpoint_every_n_steps=100, visualize_every_n_steps=100
            ),
            evaluation=ClassificationEvaluationConfig(batch_size=5),
            output_dir=str(tmp_path / "runs"),
        )

    return make


@pytest.fixture
def trained(settings):
    """The folder of a finished run of two steps."""
    config = settings()
    config.trainer.max_steps = 2
    return train(config, "test")


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [
            {k: v for k, v in row.items() if "per_second" not in k and "wait" not in k} for row in csv.DictReader(file)
        ]


def pretrain_command(images: Path, output_dir: Path) -> list[str]:
    """3 steps an epoch, each a row of metrics.csv."""
    command = f"train itpn-pixel_nano --data.root {images} --output-dir {output_dir} --data.img-size 32"
    command += " --data.batch-size 8 --data.num-workers 0 --model.decoder-depth 1 --trainer.log-every-n-steps 1"
    return command.split()


def test_a_run_from_a_checkpoint_to_its_files(settings, tmp_path, coloured, capsys):
    pretrained = save_public(tmp_path, "mm_pixel")
    config = settings(name=None, scratch=False, checkpoint=str(pretrained), patch_size=None, ema_decay=None)
    config.data.auto_augment, config.data.mixup, config.data.cutmix, config.data.erase = None, 0.0, 0.0, 0.0
    config.data.img_size = 64
    config.trainer.max_epochs = 8
    folder = train(config, "test")
    said = " ".join(capsys.readouterr().out.split())
    assert "has no classifier: it is randomly initialized" in said
    assert "24 images (3 classes, 12 more to evaluate on)" in said
    assert "64x64 px" in said
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["task"] == "classification"
    assert summary["metrics"]["val_top1"] == 1.0  # colours are easy
    rows = read_rows(folder)
    assert [row["val_top1"] == "" for row in rows] == ([True] * 3 + [False]) * 8  # at the end of each epoch
    assert len(list((folder / "predictions").glob("*.png"))) == 2
    # the file says all that is needed to use it
    model = itpn.load(folder / "model.safetensors")
    assert model.num_classes == 3
    assert (
        main(["predict", str(folder / "model.safetensors"), str(coloured / "val"), "--out", str(tmp_path / "p")]) == 0
    )
    answers = json.loads((tmp_path / "p" / "predictions.json").read_text())
    assert {Path(a["image"]).parent.name for a in answers} == set(COLOURS)
    assert all(a["classes"][0]["class"] == Path(a["image"]).parent.name for a in answers)
    with (tmp_path / "p" / "predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3 * 12
    # and so does a checkpoint of the run
    last = itpn.load(folder / "checkpoints" / "last.ckpt")
    own = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, own[f"backbone.{name}"]) for name, tensor in last.state_dict().items())


class StopAt(StopRequest):
    step = 0

    def decide(self, run):
        if run.step == StopAt.step:
            self.signum = 15
        return super().decide(run)


def test_early_stopping(settings, monkeypatch, capsys):
    assert_stops_early(settings(), 4, monkeypatch, capsys)


def test_a_resumed_run_and_two_processes_stop_early(settings, train_until, tmp_path):
    """Without learning no evaluation is better than the first; a resumed run keeps their count."""
    config = settings(ema_decay=None)
    config.optimizer.lr, config.trainer.max_epochs, config.evaluation.patience = 0.0, 9, 2
    train_until(config, 9)
    folder = train(config, "test")
    assert [row["step"] for row in read_rows(folder)] == [str(step) for step in range(1, 13)]
    assert [row["val_top1"] for row in read_rows(folder)].count("") == 9
    best = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)
    assert best["global_step"] == 4

    config.name, config.data.batch_size = "two", 4
    write_yaml(tmp_path / "config.yaml", "test", config)
    said = run_command("train", tmp_path / "config.yaml", folder=tmp_path)
    assert said.count("stopped early at step 9: 2 evaluations have found nothing better than step 3") == 1
    summary = json.loads((folder.parent / "two/summary.json").read_text())
    assert (summary["processes"], summary["stopped_early"], summary["steps"]) == (2, True, 9)


def test_patience_needs_something_to_evaluate_on(settings, coloured, tmp_path):
    config = settings()
    config.evaluation.patience = 2
    shutil.copytree(coloured / "train", tmp_path / "alone/train")
    config.data.root, config.data.val_fraction = (str(tmp_path / "alone"),), 0.0
    with pytest.raises(UserError, match=r"--evaluation\.patience needs images to evaluate on, and there are none"):
        train(config, "test")
    config.model.freeze = True
    with pytest.raises(UserError, match=r"--evaluation\.patience is not for --model\.freeze"):
        config.check()


@pytest.mark.parametrize(("step", "workers"), [(4, 0), (6, 2)])
def test_a_stopped_run_resumes_as_if_it_had_not(settings, monkeypatch, step, workers):
    """Weights, EMA and metrics, with everything random switched on."""
    config = settings()
    config.data.num_workers = workers
    straight = train(replace(config, name="straight"), "test")
    with monkeypatch.context() as patch:
        patch.setattr("itpn.training.loop.StopRequest", StopAt)
        StopAt.step = step
        with pytest.raises(RunStopped):
            train(replace(config, name="stopped"), "test")
    stopped = train(replace(config, name="stopped"), "test")
    assert read_rows(straight) == read_rows(stopped)
    one, two = (
        torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in (straight, stopped)
    )
    assert one.keys() == two.keys()
    assert any(name.startswith("ema.") for name in one)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("how", ["corrupt", "gone"])
def test_a_begun_run_needs_its_start_weights_no_more(settings, trained, train_until, how):
    """They say the network, its patch size and the size of its images; their classifier is kept."""
    config = settings(name=None, scratch=False, patch_size=None)
    config.data.img_size = config.data.crop_pct = None
    straight, resumed = resume_without_start(config, trained / "model.safetensors", train_until, how)
    assert read_rows(straight) == read_rows(resumed)
    assert_same_run(straight, resumed)


@pytest.mark.parametrize("better", ["weights", "EMA"])
def test_the_better_of_weights_and_ema_is_written(settings, monkeypatch, better):
    def evaluate(self, fabric):
        self.score = 1.0
        return {"val_top1": 0.5, "val_top5": 1.0, "val_loss": 0.0, "ema_val_top5": 1.0, "ema_val_loss": 0.0} | {
            "ema_val_top1": 0.6 if better == "EMA" else 0.4
        }

    monkeypatch.setattr("itpn.tasks.evaluation.Validation.evaluate", evaluate)
    folder = train(settings(), "test")
    assert json.loads((folder / "summary.json").read_text())["saved"] == better
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    prefix, other = ("model.", "ema.module.") if better == "weights" else ("ema.module.", "model.")
    written = load_file(folder / "model.safetensors")
    for name, tensor in written.items():
        name = name.removeprefix("backbone.")
        assert torch.equal(tensor, state[prefix + name])
    assert not torch.equal(state[prefix + "head.weight"], state[other + "head.weight"])


def test_a_classifier_of_the_same_classes_is_kept(settings, tmp_path, coloured, capsys):
    first = train(settings(), "test")
    kept = settings(scratch=False, checkpoint=str(first / "model.safetensors"), name=None, patch_size=None)
    kept.optimizer.lr, kept.name = 0.0, "kept"
    capsys.readouterr()
    second = train(kept, "test")
    assert "randomly initialized" not in capsys.readouterr().out
    one, two = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert all(torch.equal(one[name], two[name]) for name in one)
    # other names: as many classes, but not these
    for split in ("train", "val"):
        for name in COLOURS:
            target = tmp_path / "renamed" / split / f"other {name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(coloured / split / name)
    kept.data.root, kept.name = (str(tmp_path / "renamed"),), "renamed"
    train(kept, "test")
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "names 3 classes (blue, green, red), and the images have others: the layers that predict classes are randomly "
        "initialized" in said
    )
    assert "has no classifier" not in said


def test_other_classes_than_the_run_began_with(settings, tmp_path, coloured):
    """The same command over folders that were renamed, or of which there are more."""
    config = settings()
    root = tmp_path / "set"
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        for name in COLOURS:
            (root / split / name).symlink_to(coloured / split / name)
    config.data.root = (str(root),)
    train(config, "test")
    config.trainer.max_epochs = 4
    for split in ("train", "val"):
        (root / split / "blue").rename(root / split / "zblue")
    with pytest.raises(UserError, match="the run has 3 classes and the images have 3, and they differ in blue, zblue"):
        train(config, "test")
    for split in ("train", "val"):
        (root / split / "blue").symlink_to(coloured / split / "blue")
    with pytest.raises(UserError, match="the run has 3 classes and the images have 4, and they differ in zblue"):
        train(config, "test")


def test_a_probe_may_come_later(settings, coloured, tmp_path):
    """Columns that a resumed run adds are empty in the rows before."""
    common = [*pretrain_command(coloured, tmp_path), "--trainer.max-epochs"]
    assert main([*common, "1"]) == 0
    assert main([*common, "2", "--probe.root", str(coloured), "--probe.every-n-epochs", "1"]) == 0
    assert main([*common, "3"]) == 0
    rows = read_rows(tmp_path / "itpn-pixel_nano" / "default")
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 10)]
    assert [row["probe_knn"] == "" for row in rows] == [True] * 5 + [False] + [True] * 3
    assert all(float(row["loss"]) > 0 for row in rows)


def test_mixed_pairs_of_few_images(settings, coloured):
    """24 images on one process are pairs already; of an odd number one is left out; too few are refused."""
    from itpn.tasks.classification.data import find_data, make_loader, make_transform

    config = settings()
    config.data.batch_size = 100
    images = find_data(config).train
    for count, world, size in ((24, 1, 24), (23, 1, 22), (10, 2, 4), (10, 3, 2)):
        few = images.take(np.arange(count))
        config.data.img_size = (32, 32)
        loader = make_loader(config, few, make_transform(config), 0, world)
        assert len(next(iter(loader))["label"]) == size
    with pytest.raises(UserError, match="3 images are too few to be mixed in pairs by 2 processes"):
        make_loader(config, images.take(np.arange(3)), make_transform(config), 0, 2)


PAIRS = [
    ("itpn-pixel_hivit-base-p16_8xb512-amp-coslr-800e_in1k", "hivit-base-p16_itpn-pixel-pre_8xb128-coslr-100e_in1k"),
    ("itpn-clip-b_hivit-base-p16_8xb256-amp-coslr-300e_in1k", "hivit-base-p16_itpn-clip-pre_8xb128-coslr-100e_in1k"),
    (
        "itpn-clip-b_hivit-base-3324-p16_8xb256-amp-coslr-800e_in1k",
        "hivit-base-3324-p16_itpn-clip-pre_8xb128-coslr-100e_in1k",
    ),
    (
        "fast-itpn-clip-l_tiny-1112-p16_8xb256-amp-coslr-1600e_in1k",
        "fast-itpn-tiny-1112-p16_8xb64x2-coslr-100e_in1k-384px",
    ),
]


@pytest.mark.parametrize(("pretraining", "finetuning"), PAIRS)
def test_recipes_take_the_checkpoints_that_they_are_named_after(pretraining, finetuning, tmp_path):
    """Whole sizes; only the classifier is random, and all of the backbone arrives."""
    from itpn.tasks.pretraining.network import build_masked_model
    from itpn.tasks.recipe_files import read_recipe

    config = read_recipe(pretraining)[1]
    config.teacher.width = 8
    path = tmp_path / "pretrained.pth"
    source = build_masked_model(config.model, (224, 224), config.teacher)
    torch.save(source.backbone.state_dict(), path)
    with pytest.warns(UserWarning, match="has no classifier: it is randomly initialized") as said:
        model = itpn.get_model(finetuning, pretrained=path, num_classes=7)
    assert all("no classifier" in str(w.message) or "another image size" in str(w.message) for w in said)
    own = source.backbone.state_dict()
    for name, tensor in model.state_dict().items():
        if name in own and own[name].shape == tensor.shape:
            assert torch.equal(tensor, own[name]), name
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert max(rates) == pytest.approx(read_recipe(finetuning)[1].model.drop_path_rate)


def test_linear_probe(settings, tmp_path):
    """The layer that is written gives the very metrics that the run found."""
    first = train(settings(), "test")
    config = settings(scratch=False, checkpoint=str(first / "model.safetensors"), freeze=True, ema_decay=None)
    folder = train(replace(config, name="probe"), "test")
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert metrics["val_top1"] == 1.0
    before, after = itpn.load(first / "model.safetensors"), itpn.load(folder / "model.safetensors")
    assert torch.equal(before.stages[2][3].mlp.fc1.weight, after.stages[2][3].mlp.fc1.weight)
    out = tmp_path / "evaluation"
    command = ["evaluate", str(folder / "config.yaml"), "--checkpoint", str(folder / "model.safetensors")]
    assert main([*command, "--out", str(out)]) == 0
    evaluated = json.loads((out / "evaluation.json").read_text())
    assert evaluated["loss"] == pytest.approx(metrics["val_loss"], abs=1e-6)
    assert evaluated["top1"] == metrics["val_top1"]


def test_a_probe_of_random_weights(settings):
    """What any pre-training has to beat."""
    folder = train(settings(freeze=True, ema_decay=None), "test")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metrics"]["val_top1"] > 0.5
    assert {"versions", "peak_memory_gb", "device", "images_per_second", "processes"} <= summary.keys()


def test_names_with_markup(settings, tmp_path, coloured, capsys):
    """Neither rich nor matplotlib may read a class's name."""
    for split in ("train", "val"):
        (tmp_path / "odd" / split).mkdir(parents=True)
        for name, odd in zip(COLOURS, (r"$\\foo$", "blue [navy]", "[bold]"), strict=True):
            (tmp_path / "odd" / split / odd).symlink_to(coloured / split / name)
    config = settings(ema_decay=None)
    config.data.root, config.trainer.max_epochs = (str(tmp_path / "odd"),), 1
    folder = train(config, "test")
    model = str(folder / "model.safetensors")
    capsys.readouterr()
    assert main(["evaluate", str(folder / "config.yaml"), "--checkpoint", model, "--out", str(tmp_path / "e")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "blue [navy]" in said
    assert "[bold]" in said


def test_evaluating_one_set_of_class_folders(settings, tmp_path, coloured, capsys):
    """A test set as a whole; the folder that the run was trained on, but for what the run held out."""
    config = settings(ema_decay=None)
    config.data.root, config.data.val_fraction, config.seed = (str(coloured / "train"),), 0.25, 5
    config.trainer.max_epochs = 1
    folder = train(config, "test")
    found = json.loads((folder / "summary.json").read_text())["metrics"]
    common = ["evaluate", "classifier_small", "--checkpoint", str(folder / "model.safetensors"), "--out", str(tmp_path)]
    common += ["--data.num-workers", "0", "--data.root"]
    assert main([*common, str(coloured / "train")]) == 0
    metrics = json.loads((tmp_path / "evaluation.json").read_text())
    assert (metrics["images"], metrics["loss"]) == (6, found["val_loss"])
    assert metrics["data"].startswith("25% held out of ")
    capsys.readouterr()
    assert main([*common, str(coloured / "train"), "--knn", "--data.label-fraction", "0.5"]) == 0
    assert "25% held out of " in capsys.readouterr().out
    assert json.loads((tmp_path / "evaluation.json").read_text())["images"] == 6
    assert main([*common, str(coloured / "val")]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["images"] == 12
    assert main([*common, "nowhere", "--data.val-root", str(coloured / "val")]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["images"] == 12


def test_evaluate_writes_what_the_run_found(settings, tmp_path, capsys):
    folder = train(settings(ema_decay=None), "test")
    found = json.loads((folder / "summary.json").read_text())["metrics"]
    command = ["evaluate", str(folder / "config.yaml"), "--checkpoint", str(folder / "model.safetensors")]
    for option, words in {
        "--model.checkpoint": "give the checkpoint as --checkpoint",
        "--model.name": "--model.name has no meaning here",
        "--data.img-size": "give --data.test-size for another",
    }.items():
        capsys.readouterr()
        assert main([*command, "--out", str(tmp_path / "e"), option, "64"]) == 2
        assert words in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "e")]) == 0
    metrics = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert (metrics["images"], metrics["top1"], metrics["loss"]) == (12, found["val_top1"], found["val_loss"])
    assert not {"val_top5", "ema_val_top5"} & set(found)  # of three classes, it is always among the five likeliest
    assert "top5" not in metrics
    rows = list(csv.reader((tmp_path / "e" / "confusion.csv").open()))
    assert rows[0] == ["class \\ predicted", *COLOURS]
    counts = np.array([row[1:] for row in rows[1:]], dtype=int)
    assert counts.sum(axis=1).tolist() == [4, 4, 4]
    assert np.trace(counts) == round(12 * metrics["top1"])
    assert Image.open(tmp_path / "e" / "confusion.png").size[0] > 300
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "k"), "--knn", "--evaluation.knn-k", "3"]) == 0
    assert "by 3 nearest neighbours" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "k" / "evaluation.json").read_text())["top1"] > 0.9
    # other sizes of the images
    assert main([*command, "--out", str(tmp_path / "t"), "--data.test-size", "48"]) == 0
    assert json.loads((tmp_path / "t" / "evaluation.json").read_text())["loss"] != metrics["loss"]


def test_scores_by_hand():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.2, 0.5, 0.3], [0.9, 0.1, 0.0]])
    scores = score(judge(torch.arange(4), torch.tensor([0, 1, 2, 1]), probabilities.log()), 4)
    assert scores.top1 == 0.5
    assert scores.top5 == 1.0
    assert scores.per_class[:3].tolist() == [1.0, 0.5, 0.0]
    assert scores.per_class[3].isnan()
    assert scores.confusion.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    # each answer is alone in its bin: 0.3 and 0.4 too careful, 0.5 and 0.9 too bold
    assert scores.calibration_error == pytest.approx((0.3 + 0.4 + 0.5 + 0.9) / 4)
    assert scores.loss == pytest.approx(-np.log([0.7, 0.6, 0.3, 0.1]).mean(), rel=1e-6)


@pytest.mark.parametrize("classes", [5, 6])
def test_top5_is_of_more_than_five_classes(tmp_path, classes):
    scores = score(judge(torch.arange(4), torch.arange(4), torch.eye(classes)[:4].log_softmax(dim=1)), classes)
    write_scores(scores, tuple(map(str, range(classes))), tmp_path, {})
    assert ("top5" in json.loads((tmp_path / "evaluation.json").read_text())) == (classes > 5)


def test_classes_in_another_order(settings, tmp_path, coloured, capsys):
    """By names they are matched; without names an evaluation says what it looks like."""
    config = settings(ema_decay=None)
    config.data.auto_augment, config.data.mixup, config.data.cutmix, config.data.erase = None, 0.0, 0.0, 0.0
    config.trainer.max_epochs = 8
    folder = train(config, "test")
    model = itpn.load(folder / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "nameless.pth")
    for i, name in enumerate(reversed(COLOURS)):
        target = tmp_path / "reversed" / "val" / f"{i}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(coloured / "val" / name)
    command = ["evaluate", str(folder / "config.yaml"), "--out", str(tmp_path / "e"), "--data.root"]
    capsys.readouterr()
    assert main([*command, str(coloured), "--checkpoint", str(tmp_path / "nameless.pth"), "--data.crop-pct", "1"]) == 0
    assert "another order" not in "".join(capsys.readouterr())
    nameless = [str(tmp_path / "reversed"), "--checkpoint", str(tmp_path / "nameless.pth")]
    assert main([*command, *nameless]) == 0
    assert "the classes seem to be in another order than in training" in " ".join("".join(capsys.readouterr()).split())
    assert main([*command, str(tmp_path / "reversed"), "--checkpoint", str(folder / "model.safetensors")]) == 2
    said = capsys.readouterr().err
    assert "'0', '1', '2' among the classes of the images, but not of the model" in said
    assert "shards take names from a classes.txt" in said


def test_two_processes_evaluate_as_one(settings, tmp_path):
    """5,003 images, to the last bit of every metric."""
    rng = np.random.default_rng(0)
    for name in COLOURS:
        (tmp_path / "many" / "val" / name).mkdir(parents=True)
    for i in range(5003):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "many" / "val" / [*COLOURS][i % 3] / f"{i:04d}.bmp")
    config = settings(ema_decay=None)
    config.data.img_size, config.trainer.max_steps = 8, 1
    folder = train(config, "test")
    command = ["evaluate", str(folder / "config.yaml"), "--checkpoint", str(folder / "model.safetensors")]
    command += ["--data.root", str(tmp_path / "many"), "--evaluation.batch-size", "64", "--out"]
    assert main([*command, str(tmp_path / "1")]) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "itpn"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launcher, *command, tmp_path / "2"], check=True, env=env, capture_output=True)
    metrics = [
        [(tmp_path / processes / name).read_bytes() for name in ("evaluation.json", "classes.csv", "confusion.csv")]
        for processes in ("1", "2")
    ]
    assert metrics[0] == metrics[1]
    assert json.loads(metrics[0][0])["images"] == 5003


def test_two_processes_train_and_validate(settings, tmp_path):
    config = settings()
    config.data.batch_size = 4
    write_yaml(tmp_path / "config.yaml", "test", config)
    run_command("train", tmp_path / "config.yaml", folder=tmp_path)
    folder = Path(config.output_dir) / "test" / "default"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["processes"], summary["images_seen"]) == (2, 72)
    command = ["evaluate", str(folder / "config.yaml"), "--checkpoint", str(folder / "model.safetensors")]
    assert main([*command, "--out", str(tmp_path / "e")]) == 0
    saved = "ema_val_loss" if summary["saved"] == "EMA" else "val_loss"
    evaluated = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert evaluated["loss"] == pytest.approx(summary["metrics"][saved], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--model.name", "itpn_base"],
            "holds a network of 128 channels and 1+1+4 blocks, not itpn_base: give --model",
        ),
        (["--model.patch-size", "16"], "has patches of 8 px, not 16: leave out --model.patch-size"),
        (["--data.img-size", "30"], "--data.img-size 30x30 is not a multiple of --model.patch-size 8"),
        (["--data.test-size", "30"], "--data.test-size 30x30 is not a multiple of --model.patch-size 8"),
        (["--data.batch-size", "5", "--data.mixup", "0.8"], "--data.batch-size must be even to mix images in pairs"),
        (["--data.auto-augment", "wild"], "--data.auto-augment wild: timm knows no such augmentation"),
        (["--model.scratch"], "both --model.scratch and --model.checkpoint: choose one"),
        (["--optimizer.layer-decay", "0"], "--optimizer.layer-decay must be above 0"),
        (["--data.root", "nowhere"], "nowhere does not exist"),
        (["--data.label-fraction", "1.5"], "--data.label-fraction must lie between 0 and 1"),
    ],
)
def test_mistakes_are_one_line(settings, tmp_path, coloured, capsys, options, words):
    pretrained = tmp_path / "nano.pth"
    torch.save(itpn.get_model("itpn-pixel_nano", img_size=32).backbone.state_dict(), pretrained)
    common = ["--output-dir", str(tmp_path / "runs"), "--data.num-workers", "0"]
    common += [] if "--data.root" in options else ["--data.root", str(coloured)]
    assert main(["train", "classifier_small", "--model.checkpoint", str(pretrained), *common, *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_no_weights_to_start_from(coloured, capsys):
    assert main(["train", "classifier_small", "--data.root", str(coloured)]) == 2
    assert "give the weights to start from as --model.checkpoint FILE, or --model.scratch" in capsys.readouterr().err
    assert main(["evaluate", "itpn-pixel_nano", "--checkpoint", "x.pth"]) == 2
    assert (
        "is a recipe of pretraining: give one of segmentation, detection or classification" in capsys.readouterr().err
    )


def test_evaluating_what_has_no_classifier(tmp_path, coloured, capsys):
    path = save_public(tmp_path, "mm_pixel")
    command = ["evaluate", "classifier_small", "--data.root", str(coloured), "--out", str(tmp_path / "e")]
    assert main([*command, "--checkpoint", str(path)]) == 2
    assert "has no classification head: give --knn" in capsys.readouterr().err
    path = save_public(tmp_path, "off_pixel_finetune")
    assert main([*command, "--checkpoint", str(path)]) == 2
    assert "the images have 3 classes and the model 10" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_epochs_scale_with_the_images(settings):
    from itpn.tasks.finetuning.network import scale_epochs

    config = settings()
    for images, processes, epochs in ((24, 1, 200), (6 * 100, 1, 20), (6 * 100, 8, 167), (6 * 10_000, 1, 10)):
        config.trainer.max_epochs = 0
        assert scale_epochs(config, images, processes).trainer.max_epochs == epochs


def test_relative_positions_begin_at_zero(settings, tmp_path):
    """As the published fine-tuning adds them to pixel pre-training: the network computes what it did."""
    from itpn.checkpoints.files import read_checkpoint
    from itpn.tasks.classification.network import build_classifier, resolve

    path = save_public(tmp_path, "off_pixel_pretrain")
    models = []
    for biased in (None, True):
        config = settings(name=None, patch_size=None, scratch=False, checkpoint=str(path), rel_pos_bias=biased)
        config.data.img_size = None
        found = read_checkpoint(path)
        config, _ = resolve(config, found)
        torch.manual_seed(0)
        models.append(build_classifier(config, tuple(COLOURS), found)[0].eval())
    plain, biased = models
    assert not any(p.any() for n, p in biased.named_parameters() if n.endswith("relative_position_bias_table"))
    assert sum(n.endswith("relative_position_bias_table") for n, _ in biased.named_parameters()) == 2
    images = torch.randn(2, 3, *plain.image_shape[1:])
    torch.testing.assert_close(biased.forward_features(images), plain.forward_features(images))


def test_a_pretraining_run_is_probed(coloured, tmp_path, capsys):
    """Columns from the first row on, metrics from the first probe on; training itself does not notice."""
    common = [*pretrain_command(coloured, tmp_path), "--trainer.max-epochs", "2"]
    assert main([*common, "--name", "plain"]) == 0
    probed = ["--name", "probed", "--probe.root", str(coloured), "--probe.every-n-epochs", "1"]
    assert main([*common, *probed]) == 0
    plain, rows = (read_rows(tmp_path / "itpn-pixel_nano" / name) for name in ("plain", "probed"))
    assert [row["loss"] for row in rows] == [row["loss"] for row in plain]
    # metrics stand at the steps that they were found at, the ends of the two epochs
    assert [row["probe_knn"] == "" for row in rows] == [True, True, False, True, True, False]
    assert float(rows[-1]["probe_linear"]) > 0.9
    assert "by k-NN" in capsys.readouterr().out
    assert main([*common, "--name", "wrong", "--probe.root", "nowhere"]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_what_a_file_says_goes_with_the_network(trained, tmp_path, coloured, capsys):
    """Preprocessing and names of classes, to timm's users and through the hub's layout back to ours."""
    folder = trained
    model = itpn.load(folder / "model.safetensors")
    data = timm.data.resolve_model_data_config(model)
    stored = itpn.inspect(folder / "model.safetensors")
    assert data["input_size"] == (3, *stored.preprocessing["size"])
    assert [list(data[name]) for name in ("mean", "std")] == [stored.preprocessing[name] for name in ("mean", "std")]
    assert data["crop_pct"] == stored.preprocessing["crop_pct"]
    assert stored.classes == ("blue", "green", "red") == tuple(model.pretrained_cfg["label_names"])
    assert "blue, green, red" in str(stored)
    itpn.save_pretrained(model, tmp_path / "hub")
    written = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert written["label_names"] == ["blue", "green", "red"]
    assert written["pretrained_cfg"]["crop_pct"] == data["crop_pct"]
    assert main(["predict", str(tmp_path / "hub"), str(coloured / "val" / "red"), "--out", str(tmp_path / "out")]) == 0
    answers = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {answer["classes"][0]["class"] for answer in answers} <= {"blue", "green", "red"}


@pytest.mark.parametrize("option", ["--optimizer.lr 1", "--data.erase 0.9", "--trainer.max-epochs 3", "--model.name x"])
def test_options_without_a_meaning_for_evaluation(trained, coloured, option, capsys):
    command = ["evaluate", "classifier_small", "--checkpoint", str(trained / "model.safetensors")]
    if option.startswith("--model.name"):
        option = "--model.name itpn_nano"
    assert main([*command, "--data.root", str(coloured), *option.split()]) == 2
    assert "has no meaning here" in capsys.readouterr().err


def test_evaluations_have_a_folder_each(trained, coloured, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    command = ["evaluate", "classifier_small", "--data.root", str(coloured), "--data.num-workers", "0"]
    assert main([*command, "--checkpoint", str(tmp_path / "run" / "model.safetensors")]) == 0
    assert (tmp_path / "run" / "evaluation" / "evaluation.json").exists()
    shutil.copy(tmp_path / "run" / "model.safetensors", tmp_path / "other.safetensors")
    assert main([*command, "--checkpoint", str(tmp_path / "other.safetensors"), "--knn"]) == 0
    assert (tmp_path / "other-evaluation-knn" / "evaluation.json").exists()


def test_a_class_that_is_not_evaluated_is_named(settings, tmp_path, coloured, capsys):
    shutil.copytree(coloured, tmp_path / "less")
    shutil.rmtree(tmp_path / "less" / "val" / "green")
    config = settings()
    config.data.root, config.trainer.max_steps = (str(tmp_path / "less"),), 1
    train(config, "test")
    assert "there are no images of 'green' to evaluate on" in " ".join(capsys.readouterr().out.split())
