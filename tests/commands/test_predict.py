"""`itpn predict`, `inspect` and `convert` as a user runs them, on files of ours and of others."""

import csv
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from public import read_golden, save_public
from safetensors.torch import load_file, safe_open

import itpn
from itpn.checkpoints import files, io
from itpn.checkpoints.adapters import ADAPTERS
from itpn.checkpoints.convert import convert
from itpn.cli import main
from itpn.data.augment import center_crop
from itpn.data.decode import decode_image
from itpn.data.normalize import Normalize
from itpn.errors import UserError
from itpn.system.text import readable
from itpn.system.writing import name_output
from itpn.tasks.configs import PretrainingConfig, PretrainingDataConfig, PretrainingModelConfig
from itpn.tasks.detection.merging import Objects
from itpn.tasks.detection.prediction import ObjectFiles
from itpn.tasks.pretraining.module import save_weights
from itpn.tasks.pretraining.network import build_masked_model
from itpn.tasks.run import train


def test_a_classifier_of_others(tmp_path, photos, capsys):
    """The table, the file and the images tell the likeliest classes."""
    model = timm.create_model("hivit_tiny", img_size=64, num_classes=7).eval()
    state = ADAPTERS["official"].from_ours({f"backbone.{n}": t for n, t in model.state_dict().items()}, (4, 4))[0]
    torch.save({"model": state}, tmp_path / "theirs.pth")
    out = tmp_path / "out"
    assert main(["predict", str(tmp_path / "theirs.pth"), str(photos), "--out", str(out)]) == 0
    assert "prediction-0001.png" in capsys.readouterr().out
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 26 * 5
    assert Image.open(out / "prediction-0000.png").size == (4 * 228 - 32 * 4 + 4, 4 * (192 + 44) + 4)

    pixels = center_crop(decode_image((photos / "03.png").read_bytes(), 2**20), (64, 64))
    x = Normalize()(pixels[None])
    with torch.no_grad():
        probability, label = model(x).softmax(-1)[0].max(0)
    first = next(row for row in rows if row["image"].endswith("03.png") and row["rank"] == "1")
    assert int(first["class"]) == label
    assert float(first["probability"]) == pytest.approx(probability.item(), abs=1e-5)


def test_predictions_of_two_commands_do_not_mix(tmp_path, photos, monkeypatch, capsys):
    """Without --out each command has a folder of its own."""
    model = timm.create_model("hivit_tiny", img_size=64, num_classes=7)
    torch.save({"model": {f"backbone.{n}": t for n, t in model.state_dict().items()}}, tmp_path / "model.pth")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "predictions").mkdir()  # empty
    for name in ("predictions", "predictions-2", "predictions-3"):
        assert main(["predict", "model.pth", str(photos / "03.png")]) == 0
        assert f"{name}/predictions.csv" in capsys.readouterr().out
        assert len(list((tmp_path / name).iterdir())) == 3


def test_names_of_outputs_fit_the_file_system(tmp_path):
    """Cut at whole characters, apart by their numbers; a path is no part of a name."""
    for number, (name, ending, want) in enumerate(
        [
            ("x/a.b.jpg", ".png", "0000-a.b.png"),
            ("a" * 251 + ".jpg", ".png", "0001-" + "a" * 246 + ".png"),
            ("漢" * 83 + ".jpg", "-labels.png", "0002-" + "漢" * 79 + "-labels.png"),
            ("s.tar/../up/x.jpg", ".png", "0003-x.png"),
            ("caf\udce9\n:*?.jpg", ".png", "0004-caf_xe9____.png"),
        ]
    ):
        found = name_output(tmp_path, number, name, ending)
        assert found == want
        (tmp_path / found).touch()
    assert name_output(tmp_path / "not there", 7, "a" * 300, ".png") == "0007-" + "a" * 246 + ".png"


def test_drawings_of_images_of_long_or_equal_names(tmp_path, capsys):
    found = Objects(torch.tensor([[1.0, 2, 8, 9]]), torch.tensor([1]), torch.tensor([0.9]))
    names = ["a/x.jpg", "b/x.jpg", "y" * 250 + "1.jpg", "y" * 250 + "2.jpg", readable(os.fsdecode(b"\xff[red]\n.jpg"))]
    files = ObjectFiles(tmp_path, ["cat"], 0.5)
    for name in names:
        files.add(name, (16, 16), found, torch.zeros(3, 16, 16, dtype=torch.uint8))
    files.finish()
    assert len(list(tmp_path.glob("*.png"))) == 5
    assert [one["image"] for one in json.loads((tmp_path / "predictions.json").read_bytes())] == names
    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)] == names
    assert "\\xff[red]\\n.jpg" in capsys.readouterr().out


