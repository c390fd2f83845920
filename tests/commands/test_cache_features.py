"""Runs that are supervised by features: of a CLIP tower in a file, of an EMA of the network, of a cache."""

import csv
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from public import read_golden
from resuming import assert_same_run, losses, run_straight_and_stopped
from safetensors import safe_open
from safetensors.torch import load_file

import itpn
from itpn.cli import main
from itpn.data.cache import FeatureCache, read_index
from itpn.data.files import find_training_images
from itpn.data.image_type import to_pairs
from itpn.errors import UserError
from itpn.masked.targets import normalize_features
from itpn.tasks.configs import PretrainingConfig, TeacherConfig
from itpn.tasks.pretraining.data import make_loader
from itpn.tasks.pretraining.network import build_masked_model
from itpn.tasks.run import train
from itpn.teachers.ema import EMATeacher, momentum_at
from itpn.teachers.timm_teacher import build_teacher
from itpn.training.config import from_dict, image_size, read_yaml

ALL = {"feature_weight": 0.5, "auxiliary_weight": 0.5, "pyramid_weights": (0.1, 0.2, 0.3), "pyramid_head_width": 64}


@pytest.fixture(scope="session")
def tower(tmp_path_factory) -> str:
    """A tiny random CLIP in OpenAI's form: patch 16, 24 numbers a patch."""
    path = tmp_path_factory.mktemp("tower") / "clip.pt"
    torch.save(read_golden("off_clip_teacher")[0]["param"], path)
    return str(path)


@pytest.fixture
def ema(settings):
    def make(**trainer):
        config = settings(**trainer)
        config.model = replace(config.model, mask="block", mask_ratio=0.5, **ALL)
        config.teacher = TeacherConfig("ema", momentum=0.9)
        return config

    return make


@pytest.fixture
def clip(settings, tower):
    """4x4 patches of 8 px; a tower of patch 16 sees them in 64 px."""
    config = settings()
    config.model = replace(config.model, mask="block", mask_ratio=0.5, masked_patches="mask_token", **ALL)
    config.teacher = TeacherConfig("clip", checkpoint=tower)
    config.data.color_jitter = 0.4
    return config


def mistake(capsys) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def rows(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize(("masked_patches", "accumulate", "stop"), [("dropped", 1, 8), ("mask_token", 2, 7)])
def test_a_resumed_run_with_an_ema_and_block_masks_is_the_same(ema, monkeypatch, masked_patches, accumulate, stop):
    config = ema(accumulate_grad_batches=accumulate)
    config.model.masked_patches = masked_patches
    straight, resumed = run_straight_and_stopped(config, monkeypatch, stop)
    assert_same_run(straight, resumed)
    assert losses(straight) == losses(resumed)
    states = [torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (straight, resumed)]
    copies = [name for name in states[0] if name.startswith("ema_teacher.")]
    assert copies
    assert all(torch.equal(states[0][name], states[1][name]) for name in copies)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_ema_moves_once_a_step(ema, monkeypatch, accumulate):
    """By hand from the weights after each step; and the weights that are written know nothing of it."""
    name, seen = "backbone.stages.2.0.attn.qkv.weight", []

    def update(self, model, momentum, original=EMATeacher.update):
        seen.append((momentum, model.get_parameter(name).detach().clone()))
        original(self, model, momentum)

    monkeypatch.setattr(EMATeacher, "update", update)
    config = ema(accumulate_grad_batches=accumulate)
    run = train(config, "test")
    assert len(seen) == 18 // accumulate
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    average = torch.zeros(())
    for step, (momentum, weight) in enumerate(seen):
        assert momentum == momentum_at(step, len(seen), 0.9, 1.0)  # 0 at first: no random start is left
        average = momentum * average + (1 - momentum) * weight
    torch.testing.assert_close(state["state_dict"][f"ema_teacher.ema.module.{name}"], average)
    assert not any("ema" in key for key in load_file(run / "model.safetensors"))
    trained = [p for p in itpn.load(run / "model.safetensors").parameters() if p.requires_grad]
    assert len(state["optimizer_states"][0]["state"]) == len(trained)


def test_metrics_of_every_loss_and_level(ema):
    config = ema()
    run = train(config, "test")
    row = rows(run)[-1]
    weights = {"pixel": 1.0, "feature": 0.5, "auxiliary": 0.5, "pyramid_1": 0.1, "pyramid_2": 0.2, "pyramid_3": 0.3}
    assert row["loss"] == pytest.approx(sum(weight * row[f"loss_{name}"] for name, weight in weights.items()), rel=1e-5)
    for name in list(weights)[1:]:
        assert 0 < row[f"target_std_{name}"] < 2


def test_a_collapse_is_said_once(ema, capsys):
    config = ema()
    config.teacher.min_std = 5.0
    train(config, "test")
    assert " ".join(capsys.readouterr().out.split()).count("the teacher is collapsing: target_std_") == 1


def test_a_tower_in_a_file(clip):
    config = clip
    run = train(config, "test")
    assert json.loads((run / "summary.json").read_text())["finished"]
    assert rows(run)[-1]["loss_feature"] < rows(run)[0]["loss_feature"]
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"model"}  # no teacher in it
    model = itpn.load(run / "model.safetensors")  # without the tower's file, were it gone
    assert model.decoder.heads["feature"].out_features == 24


