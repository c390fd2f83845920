"""A segmenter's run from its checkpoint to its files; metrics; images of any size; what users get wrong."""

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from resuming import assert_same_run, assert_stops_early, resume_without_start
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrun import run_command
from torchvision.transforms.v2.functional import resize

import itpn
from itpn.checkpoints.files import named_tensors, read_checkpoint
from itpn.cli import main
from itpn.data.image_type import Pixels
from itpn.data.masks import IGNORED
from itpn.data.normalize import Normalize
from itpn.data.scenes import CLASSES, GROUNDS
from itpn.data.shapes import write_shapes
from itpn.metrics.segmentation import PixelScores, compare
from itpn.models.segmenter import Segmenter
from itpn.tasks.configs import (
    FineTuningConfig,
    PretrainingConfig,
    PretrainingDataConfig,
    PretrainingModelConfig,
    SegmentationConfig,
    SegmentationDataConfig,
    SegmentationModelConfig,
    TrainerConfig,
)
from itpn.tasks.finetuning.network import resolve_with_head
from itpn.tasks.pretraining.module import save_weights
from itpn.tasks.pretraining.network import build_from
from itpn.tasks.recipe_files import read_recipe
from itpn.tasks.run import train
from itpn.tasks.segmentation.inference import Segmentation, enlarge_labels
from itpn.tasks.segmentation.module import pixel_loss
from itpn.tasks.segmentation.network import build_segmenter
from itpn.training.config import write_yaml
from itpn.training.optimization import learning_rate