def test_files_of_any_name(tmp_path, capsys):
    """Tables, CSV, JSON and features name them in UTF-8, a line each."""
    path = save_public(tmp_path, "off_pixel_finetune")
    folder = os.fsencode(tmp_path / "photos")
    os.mkdir(folder)
    for number, name in enumerate([b"a\nb.png", b"bad\xff[red]\n.png", b"caf\xe9.png"]):
        with open(os.path.join(folder, name), "wb") as file:
            pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, "PNG") if number != 1 else file.write(b"none")
    out = tmp_path / "out"
    assert main(["predict", str(path), os.fsdecode(folder), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert f"skipped {tmp_path}/photos/bad\\xff[red]\\n.png: " in printed.err
    names = [f"{tmp_path}/photos/{name}" for name in ("a\nb.png", "caf\\xe9.png")]
    assert [one["image"] for one in json.loads((out / "predictions.json").read_bytes())] == names
    with (out / "predictions.csv").open(encoding="utf-8", newline="") as file:
        assert list(dict.fromkeys(row["image"] for row in csv.DictReader(file))) == names
    for file in ("f.npy", "f.safetensors"):
        assert main(["predict", str(path), os.fsdecode(folder), "--features", str(tmp_path / file)]) == 0
    lines = (tmp_path / "f.npy.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [name.replace("\n", "\\n") for name in names]
    with safe_open(tmp_path / "f.safetensors", "pt") as tensors:
        assert json.loads(tensors.metadata()["images"]) == names


def test_one_image_of_a_sample(tmp_path, photos, capsys):
    """Of shards, members that describe an image are predicted only where --members names them."""
    path = save_public(tmp_path, "off_pixel_finetune")
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, "w") as tar:
        for key in ("0", "1"):
            for ending in ("png", "seg.png"):
                tar.add(photos / "00.png", f"v1.0/{key}.{ending}")

    def predict(*options: str) -> tuple[list[str], str]:
        file = tmp_path / "f.npy"
        assert main(["predict", str(path), str(shard), "--features", str(file), *options]) == 0
        return (tmp_path / "f.npy.txt").read_text().split(), capsys.readouterr().err

    plain, other = (["s.tar/v1.0/0.png", "s.tar/v1.0/1.png"], ["s.tar/v1.0/0.seg.png", "s.tar/v1.0/1.seg.png"])
    assert predict() == (plain, f"{shard}: not read are 2 .seg.png (see --data.members)\n")
    assert predict("--members", "seg.png") == (other, f"{shard}: not read are 2 .png (see --data.members)\n")
    assert predict("--data.members", "png", "seg.png") == (sorted(plain + other), "")
    assert main(["predict", str(path), str(shard), "--out", str(tmp_path / "o"), "--members", "webp"]) == 2
    assert "s.tar holds no images that end in webp, but 2 .png, 2 .seg.png: --data.members" in capsys.readouterr().err


def test_reconstructions_of_others(tmp_path, photos, capsys):
    path = save_public(tmp_path, "off_pixel_pretrain")
    out = tmp_path / "out"
    assert main(["predict", str(path), str(photos / "00.png"), str(photos / "01.png"), "--out", str(out)]) == 0
    assert len(list(out.iterdir())) == 1


@pytest.mark.parametrize("case", ["off_pixel_pretrain", "off_det_pixel", "off_pixel_finetune"])
def test_features(tmp_path, photos, case, capsys):
    """What is printed is what the file holds."""
    path = save_public(tmp_path, case)
    printed = {}
    for name in ("features.safetensors", "features.npy"):
        assert main(["predict", str(path), str(photos), "--features", str(tmp_path / name)]) == 0
        printed[name] = capsys.readouterr().out.splitlines()
    columns = load_file(tmp_path / "features.safetensors")
    with safe_open(tmp_path / "features.safetensors", "pt") as file:
        names = json.loads(file.metadata()["images"])
    assert names == (tmp_path / "features.npy.txt").read_text().splitlines()
    assert len(names) == 26
    assert columns["features"].shape == (26, 64)
    assert ("pyramid_1" in columns) == (case != "off_pixel_finetune")
    np.testing.assert_array_equal(np.load(tmp_path / "features.npy"), columns["features"].numpy())
    shapes = ", ".join(f"{name} {list(columns[name].shape)}" for name in sorted(columns))
    assert printed["features.safetensors"] == [f"{tmp_path}/features.safetensors: {shapes}"]
    lines = [
        f"{tmp_path}/features.npy: features [26, 64]",
        f"{tmp_path}/features.npy.txt: the images' names, a line each",
        "a .safetensors file would also hold pyramid_1, pyramid_2, pyramid_3",
    ]
    assert printed["features.npy"] == (lines if case != "off_pixel_finetune" else lines[:2])


def test_inspect_is_a_report_that_a_person_understands(tmp_path, capsys):
    path = save_public(tmp_path, "off_fast_itpn_ls")
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    for words in (
        "Fast-iTPN of unknown name: a classifier of 10 classes",
        "the authors' code (Fast-iTPN), under 'model'",
        "layer scale in stage 3, SwiGLU and sub-LN",
        "num_heads=1 (64 channels each): not in the file, give them if they differ",
        "it has no pyramid: randomly initialized",
        "everything is there",
        "task='classification')",
    ):
        assert words in text, words


def test_inspect_names_the_model_and_the_options(tmp_path, capsys):

    config = PretrainingConfig(
        model=PretrainingModelConfig(name="itpn_tiny", init_values=0.1, decoder_depth=3),
        data=PretrainingDataConfig(img_size=64),
    )
    save_weights(tmp_path / "a.safetensors", build_masked_model(config.model, (64, 64)), "test", config)
    convert(tmp_path / "a.safetensors", tmp_path / "a.pth", "official")
    report = itpn.inspect(tmp_path / "a.pth")
    assert report.model == "itpn_tiny"
    assert report.use("pretraining").command.endswith(
        "a.pth --model.name itpn_tiny --model.init-values 0.1 --model.decoder-depth 3"
    )
    assert main(["inspect", str(tmp_path / "a.pth")]) == 0
    assert "itpn_tiny: pre-trained to predict pixel" in capsys.readouterr().out


def test_convert(tmp_path, capsys):
    path, golden = save_public(tmp_path, "off_seg"), read_golden("off_seg")[0]["param"]
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.pth"
    assert main(["convert", str(path), str(ours)]) == 0
    assert main(["convert", str(ours), str(back), "--to", "official"]) == 0
    assert f"{len(golden)} tensors under the names of official" in capsys.readouterr().out
    state = torch.load(back, weights_only=True)["model"]
    assert all(torch.equal(state[name], tensor) for name, tensor in golden.items())
    golden["blocks.4.attn.proj.weight"][3, :2] = float("nan")
    golden["decoder_extra.weight"] = torch.zeros(1)
    torch.save({"model": golden}, path)
    assert main(["convert", str(path), str(ours)]) == 0
    said = capsys.readouterr().out
    assert "left out, for it has no place there: decoder_extra (1 tensor)" in said
    assert "2 infinite numbers or NaN were kept as they are, in backbone.stages.2.0.attn.proj.weight" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "missing.pth"], "checkpoint missing.pth does not exist"),
        (["convert", "missing.pth", "a.safetensors"], "checkpoint missing.pth does not exist"),
        (["inspect", "https://example.com/a.pth"], "is an address: download the file and give its path"),
        (["inspect", ""], "checkpoint '' does not exist"),
        (["inspect", "{text}"], "corrupt or no checkpoint"),
        (["convert", "{det}", "a.zip"], "say which names a.zip gets"),
        (["convert", "{det}", "a.pth", "--to", "keras"], "invalid choice 'keras' for --to: choose from itpn, "),
        (
            ["predict", "{det}", "{photos}"],
            "has no head of any task, and predicts nothing: give --features FILE",
        ),
        (["predict", "{det}", "{photos}", "--features", "a.csv"], "must end in .safetensors or .npy"),
        (["predict", "{text}", "{photos}"], "corrupt or no checkpoint"),
    ],
)
def test_mistakes_are_one_line(tmp_path, photos, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("not weights at all")
    places = {"text": tmp_path / "text.pth", "det": save_public(tmp_path, "off_det_pixel"), "photos": photos}
    assert main([argument.format(**places) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "predictions").exists()


def test_training_starts_from_a_public_file(tmp_path, settings, capsys):
    """A run from a file in the authors' names is the run from our own file, number by number; what differs is said."""

    def run(name: str, checkpoint: Path | None, **model) -> list[str]:
        config = settings(max_steps=3)
        config.name, config.model.checkpoint = name, checkpoint and str(checkpoint)
        config.model = replace(config.model, **model)
        train(config, "test")
        with (tmp_path / "runs" / "test" / name / "metrics.csv").open() as file:
            return [row["loss"] for row in csv.DictReader(file)]

    run("first", None)
    ours, theirs = tmp_path / "runs" / "test" / "first" / "model.safetensors", tmp_path / "theirs.pth"
    convert(ours, theirs, "official")
    assert run("ours", ours) == run("theirs", theirs)
    capsys.readouterr()
    run("larger", theirs, decoder_depth=2)
    said = " ".join(capsys.readouterr().out.split())
    assert f"starting from the weights of {theirs}" in said
    assert "has no decoder that fits (decoder.blocks.1.attn.proj.bias is missing there and 32 here): it is" in said
    with pytest.raises(UserError, match="holds another model"):
        run("refused", theirs, pyramid_width=64)
    assert not (tmp_path / "runs" / "test" / "refused").exists()


def test_every_command_reads_a_checkpoint_once(tmp_path, settings, photos, monkeypatch):
    train(settings(max_steps=1), "test")
    path = str(tmp_path / "runs" / "test" / "default" / "model.safetensors")
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "classes" / place).mkdir(parents=True)
        for name in ("00.png", "01.png"):
            shutil.copy(photos / name, tmp_path / "classes" / place / name)
    reads = []
    monkeypatch.setattr(
        io, "_read_file", lambda file, *rest, read=io._read_file: (reads.append(file), read(file, *rest))[1]
    )

    contents = []
    monkeypatch.setattr(
        files, "describe_contents", lambda *own, read=files.describe_contents: (contents.append(own), read(*own))[1]
    )

    def start():
        config = settings(max_steps=1)
        config.name, config.model.checkpoint = "again", path
        train(config, "test")

    labelled = ["--data.root", str(tmp_path / "classes"), "--data.num-workers", "0", "--trainer.accelerator", "cpu"]
    short = [
        "--data.img-size",
        "32",
        "--data.batch-size",
        "2",
        "--trainer.max-steps",
        "1",
        "--evaluation.batch-size",
        "2",
    ]
    for command in (
        ["inspect", path],
        ["convert", path, str(tmp_path / "theirs.pth"), "--to", "official"],
        ["export", path, "--out", str(tmp_path / "x.pt2"), "--task", "backbone"],
        ["predict", path, str(photos), "--out", str(tmp_path / "out")],
        ["evaluate", "classifier_small", "--checkpoint", path, "--knn", *labelled, "--evaluation.knn-k", "1"],
        ["train", "classifier_small", "--model.checkpoint", path, "--output-dir", str(tmp_path), *labelled, *short],
        lambda: itpn.load(path),
        start,
    ):
        reads.clear()
        contents.clear()
        assert not main(command) if isinstance(command, list) else [command()]
        assert reads == [path]
        assert len(contents) == 1, "what it holds is told once"


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (["--min-score", "0.3"], "--min-score is for checkpoints of detection, not of classification"),
        (["--seed", "-1"], "--seed must be at least 0, not -1"),
        (["--features", "f.npy", "--out", "x"], "--features writes no predictions: give it without --out"),
        (["--features", "f.npy", "--seed", "1"], "--features writes no predictions: give it without --out"),
    ],
)
def test_options_without_a_meaning_are_refused(photos, capsys, tmp_path, monkeypatch, options, answer):
    model = timm.create_model("hivit_tiny", img_size=64, num_classes=7)
    torch.save({"model": {f"backbone.{n}": t for n, t in model.state_dict().items()}}, tmp_path / "model.pth")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert main(["predict", str(tmp_path / "model.pth"), str(photos), *options]) == 2
    assert answer in capsys.readouterr().err
    assert not list((tmp_path / "work").iterdir())