@pytest.fixture
def other_tower(tower, tmp_path) -> str:
    """The same tower with other weights."""
    tensors = torch.load(tower, weights_only=True)
    torch.save({name: tensor * 1.01 for name, tensor in tensors.items()}, tmp_path / "other.pt")
    return str(tmp_path / "other.pt")


def test_a_run_knows_its_teachers_weights(clip, other_tower):
    """By their SHA-256, in all that it writes; and resumes with no others."""
    digest = hashlib.sha256(Path(clip.teacher.checkpoint).read_bytes()).hexdigest()
    clip.teacher.name, clip.trainer.max_epochs = "auto", 1
    run = train(clip, "test")
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["teacher"], summary["teacher_sha256"]) == ("clip", digest)
    with safe_open(run / "model.safetensors", "pt") as weights:
        held = json.loads(weights.metadata()["settings"])
    for settings in (held, read_yaml(run / "config.yaml").values):
        assert (settings["teacher"]["name"], settings["teacher"]["sha256"]) == ("clip", digest)
    clip.trainer.max_epochs = 2
    message = rf"have the SHA-256 [0-9a-f]{{64}}, not {digest}: give those weights, or others to a run of another --n"
    with pytest.raises(UserError, match=message):
        train(replace(clip, teacher=replace(clip.teacher, checkpoint=other_tower)), "test")
    train(clip, "test")
    with pytest.raises(UserError, match=message.replace(digest, "0" * 64)):
        train(replace(clip, name="given", teacher=replace(clip.teacher, sha256="0" * 64)), "test")


def test_a_cache_of_other_weights_is_told_apart(clip, tmp_path, other_tower, capsys):
    out, clip.trainer.max_epochs = tmp_path / "cache", 1
    assert main(cache_arguments(clip, out)) == 0
    digest = hashlib.sha256(Path(clip.teacher.checkpoint).read_bytes()).hexdigest()
    assert read_index(out).sha256 == digest
    arguments = cache_arguments(clip, out)
    Path(other_tower).replace(tmp_path / "clip.pt")
    arguments[arguments.index(clip.teacher.checkpoint)] = str(tmp_path / "clip.pt")
    assert main(arguments) == 2
    assert "holds features with checkpoint" in mistake(capsys)
    cached = replace(clip, data=replace(clip.data, root=(str(out),)), name="cached")
    other = replace(clip.teacher, checkpoint=str(tmp_path / "clip.pt"))
    with pytest.raises(UserError, match=rf"holds features for weights of the SHA-256 {digest}, not [0-9a-f]{{64}}$"):
        train(replace(cached, teacher=other), "test")
    for name, teacher in (("auto", TeacherConfig("auto")), ("file", replace(clip.teacher, name="auto"))):
        run = train(replace(cached, teacher=teacher, name=name), "test")
        assert json.loads((run / "summary.json").read_text())["teacher_sha256"] == digest
        assert read_yaml(run / "config.yaml").values["teacher"]["name"] == "clip"
    index = json.loads((out / "itpn-features.json").read_text())  # of a version that knew no SHA-256
    (out / "itpn-features.json").write_text(json.dumps({key: index[key] for key in index if key != "sha256"}))
    train(replace(cached, teacher=other, name="earlier"), "test")