NAMES = (*GROUNDS, *CLASSES)
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
PLAIN = Normalize(Pixels(mean=(0.0,), std=(1.0,)))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The sample set: 12 images to train on and 7 others."""
    return write_shapes(tmp_path_factory.mktemp("shapes"), train=12, val=7, img_size=64).ade20k


@pytest.fixture
def settings(shapes, tmp_path):
    """A run of 2 epochs of 3 steps."""

    def make(**trainer) -> SegmentationConfig:
        return SegmentationConfig(
            model=SegmentationModelConfig(
                name="itpn_nano", scratch=True, patch_size=16, head_width=16, drop_path_rate=0.1
            ),
            data=SegmentationDataConfig(
                root=str(shapes), reduce_zero_label=True, img_size=48, short_side=64, batch_size=4, num_workers=0
            ),
            optimizer=FineTuningConfig(lr=1e-3, layer_decay=0.9, layer_decay_over=None, clip_grad=1.0),
            trainer=TrainerConfig(
                **{"max_epochs": 2, "log_every_n_steps": 1, "checkpoint_every_n_steps": 100, **trainer}
            ),
            output_dir=str(tmp_path / "runs"),
        )

    return make


@pytest.fixture
def trained(settings):
    return train(settings(), "test")


@pytest.fixture
def pretrained(tmp_path):
    config = PretrainingConfig(
        model=PretrainingModelConfig(
            name="itpn_nano", patch_size=16, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2
        ),
        data=PretrainingDataConfig(img_size=64, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)),
    )
    save_weights(tmp_path / "pretrained.safetensors", build_from(config), "test", config)
    return tmp_path / "pretrained.safetensors"


# --- metrics


def slow_metrics(answers: list, targets: list, classes: int) -> dict[str, float]:
    """Pixel by pixel, class by class."""
    ious, recalls, right, seen = [], [], 0, 0
    for number in range(classes):
        both = either = there = 0
        for answer, target in zip(answers, targets, strict=True):
            for a, t in zip(answer.flatten().tolist(), target.flatten().tolist(), strict=True):
                if t == IGNORED:
                    continue
                both += a == t == number
                either += number in (a, t)
                there += t == number
                if number == 0:
                    right += a == t
                    seen += 1
        if either:
            ious.append(both / either)
        if there:
            recalls.append(both / there)
    return {
        "miou": sum(ious) / len(ious),
        "mean_accuracy": sum(recalls) / len(recalls),
        "pixel_accuracy": right / seen,
    }


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_an_obvious_reference(seed):
    """Of images of any size, with pixels of no class, a class that is only predicted and one that is only there."""
    rng = np.random.default_rng(seed)
    answers, targets = [], []
    for _ in range(3):
        size = tuple(rng.integers(5, 12, 2))
        target = rng.integers(0, 5, size).astype(np.uint8)
        target[target == 3] = 0
        answer = np.where(rng.random(size) < 0.5, target, rng.integers(0, 4, size)).astype(np.uint8)
        target[rng.random(size) < 0.2] = IGNORED
        answer[answer == 4] = 1
        answers.append(torch.from_numpy(answer))
        targets.append(torch.from_numpy(target))
    confusion = sum(compare(a, t, 6) for a, t in zip(answers, targets, strict=True))
    scores = PixelScores(confusion, 3)
    assert scores.metrics == pytest.approx(slow_metrics(answers, targets, 6))
    assert scores.iou.isnan().tolist() == [False] * 5 + [True]
    assert scores.recall.isnan().tolist() == [False, False, False, True, False, True]
    assert int(confusion.sum()) == sum(int((t != IGNORED).sum()) for t in targets)


def test_the_loss_is_the_mean_over_labelled_pixels():
    logits = torch.randn(2, 4, 5, 6, requires_grad=True)
    target = torch.randint(4, (2, 5, 6))
    target[0, :3] = IGNORED
    assert pixel_loss(logits, target).item() == pytest.approx(
        F.cross_entropy(logits, target, ignore_index=IGNORED).item()
    )
    nothing = pixel_loss(logits, torch.full_like(target, IGNORED))
    nothing.backward()
    assert nothing == 0
    assert not logits.grad.any()


# --- images of any size


class Local(nn.Module):
    """Logits that depend on a pixel and those around it, and on where the window begins."""

    num_classes = 5

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 5, 5, padding=2)

    def forward(self, x):
        return {"out": self.convolution(x)}


@pytest.mark.parametrize("size", [(50, 70), (97, 40), (24, 30)])
@pytest.mark.parametrize(("window", "stride"), [(None, 2 / 3), (32, 2 / 3), (32, 1.0), (20, 0.3)])
@pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), ((0.5, 1.0, 1.75), True)])
def test_an_image_is_segmented_as_by_an_obvious_reference(size, window, stride, scales, flip):
    """Window by window and pixel by pixel at full size, with nothing saved."""
    torch.manual_seed(1)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    model, short = Local(), 40
    ours = Segmentation(short, window, stride, scales, flip)
    total, count = 0.0, 0
    base = [max(1, round(side * short / min(size))) for side in size]
    for scale in scales:
        sides = [max(1, round(side * scale * short / min(size))) for side in size]
        x = resize(image, sides, antialias=True).float()[None] / 255
        for mirrored in (False, True) if flip else (False,):
            own = x.flip(-1) if mirrored else x
            side = [sides[0] if window is None else min(window, sides[0]), min(window or sides[1], sides[1])]
            logits, seen = torch.zeros(1, 5, *sides), torch.zeros(sides)
            step = [max(1, int(stride * s)) if window else s for s in side]
            tops = [min(t, sides[0] - side[0]) for t in range(0, sides[0] - side[0] + step[0], step[0])]
            lefts = [min(t, sides[1] - side[1]) for t in range(0, sides[1] - side[1] + step[1], step[1])]
            for top in tops:
                for left in lefts:
                    part = slice(top, top + side[0]), slice(left, left + side[1])
                    logits[(..., *part)] += model(own[(..., *part)])["out"]
                    seen[part] += 1
            assert seen.min() >= 1
            likely = (logits / seen).softmax(dim=1)
            likely = likely.flip(-1) if mirrored else likely
            total = total + F.interpolate(likely, base, mode="bilinear", align_corners=False)
            count += 1
    with torch.no_grad():
        assert torch.allclose(ours.probabilities(model, PLAIN, image), (total / count)[0], atol=1e-5)
        wanted = F.interpolate(total / count, size, mode="bilinear", align_corners=False)[0].argmax(dim=0)
        assert (ours(model, PLAIN, image) == wanted).float().mean() > 0.998  # but for ties


def test_where_windows_start():
    """Windows of 512 px with steps of 341, the last one against the edge."""
    starts = Segmentation(512, 512, 2 / 3)._starts
    assert list(starts(512, 512)) == [0]
    assert list(starts(600, 512)) == [0, 88]
    assert list(starts(1024, 512)) == [0, 341, 512]
    assert list(starts(1194, 512)) == [0, 341, 682]


@pytest.mark.parametrize("size", [(200, 90), (30, 40), (7, 333)])
def test_labels_are_enlarged_as_by_interpolation(size):
    probabilities = torch.rand(7, 33, 47, generator=torch.Generator().manual_seed(0))
    wanted = F.interpolate(probabilities[None], size, mode="bilinear", align_corners=False)[0].argmax(dim=0)
    found = enlarge_labels(probabilities, size)
    assert found.dtype == torch.uint8
    assert (found != wanted).float().mean() < 1e-3  # but for ties


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that anything computes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, torch.Tensor):
                self.numbers = max(self.numbers, one.numel())
        return result


def test_memory_does_not_grow_with_the_image():
    """4000 px: nothing is ever larger than the image itself, though there are five classes."""
    image = torch.zeros(3, 3000, 4000, dtype=torch.uint8)
    with Largest() as largest:
        labels = Segmentation(short=64, window=64)(Local(), PLAIN, image)
    assert labels.shape == (3000, 4000)
    assert largest.numbers <= image.numel()


# --- runs


def test_a_run_from_pretraining_to_its_files(settings, pretrained, tmp_path, shapes, capsys):
    config = settings()
    config.model.name = config.model.patch_size = None
    config.model.scratch, config.model.checkpoint = False, str(pretrained)
    folder = train(config, "test")
    said = " ".join(capsys.readouterr().out.split())
    assert "has no segmentation head: it is randomly initialized" in said
    assert "12 images (10 classes of pixels, 7 more to evaluate on)" in said
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["task"], summary["steps"]) == ("segmentation", 6)
    assert {"val_miou", "val_pixel_accuracy", "loss", "loss_out", "loss_aux"} <= set(summary["metrics"])
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["val_miou"] == "" for row in rows] == [True, True, False] * 2
    for row in rows:
        assert float(row["loss"]) == pytest.approx(float(row["loss_out"]) + 0.4 * float(row["loss_aux"]), rel=1e-5)
    model = itpn.load(folder / "model.safetensors")
    assert isinstance(model, Segmenter)
    narrow = Segmentation(64, 48)(model, PLAIN, torch.zeros(3, 5, 70, dtype=torch.uint8))  # less than two patches high
    assert narrow.shape == (5, 70)
    assert itpn.inspect(folder / "model.safetensors").classes == NAMES
    last = itpn.load(folder / "checkpoints" / "last.ckpt")
    for name, tensor in model.state_dict().items():
        assert torch.equal(last.state_dict()[name], tensor), name
    assert itpn.load(folder / "model.safetensors", task="pyramid", levels="pooled") is not None

    command = ["evaluate", "segmenter_nano", "--data.root", str(shapes), "--data.num-workers", "0", "--checkpoint"]
    assert main([*command, str(folder / "model.safetensors")]) == 0
    metrics = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    for name in ("miou", "mean_accuracy", "pixel_accuracy"):
        assert metrics[name] == pytest.approx(summary["metrics"][f"val_{name}"], abs=1e-6)
    classes = list(csv.reader((folder / "evaluation" / "classes.csv").open()))
    assert [row[0] for row in classes] == ["class", *NAMES]
    assert {"confusion.csv", "confusion.png"} <= {path.name for path in (folder / "evaluation").iterdir()}

    photo = sorted((shapes / "images" / "validation").iterdir())[0]
    out = tmp_path / "out"
    assert main(["predict", str(folder / "model.safetensors"), str(photo), "--out", str(out)]) == 0
    (answer,) = json.loads((out / "predictions.json").read_text())
    with Image.open(out / answer["labels"]) as labels:
        assert (labels.mode, labels.size) == ("P", (64, 64))
        numbers = np.asarray(labels)
    assert answer["fractions"] == {
        NAMES[n]: pytest.approx((numbers == n).mean()) for n in range(10) if (numbers == n).any()
    }
    # the same as in evaluation
    normalize = Normalize(Pixels(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)))
    image = torch.from_numpy(np.asarray(Image.open(photo).convert("RGB"))).permute(2, 0, 1)
    wanted = Segmentation(64, 48, interpolation="bicubic")(model, normalize, image)
    assert (torch.from_numpy(numbers.copy()) == wanted).float().mean() > 0.99
    assert (out / f"0000-{photo.stem}.png").exists()


def test_early_stopping(settings, monkeypatch, capsys):
    assert_stops_early(settings(), 3, monkeypatch, capsys)


def test_a_stopped_run_resumes_as_if_it_had_not(settings, train_until):
    straight = train(replace(settings(), name="straight"), "test")
    config = replace(settings(), name="stopped")
    train_until(config, 4)
    resumed = train(replace(settings(), name="stopped"), "test")
    one, two = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("neck", ["pyramid", "random"])
def test_a_begun_run_needs_its_start_weights_no_more(settings, trained, train_until, neck):
    config = settings()
    config.model = replace(config.model, name=None, scratch=False, patch_size=None, head_width=None, neck=neck)
    straight, resumed = resume_without_start(config, trained / "model.safetensors", train_until, "corrupt")
    assert_same_run(straight, resumed)


def test_three_starts(settings, pretrained):
    """The pre-trained pyramid, a random one on the pre-trained backbone."""
    found = read_checkpoint(pretrained)
    random = {}
    for neck in ("pyramid", "random"):
        config = settings()
        config.model.neck, config.model.scratch, config.model.checkpoint = neck, False, "set"
        config, _ = resolve_with_head(config, found)
        model, _ = build_segmenter(config, NAMES, found)
        own = named_tensors(model)
        random[neck] = {
            n.partition(".")[0]
            for n, t in own.items()
            if n not in found.tensors or not torch.equal(t, found.tensors[n])
        }
    heads = {"upernet", "classifier", "aux_classifier"}
    assert random == {"pyramid": heads, "random": {*heads, "pyramid"}}


def test_a_segmenter_of_other_classes_is_a_start(settings, trained):
    found = read_checkpoint(trained / "model.safetensors")
    config = settings()
    config.model.scratch, config.model.checkpoint, config.model.head_width = False, "set", 24
    config, notes = resolve_with_head(config, found)
    model, more = build_segmenter(config, ("a", "b", "c"), found)
    notes += more
    own = named_tensors(model)
    new = {name.rpartition(".")[0] for name, t in own.items() if not torch.equal(t, found.tensors[name])}
    assert new == {"classifier", "aux_classifier.4"}
    assert any("the layers that predict classes are randomly initialized" in note for note in notes)
    assert any("the head has 16 channels" in note for note in notes)


@pytest.mark.parametrize("processes", [2])
def test_two_processes_train_and_evaluate_as_one(settings, tmp_path, processes):
    """Seven images on two processes: each once, the same metrics."""
    config = settings(max_steps=2)
    config.data.batch_size = 2
    write_yaml(tmp_path / "config.yaml", "test", config)
    run_command("train", tmp_path / "config.yaml", folder=tmp_path, processes=processes)
    folder = Path(config.output_dir) / "test" / "default"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["processes"], summary["images_seen"]) == (2, 8)
    command = ["evaluate", str(folder / "config.yaml"), "--checkpoint", str(folder / "model.safetensors")]
    assert main(command) == 0
    metrics = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    assert metrics["images"] == 7
    for name in ("miou", "mean_accuracy", "pixel_accuracy"):
        assert metrics[name] == pytest.approx(summary["metrics"][f"val_{name}"], abs=1e-6)


@pytest.mark.parametrize("recipe", ["upernet_itpn-pixel-base_512_160k_ade20k", "segmenter_small"])
def test_the_checkpoint_says_what_labels_mean(settings, shapes, recipe):
    """Metrics are the same by any recipe, though only one of these leaves label 0 out; the run ignored 10 as well."""
    config = settings(max_steps=1)
    config.data.ignore = (10, 255)
    folder = train(config, "test")
    summary = json.loads((folder / "summary.json").read_text())["metrics"]
    command = ["evaluate", recipe, "--data.root", str(shapes), "--data.num-workers", "0"]
    assert main([*command, "--checkpoint", str(folder / "model.safetensors")]) == 0
    metrics = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    assert (metrics["images"], metrics["images_skipped"], metrics["short_side"]) == (7, 0, 64)
    for name in ("miou", "mean_accuracy", "pixel_accuracy"):
        assert metrics[name] == pytest.approx(summary[f"val_{name}"], abs=1e-6)
    assert main([*command, "--checkpoint", str(folder / "model.safetensors"), "--data.ignore", "255"]) == 2


def test_what_was_held_out_is_evaluated(settings, shapes, tmp_path, capsys):
    """Of the folder that the run was trained on; another of one set is evaluated whole."""
    roots = [tmp_path / "own", tmp_path / "other"]
    for root in roots:
        for part, name in (("images", "images"), ("annotations", "masks")):
            shutil.copytree(shapes / part / "training", root / name)
        shutil.copy(shapes / "classes.txt", root)
    config = settings(max_steps=1)
    config.data.root, config.data.val_fraction, config.seed = str(roots[0]), 0.25, 5
    folder = train(config, "test")
    summary = json.loads((folder / "summary.json").read_text())["metrics"]
    for root, count in zip(roots, (3, 12), strict=True):
        # the recipe holds a tenth out
        command = ["evaluate", "segmenter_small", "--data.root", str(root), "--data.num-workers", "0"]
        assert main([*command, "--checkpoint", str(folder / "model.safetensors")]) == 0
        metrics = json.loads((folder / "evaluation" / "evaluation.json").read_text())
        assert metrics["images"] == count
        assert (metrics["miou"] == pytest.approx(summary["val_miou"], abs=1e-6)) == (count == 3)
        assert ("25% held out of" in metrics["data"]) == (count == 3)


# --- recipes


@pytest.mark.parametrize(
    ("name", "model", "size"),
    [
        ("pixel-base_512", "itpn_base_3324", 512),
        ("clip-base_512", "itpn_base_3324", 512),
        ("clip-large_512", "itpn_large_2240", 512),
        ("pixel-large_512", "itpn_large_2240", 512),
        ("clip-large_640", "itpn_large_2240", 640),
    ],
)
def test_published_settings(name, model, size):
    """REFERENCE, section 3: UPerHead on ADE20K."""
    _, config = read_recipe(f"upernet_itpn-{name}_160k_ade20k")
    optimizer, data = config.optimizer, config.data
    assert (config.model.name, config.model.drop_path_rate, config.model.auxiliary_weight) == (model, 0.1, 0.4)
    assert (optimizer.lr, optimizer.weight_decay, optimizer.layer_decay) == (3e-5, 0.05, 0.9)
    assert optimizer.layer_decay_over is None
    assert (data.batch_size * 8, data.img_size, data.short, data.scales) == (16, size, size, (0.5, 2.0))
    assert (data.max_class_fraction, data.photometric, data.hflip) == (0.75, True, 0.5)
    assert (data.reduce_zero_label, config.trainer.max_steps) == (True, 160_000)
    assert int(config.evaluation.stride * 512) == 341
    factor = learning_rate(optimizer, 3e-5, 160_000, 1263)
    assert factor(0) == pytest.approx(1e-6)
    assert factor(750) == pytest.approx(0.5, abs=1e-3)
    assert factor(1500) == 1
    assert factor(80_750) == pytest.approx(0.5)
    assert factor(160_000) == 0


# --- what users get wrong


def break_masks(root: Path) -> str:
    shutil.rmtree(root / "annotations" / "training")
    return "no images with masks to train on"


def break_names(root: Path) -> str:
    (root / "classes.txt").write_text("a\nb\na\n")
    return "two classes of the name a"


def break_labels(root: Path) -> str:
    Image.new("L", (64, 64), 99).save(sorted((root / "annotations" / "training").iterdir())[0])
    return "masks of labels that are neither classes (--data.classes) nor ignored (--data.ignore): 1"


def break_all_but_one(root: Path) -> str:
    for path in sorted((root / "images" / "training").iterdir())[1:]:
        path.unlink()
        (root / "annotations" / "training" / f"{path.stem}.png").unlink()
    return "batch norm needs two images at a time: give more images than one"


def break_pixels(root: Path) -> str:
    for path in (root / "annotations" / "validation").iterdir():
        Image.new("L", (64, 64), 255).save(path)
    return "has a pixel of a class"


def break_sizes(root: Path) -> str:
    Image.new("L", (6, 64), 1).save(sorted((root / "annotations" / "training").iterdir())[0])
    return "masks of another size than their image: 1"


@pytest.mark.parametrize(
    "damage", [break_masks, break_names, break_labels, break_sizes, break_all_but_one, break_pixels]
)
def test_hostile_masks(shapes, tmp_path, damage, capsys):
    root = Path(shutil.copytree(shapes, tmp_path / "ade20k"))
    words = damage(root)
    command = ["train", "segmenter_nano", "--data.root", str(root), "--output-dir", str(tmp_path / "runs")]
    command += [
        "--data.reduce-zero-label",
        "--model.scratch",
        "--model.name",
        "itpn_nano",
        "--data.invalid-annotations",
        "error",
    ]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--data.batch-size 1", "batch norm needs two images at a time"),
        ("--data.scales 2 1", "--data.scales needs two factors above 0"),
        ("--evaluation.stride 0", "--evaluation.stride must be above 0"),
        ("--evaluation.scales 0", "--evaluation.scales must lie between 0.01 and 100, not 0.0"),
        ("--data.val-masks x", "--data.val-masks needs --data.val-root"),
        ("--data.classes nowhere.txt", "file of classes nowhere.txt does not exist"),
        ("--model.head-width 0", "--model.head-width must be at least 1"),
    ],
)
def test_impossible_settings(shapes, options, words, capsys, tmp_path):
    command = ["train", "segmenter_nano", "--data.root", str(shapes), "--output-dir", str(tmp_path / "runs")]
    command += ["--data.reduce-zero-label"]
    assert main([*command, "--model.scratch", "--model.name", "itpn_nano", *options.split()]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_evaluating_what_is_no_segmenter(shapes, trained, pretrained, tmp_path, capsys):
    command = ["evaluate", "segmenter_nano", "--data.root", str(shapes), "--checkpoint"]
    assert main([*command, str(pretrained)]) == 2
    assert "has no segmentation head: fine-tune it first (itpn train segmenter_small)" in capsys.readouterr().err
    other = Path(shutil.copytree(shapes, tmp_path / "other"))
    (other / "classes.txt").write_text((other / "classes.txt").read_text().replace("star", "comet"))
    command[3] = str(other)
    assert main([*command, str(trained / "model.safetensors")]) == 2
    assert "'comet' among the classes of the masks, but not of the model" in capsys.readouterr().err
    assert main([*command, str(trained / "model.safetensors"), "--data.scales", "1", "2"]) == 2
    assert "--data.scales has no meaning here" in capsys.readouterr().err
    # nothing names the labels, but the checkpoint knows; a folder of one set alone
    (other / "classes.txt").unlink()
    for part in ("images", "annotations"):
        shutil.rmtree(other / part / "training")
    assert main([*command, str(trained / "model.safetensors"), "--out", str(tmp_path / "one")]) == 0
    assert json.loads((tmp_path / "one" / "evaluation.json").read_text())["images"] == 7
