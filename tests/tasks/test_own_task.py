"""A task of a user's own, in one file outside the package: every command works on it."""

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

import itpn
from itpn.cli import main
from itpn.errors import UserError
from itpn.models import heads
from itpn.tasks import spec
from itpn.tasks.recipe_files import read_recipe
from itpn.tasks.run import train

RECIPE = str(Path(__file__).with_name("multilabel.py"))
COLOURS = ("red", "green", "blue")
SMALL = ["--model.name", "itpn_nano", "--model.patch-size", "8", "--data.img-size", "32", "--data.batch-size", "8"]


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """What the recipe file registers is known in one test only."""
    monkeypatch.setattr(spec, "_TASKS", dict(spec._TASKS))
    monkeypatch.setattr(heads, "_HEADS", dict(heads._HEADS))


def write_images(folder: Path) -> Path:
    """Dark noise, in which any of the three channels may be bright."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in {"train": 24, "val": 9}.items():
        with open(folder / f"{split}.csv", "w", newline="") as file:
            for i in range(count):
                bright = rng.random(3) < 0.5
                pixels = rng.integers(0, 60, (48, 48, 3)) + 150 * bright
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{split}-{i}.png")
                names = " ".join(name for name, own in zip(COLOURS, bright, strict=True) if own)
                csv.writer(file).writerow([f"{split}-{i}.png", names])
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of the images, and of a run."""
    folder = tmp_path_factory.mktemp("own")
    images = write_images(folder / "images")
    known = dict(spec._TASKS), dict(heads._HEADS)
    options = [*SMALL, "--data.num-workers", "2", "--trainer.max-epochs", "6", "--optimizer.lr", "3e-3"]
    options += ["--data.root", str(images), "--output-dir", str(folder)]
    assert main(["train", RECIPE, *options]) == 0
    spec._TASKS, heads._HEADS = known
    return images, folder / "multilabel/default"


def test_training_learns(trained):
    """The loss falls, and validation and `itpn evaluate` agree."""
    summary = json.loads((trained[1] / "summary.json").read_text())["metrics"]
    assert summary["loss"] < 0.4
    assert summary["val_map"] > 0.9
    out = trained[1] / "evaluated"
    command = ["evaluate", RECIPE, "--checkpoint", str(trained[1]), "--data.root", str(trained[0]), "--out", str(out)]
    assert main(command) == 0
    assert json.loads((out / "evaluation.json").read_text())["map"] == pytest.approx(summary["val_map"], abs=1e-6)


def test_training_resumes_from_the_settings_of_the_run(trained, capsys):
    assert main(["train", str(trained[1] / "config.yaml"), "--recipe", RECIPE, "--trainer.max-epochs", "7"]) == 0
    assert "resuming from" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("without", "line"),
    [
        (["describe_data"], "24 images (9 more to evaluate on)"),
        (["describe_data", "build_evaluator"], "24 images"),
        (["build_evaluator"], "24 images (3 classes), 32 px"),
    ],
)
def test_a_task_without_its_optional_parts(trained, tmp_path, capsys, monkeypatch, without, line):
    _, config = read_recipe(RECIPE)
    task = replace(spec.task_of(config), **dict.fromkeys(without))
    monkeypatch.setitem(spec._TASKS, task.name, task)
    config.data.root, config.data.img_size, config.data.num_workers = str(trained[0]), 32, 0
    config.model.name, config.model.patch_size = "itpn_nano", 8
    config.trainer.max_steps, config.output_dir = 1, str(tmp_path)
    train(config, "test")
    rows = [[cell.strip() for cell in row.split("│")] for row in capsys.readouterr().out.splitlines()]
    assert ["", "data", line, ""] in rows


def test_predictions(trained, tmp_path):
    command = ["predict", str(trained[1]), str(trained[0]), f"--recipe={RECIPE}", "--out", str(tmp_path)]
    assert main(command) == 0
    predicted = {row["image"]: row["classes"] for row in csv.DictReader((tmp_path / "predictions.csv").open())}
    truth = dict(csv.reader((trained[0] / "val.csv").open()))
    right = [set(predicted[name].split()) == set(names.split()) for name, names in truth.items()]
    assert len(predicted) == 33
    assert sum(right) >= 7


def test_info_and_inspect(trained, capsys):
    assert main(["info", RECIPE]) == 0
    out = capsys.readouterr().out
    assert "M with 2 classes that may occur together" in out
    assert "backbone at 224x224 px" in out
    assert [line.split()[1:3] for line in out.splitlines() if "stride" in line] == [["stage", i] for i in "123"]
    assert main(["inspect", str(trained[1]), "--recipe", RECIPE]) == 0
    out = capsys.readouterr().out
    assert "a multi-label classifier of 3 classes" in out
    assert "multi-label classification │ everything is there" in out