def test_a_folder_of_transformers_teaches(clip, tmp_path, capsys):
    """By --teacher.checkpoint alone, which says what it is."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**sizes, num_register_tokens=4))
    model.save_pretrained(tmp_path / "dinov3")
    arguments = cache_arguments(clip, tmp_path / "cache")
    arguments = ["train", *(a for a in arguments[1:] if a not in ("--out", str(tmp_path / "cache")))]
    place = arguments.index("--teacher.name")
    arguments[place : place + 4] = ["--teacher.checkpoint", str(tmp_path / "dinov3")]
    arguments += ["--output-dir", str(tmp_path / "runs"), "--trainer.max-steps", "3", "--trainer.accelerator", "cpu"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    licence = "licence of the weights of teacher dinov3_vit: dinov3-license for those that its authors published"
    assert " ".join((said.out + said.err).split()).count(licence) == 1
    assert f"dinov3_vit, {tmp_path}/dinov3" in "".join(said.out.split("\n"))
    summary = json.loads((tmp_path / "runs/itpn-pixel_nano/default/summary.json").read_text())
    assert summary["teacher"] == "dinov3_vit"
    (tmp_path / "dinov3/config.json").unlink()
    assert main([*arguments, "--name", "other"]) == 2
    assert mistake(capsys) == (
        f"itpn: teacher checkpoint {tmp_path}/dinov3 has no config.json: give a folder with config.json and "
        "model.safetensors"
    )


def test_a_tower_resumes_to_the_bit(clip, monkeypatch):
    assert_same_run(*run_straight_and_stopped(clip, monkeypatch, 8))


def cache_arguments(config, out) -> list[str]:
    return [
        *("cache-features", "itpn-pixel_nano", "--out", str(out), "--data.root", *config.data.root),
        *("--data.img-size", "32", "--model.masked-patches", "mask_token", "--model.mask-ratio", "0.5"),
        *("--model.feature-weight", "1", "--teacher.name", "clip", "--teacher.checkpoint", config.teacher.checkpoint),
        *("--data.color-jitter", "0.4", "--data.num-workers", "0", "--data.batch-size", "5"),
    ]


def test_cached_features_give_the_loss_of_the_live_teacher(clip, tmp_path, capsys):
    out = tmp_path / "cache"
    assert main([*cache_arguments(clip, out), "--views", "2"]) == 0
    assert "52 crops (2 of each image)" in " ".join(capsys.readouterr().out.split())
    cache = FeatureCache(out)
    source = find_training_images(clip.data.root)
    one = replace(clip, data=replace(clip.data, batch_size=1))
    live = make_loader(one, source, 0, 1, (64, 64))
    batches = [batch for _ in range(2) for batch in live]
    teacher = build_teacher("clip", clip.teacher.checkpoint, (4, 4))
    model = build_masked_model(clip.model, image_size(clip.data), replace(clip.teacher, width=24)).eval()
    mask = torch.arange(16).repeat(1, 1) % 3 == 0
    for number, batch in enumerate(batches):
        image, feature, key = cache[number]
        assert key == batch["key"][0]
        assert torch.equal(image, batch["image"][0])
        targets = [normalize_features(x) for x in (feature[None], teacher(batch["teacher_image"]))]
        x = image[None] / 255
        losses = [model(x, mask, dict.fromkeys(model.feature_losses, target)).loss for target in targets]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    assert len(batches) == len(cache) == 52

    cached = replace(clip, data=replace(clip.data, root=(str(out),)), name="cached")
    run = train(cached, "test")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"]
    assert rows(run)[-1]["loss_feature"] < rows(run)[0]["loss_feature"]


def test_colours_of_other_images_are_not_jittered(clip, tmp_path, capsys):
    """Of a recipe for photographs: each channel is, as in training."""
    folder = tmp_path / "bands"
    folder.mkdir()
    values = np.random.default_rng(0).integers(0, 3000, (5, 40, 44), dtype=np.uint16)
    np.save(folder / "a.npy", values)
    clip.data.root = (str(folder),)
    assert main([*cache_arguments(clip, tmp_path / "cache"), "--teacher.channels", "3", "2", "1"]) == 0
    words = "images of 5 channels of uint16 are augmented by --data.channel-jitter 0.4"
    assert words in " ".join(capsys.readouterr().err.split())
    settings = read_index(tmp_path / "cache").settings
    assert (settings["color_jitter"], settings["channel_jitter"]) == (0.0, 0.4)


def test_crops_of_other_images_are_cached_as_they_are(clip, tmp_path, capsys):
    """The teacher sees three channels in the range of values, and training takes the statistics over."""
    folder, out = tmp_path / "bands", tmp_path / "cache"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        values = rng.integers(0, 3000, (5, 40, 44)) + 100 * np.arange(5)[:, None, None]
        np.save(folder / f"{number:02d}.npy", values.astype(np.uint16))
    clip.data.root, clip.data.color_jitter = (str(folder),), 0.0
    arguments = [*cache_arguments(clip, out), "--data.color-jitter", "0"]
    assert main(arguments) == 2
    assert mistake(capsys) == (
        "itpn: teacher clip sees red, green and blue, and the images have 5 channels: say which it sees as these, "
        "counted from 0, e.g. --teacher.channels 3 2 1"
    )
    arguments += ["--teacher.channels", "3", "2", "1"]
    assert main(arguments) == 0
    image, feature, _ = FeatureCache(out)[0]
    assert (image.dtype, image.shape) == (torch.uint16, (5, 32, 32))
    stored = read_index(out).settings["pixels"]
    assert (stored["dtype"], stored["channels"], len(stored["mean"])) == ("uint16", 5, 5)
    live = replace(clip, teacher=replace(clip.teacher, channels=(3, 2, 1)), name="live")
    runs = [train(live, "test"), train(replace(live, data=replace(clip.data, root=(str(out),)), name="cached"), "test")]
    for run in runs:
        config = from_dict(read_yaml(run / "config.yaml").values, PretrainingConfig)
        assert (config.model.in_chans, config.data.dtype) == (5, "uint16")
        assert list(config.data.mean) == stored["mean"]
        assert list(config.data.value_range) == stored["value_range"]
    one = replace(config, data=replace(config.data, root=clip.data.root, batch_size=1))
    seen = next(iter(make_loader(one, find_training_images(clip.data.root), 0, 1, (64, 64))))["teacher_image"]
    low, high = torch.tensor(to_pairs(stored["value_range"], 5))[[3, 2, 1]].reshape(3, 2, 1, 1).unbind(1)
    rgb = ((seen[:, [3, 2, 1]].float() - low) / (high - low)).clamp(0, 1)
    teacher = build_teacher("clip", clip.teacher.checkpoint, (4, 4))
    torch.testing.assert_close(feature[None], teacher(rgb), rtol=1e-4, atol=1e-5)


def test_windows_are_not_cached(clip, tmp_path, capsys):
    assert main([*cache_arguments(clip, tmp_path / "cache"), "--data.window-size", "96"]) == 2
    assert mistake(capsys) == "itpn: --data.window-size is not for features that are cached: leave it out"


def test_caching_resumes_where_it_stopped(clip, tmp_path, monkeypatch, capsys):
    import itpn.tasks.pretraining.caching as caching

    monkeypatch.setattr(caching, "SHARD_SIZE", 8)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert main(cache_arguments(clip, straight)) == 0
    with monkeypatch.context() as patch:
        original, count = caching.write_shard, iter(range(100))

        def write_shard(*args):
            if next(count) == 2:
                raise KeyboardInterrupt
            original(*args)

        patch.setattr(caching, "write_shard", write_shard)
        assert main(cache_arguments(clip, stopped)) == 130
    with pytest.raises(UserError, match="are not complete"):
        FeatureCache(stopped)
    assert main(cache_arguments(clip, stopped)) == 0
    assert "2 of 4 shards are there already" in " ".join(capsys.readouterr().out.split())
    for path in straight.iterdir():
        assert path.read_bytes() == (stopped / path.name).read_bytes()


def test_half_the_space(clip, tmp_path):
    sizes = []
    for name, option in (("whole", []), ("half", ["--half"])):
        assert main([*cache_arguments(clip, tmp_path / name), *option]) == 0
        _, feature, _ = FeatureCache(tmp_path / name)[0]
        sizes.append(feature.dtype)
    assert sizes == [torch.float32, torch.float16]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--teacher.name", "ema"], "only features of an outside teacher"),
        (["--views", "0"], "--views must be at least 1"),
        (["--data.img-sise", "32"], "did you mean --data.img-size"),
        (["--viewz", "2"], "did you mean --views"),
        (["--data.img-size", "48"], "holds features with img_size (32, 32), not (48, 48)"),
        (["--data.hflip", "0"], "holds features with hflip 0.5, not 0.0"),
    ],
)
def test_mistakes_in_caching(clip, tmp_path, capsys, change, message):
    arguments = cache_arguments(clip, tmp_path / "cache")
    if "ema" in change:
        arguments = [a for a in arguments if a not in ("--teacher.checkpoint", clip.teacher.checkpoint)]
    if "holds" in message:
        assert main(arguments) == 0
    assert main([*arguments, *change]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_cache_of_something_else_is_refused(clip, tmp_path, tower):
    out = tmp_path / "cache"
    assert main(cache_arguments(clip, out)) == 0
    cached = replace(clip, data=replace(clip.data, root=(str(out),)))
    with pytest.raises(UserError, match=r"holds features for --data.img-size \(32, 32\), not \(48, 48\)"):
        train(replace(cached, data=replace(cached.data, img_size=48)), "test")
    with pytest.raises(UserError, match=r"for --teacher.name clip, not vit_tiny_patch16_224"):
        train(replace(cached, teacher=TeacherConfig("vit_tiny_patch16_224", checkpoint=tower)), "test")
    shard = out / "features-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    for workers in (0, 1):
        cached.data.num_workers = workers
        with pytest.raises(UserError, match=r"^\S+ is corrupt") as error:
            train(replace(cached, name=f"corrupt-{workers}"), "test")
        assert "Traceback" not in str(error.value)
    shard.unlink()
    with pytest.raises(UserError, match="is missing: repeat"):
        train(replace(cached, name="missing"), "test")


def test_a_cache_needs_its_teacher_no_more(clip, tmp_path):
    """Nor its file, nor its place: features are taken to another machine."""
    out = tmp_path / "cache"
    assert main(cache_arguments(clip, out)) == 0
    cached = replace(clip, data=replace(clip.data, root=(str(out),)), teacher=TeacherConfig("clip"))
    run = train(cached, "test")
    assert itpn.load(run / "model.safetensors").decoder.heads["feature"].out_features == 24


def test_an_epoch_is_one_view(clip, tmp_path):
    out = tmp_path / "cache"
    assert main([*cache_arguments(clip, out), "--views", "2"]) == 0
    loader = make_loader(clip, find_training_images([out]), 0, 1)
    assert loader.images == 26
    epochs = [
        [(key, image) for batch in loader for key, image in zip(batch["key"], batch["image"], strict=True)]
        for _ in range(3)
    ]
    for epoch in epochs:
        assert len({key for key, _ in epoch}) == 24  # six batches of four; two images are left out
    views = [dict(epoch) for epoch in epochs]
    shared = views[0].keys() & views[1].keys() & views[2].keys()
    assert all(torch.equal(views[0][key], views[2][key]) for key in shared)
    assert not any(torch.equal(views[0][key], views[1][key]) for key in shared)


def test_caching_stops_at_too_many_corrupt_images(clip, tmp_path, capsys):
    folder = tmp_path / "photos"
    shutil.copytree(clip.data.root[0], folder)
    for i in range(5):
        (folder / f"corrupt-{i}.png").write_bytes(b"no image")
    clip.data.root = (str(folder),)
    assert main(cache_arguments(clip, tmp_path / "cache")) == 2
    assert "5 of 31 images cannot be read" in capsys.readouterr().err


def test_features_alone_in_bf16_and_their_visualizations(clip, tmp_path, capsys):
    """The published CLIP objective through training, visualizations and `itpn predict`, which has no teacher."""
    published = {"mask_ratio": 75 / 196, "masked_laterals": True, "decoder_depth": 0, "feature_loss": "cosine"}
    weights = {"pixel_weight": 0.0, "feature_weight": 1.0, "auxiliary_weight": 0.0, "pyramid_weights": (0.0, 0.0, 0.0)}
    clip.model = replace(clip.model, **published, **weights)
    clip.trainer.precision = "bf16-mixed"
    run = train(clip, "test")
    assert -1 < rows(run)[-1]["loss"] < rows(run)[0]["loss"] < 1
    image = Image.open(run / "reconstructions/step-00000018.png")
    assert image.size == (8 * (224 + 4) + 4, 4 * (224 + 4) + 4 + 20)  # two sets of four columns
    out = tmp_path / "drawn"
    assert main(["predict", str(run / "model.safetensors"), *clip.data.root, "--out", str(out)]) == 0
    assert Image.open(out / "prediction-0000.png").size[0] == 6 * (224 + 4) + 4  # three: nobody knows the features
    assert "prediction-0000.png" in capsys.readouterr().out


def test_the_recipe_comes_first(capsys):
    assert main(["cache-features", "--out", "x", "itpn-pixel_nano"]) == 2
    assert capsys.readouterr().err == "itpn: the recipe comes first: itpn cache-features RECIPE --out ...\n"