def test_options_of_its_head_that_heads_of_the_package_have(trained, tmp_path, capsys):
    """No command takes them for theirs."""
    options = '{"decoder": "linear", "auxiliary": True, "objective": 1, "heads": 3, "masks": "x", "num_heads": "two"}'
    text = Path(RECIPE).read_text()
    for old, new in {
        'options={"num_classes": len(classes)}': f'options={{"num_classes": len(classes), **{options}}}',
        "build_backbone(spec, **spec.options)": 'build_backbone(spec, spec.options["num_classes"])',
    }.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    recipe, data = tmp_path / "odd.py", ["--data.root", str(trained[0])]
    recipe.write_text(text)
    sizes = ["--model.name", "itpn_nano", "--model.patch-size", "8", "--data.img-size", "32", "--data.num-workers", "0"]
    short = ["--data.batch-size", "8", "--trainer.max-steps", "1", "--output-dir", str(tmp_path)]
    assert main(["train", str(recipe), *sizes, *short, *data]) == 0
    run = str(tmp_path / "odd/default")
    capsys.readouterr()
    assert main(["inspect", run, "--recipe", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "a multi-label classifier of 3 classes" in out
    assert "numbers a patch" not in out
    for command in (
        ["evaluate", str(recipe), "--checkpoint", run, *data],
        ["info", f"{run}/config.yaml", "--checkpoint", run, "--recipe", str(recipe)],
        ["predict", run, str(trained[0]), "--recipe", str(recipe), "--out", str(tmp_path)],
        ["convert", f"{run}/model.safetensors", str(tmp_path / "again.safetensors"), "--recipe", str(recipe)],
    ):
        assert main(command) == 0, command
    assert itpn.load(tmp_path / "again.safetensors").spec.options["decoder"] == "linear"


def test_conversion(trained, tmp_path):
    command = ["convert", str(trained[1] / "model.safetensors"), str(tmp_path / "again.safetensors")]
    assert main([*command, "--recipe", RECIPE]) == 0
    assert itpn.load(tmp_path / "again.safetensors", task="multi_label").num_classes == 3


def test_export(trained, tmp_path, capsys):
    """It names no exporter: its backbone can be exported."""
    command = ["export", str(trained[1]), "--recipe", RECIPE, "--out", str(tmp_path / "x.pt2"), "--task"]
    assert main([*command, "multi_label"]) == 2
    assert "cannot be exported as multi_label; give --task backbone" in capsys.readouterr().err
    assert main([*command, "backbone"]) == 0


def test_a_classifier_of_another_task(trained, tmp_path, capsys):
    """The file says whose head its tensors are."""
    command = ["evaluate", "classifier_small", "--checkpoint", str(trained[1]), "--recipe", RECIPE]
    assert main([*command, "--data.root", str(tmp_path)]) == 2
    assert "has no classification head: give --knn" in capsys.readouterr().err


def test_a_checkpoint_of_another_task(tmp_path, capsys):
    itpn.save_pretrained(timm.create_model("itpn_nano", img_size=32, num_classes=3), tmp_path / "other")
    assert main(["evaluate", RECIPE, "--checkpoint", str(tmp_path / "other"), "--data.root", str(tmp_path)]) == 2
    assert "has no multi_label head: fine-tune it first\n" in capsys.readouterr().err


def test_its_weights_are_loaded_whole(trained):
    read_recipe(RECIPE)
    model = itpn.load(trained[1] / "model.safetensors")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_without_its_file_the_backbone_is_still_there(trained, capsys, tmp_path):
    with pytest.raises(UserError, match=r"task 'multi_label' is not known: .* --recipe FILE"):
        itpn.load(trained[1] / "model.safetensors")
    assert itpn.load(trained[1] / "model.safetensors", task="backbone").num_classes == 0
    for command in (
        ["predict", str(trained[1]), str(trained[0]), "--out", str(tmp_path / "out")],
        ["export", str(trained[1]), "--out", str(tmp_path / "x.onnx")],
        ["train", str(trained[1] / "config.yaml")],
    ):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert "the task 'multi_label' is not known" in err
        assert "corrupt" not in err
    assert main(["inspect", str(trained[1])]) == 0
    assert "a network of the task 'multi_label', which is not known here" in capsys.readouterr().out


def test_an_installed_package_registers_a_task(trained, tmp_path):
    """By an entry point, without --recipe."""
    shutil.copy(RECIPE, tmp_path / "multilabel.py")
    package = tmp_path / "multilabel-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: multilabel\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[itpn.tasks]\nmulti_label = multilabel:TASK\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = "import sys; from itpn.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "inspect", str(trained[1])]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "a multi-label classifier of 3 classes" in run.stdout


def test_settings_need_no_section_for_evaluation(tmp_path):
    """It is then evaluated after each epoch, in batches as those of training."""
    text = (
        Path(RECIPE)
        .read_text()
        .replace("    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)\n", "")
    )
    assert "evaluation: EvaluationConfig" not in text
    recipe = tmp_path / "plain.py"
    recipe.write_text(text)
    images = write_images(tmp_path / "images")
    options = [*SMALL, "--data.num-workers", "0", "--trainer.max-epochs", "2", "--data.root", str(images)]
    assert main(["train", str(recipe), *options, "--output-dir", str(tmp_path)]) == 0
    with open(tmp_path / "plain/default/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["val_map"]) for row in rows] == [row["step"] in ("3", "6") for row in rows]
    weights = str(tmp_path / "plain/default/model.safetensors")
    assert main(["evaluate", str(recipe), "--checkpoint", weights, "--data.root", str(images)]) == 0
