"""Settings on their way: out to YAML and back, and the impossible ones found."""

import dataclasses
import math
import re
from dataclasses import FrozenInstanceError, replace
from functools import partial
from typing import get_type_hints

import pytest

import itpn
from itpn.cli import main
from itpn.commands.parsing import read_fields
from itpn.data.files import find_images
from itpn.errors import UserError
from itpn.tasks.configs import (
    ClassificationConfig,
    DetectionConfig,
    PretrainingConfig,
    PretrainingDataConfig,
    PretrainingModelConfig,
    SegmentationConfig,
    TeacherConfig,
    TrainerConfig,
)
from itpn.tasks.pretraining import caching
from itpn.tasks.recipe_files import list_recipes, read_recipe, read_settings
from itpn.tasks.run import train
from itpn.training import launch, loop, profiling
from itpn.training.config import check_types, from_dict, to_dict, write_yaml


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_is_possible_and_survives_yaml(name, tmp_path):
    recipe, config = read_recipe(name)
    assert recipe == name
    if not isinstance(config, PretrainingConfig) and not config.model.scratch:
        with pytest.raises(UserError, match=r"give the weights to start from as --model\.checkpoint FILE"):
            config.check()
        (tmp_path / "weights.pth").touch()
        config.model.checkpoint = str(tmp_path / "weights.pth")
    config.check()
    config.data.img_size, config.optimizer.lr, config.data.root = 96, 1e-5, "a"
    if not isinstance(config, DetectionConfig | SegmentationConfig):
        config.data.img_size, config.data.root = (64, 96), ("a", "b")
    write_yaml(tmp_path / "config.yaml", name, config)
    assert read_settings(tmp_path / "config.yaml") == (name, config)


@pytest.mark.parametrize("setting", ["name", "output-dir", "data.root", "teacher.checkpoint"])
def test_a_zero_byte_is_no_part_of_a_name(tmp_path, capsys, setting):
    """Not from a shell, but from Python, and from the escapes of a config.yaml."""
    assert main(["train", "itpn-pixel_nano", f"--{setting}", "a\0b"]) == 2
    error = capsys.readouterr().err
    assert (error.count("\n"), "'a\\x00b' holds a zero byte" in error) == (1, True)

    config = PretrainingConfig()
    section, _, name = setting.replace("-", "_").rpartition(".")
    setattr(getattr(config, section) if section else config, name, ("a\0b",) if name == "root" else "a\0b")
    write_yaml(tmp_path / "config.yaml", "test", config)
    assert main(["train", str(tmp_path / "config.yaml")]) == 2
    error = capsys.readouterr().err
    assert (error.count("\n"), f"{setting.replace('-', '_')} holds a zero byte" in error) == (1, True)


@pytest.mark.parametrize(
    "arguments",
    [
        *(["train", "a\0"], ["inspect", "a\0"], ["predict", "a\0", "b"], ["predict", "a", "b\0"], ["info", "a\0"]),
        *(["convert", "a", "b\0.pth"], ["export", "a", "--out", "b\0.onnx"], ["shrink", "a\0", "--out", "b"]),
        *(["demo", "--output-dir", "a\0"], ["evaluate", "classifier_small", "--checkpoint", "a\0"]),
    ],
)
def test_a_zero_byte_in_any_command(capsys, arguments):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert (error.count("\n"), "holds a zero byte" in error) == (1, True)


def test_published_settings():
    """REFERENCE, section 3: pixel pre-training."""
    for size in ("base", "large"):
        for epochs in (400, 800, 1600):
            _, config = read_recipe(f"itpn-pixel_hivit-{size}-p16_8xb512-amp-coslr-{epochs}e_in1k")
            model, data, optimizer = config.model, config.data, config.optimizer
            assert (model.name, model.mask_ratio, model.decoder_depth) == (f"itpn_{size}", 0.75, 6)
            assert (model.decoder_embed_dim, model.decoder_num_heads, model.patch_size) == (512, 16, 16)
            assert (data.batch_size, data.img_size, data.crop_scale, data.hflip) == (512, 224, (0.2, 1.0), 0.5)
            assert (data.root, data.interpolation) == (("data/imagenet",), "bicubic")
            assert (optimizer.base_lr, optimizer.betas, optimizer.weight_decay) == (1.5e-4, (0.9, 0.95), 0.05)
            assert (optimizer.warmup_epochs, optimizer.warmup_start, optimizer.min_lr) == (40, 1e-4, 0.0)
            assert (config.trainer.max_epochs, model.drop_path_rate, optimizer.clip_grad) == (epochs, 0.0, None)


@pytest.mark.parametrize(("epochs", "beta", "drop_path"), [(300, 0.98, 0.0), (800, 0.999, 0.1)])
def test_settings_of_mmpretrains_clip(epochs, beta, drop_path):
    """REFERENCE, sections 2 and 3; the cosine in both, where one of mmpretrain's files has a slip."""
    _, config = read_recipe(f"itpn-clip-b_hivit-base-p16_8xb256-amp-coslr-{epochs}e_in1k")
    model, data, optimizer = config.model, config.data, config.optimizer
    assert (model.name, model.init_values, model.drop_path_rate, model.rel_pos_bias) == (
        "itpn_base",
        0.1,
        drop_path,
        True,
    )
    assert (model.mask, round(196 * model.mask_ratio), model.masked_patches) == ("block", 75, "mask_token")
    assert (model.feature_loss, model.feature_patches, model.masked_laterals) == ("cosine", "masked", True)
    assert (model.pixel_weight, model.feature_weight, model.auxiliary_weight) == (0.0, 1.0, 0.0)
    assert (model.decoder_embed_dim, model.decoder_depth, model.pyramid_depth) == (512, 0, None)
    assert (data.batch_size, data.color_jitter, data.crop_scale, data.hflip) == (256, 0.4, (0.2, 1.0), 0.5)
    assert optimizer.base_lr * 2048 / 256 == pytest.approx(1.5e-3)
    assert (optimizer.betas, optimizer.weight_decay, optimizer.clip_grad) == ((0.9, beta), 0.05, 3.0)
    assert (optimizer.warmup_epochs, optimizer.min_lr, config.trainer.max_epochs) == (10, 1e-5, epochs)
    assert config.teacher.name == "vit_base_patch16_clip_quickgelu_224.openai"
    assert not config.teacher.normalize


@pytest.mark.parametrize("teacher", ["b", "l"])
@pytest.mark.parametrize(("model", "width", "drop_path"), [("base-3324", 512, 0.1), ("large-2240", 768, 0.2)])
@pytest.mark.parametrize("size", [224, 256])
def test_settings_of_the_official_clip(teacher, model, width, drop_path, size):
    name = f"itpn-clip-{teacher}_hivit-{model}-p16_8xb256-amp-coslr-800e_in1k" + ("-256px" if size == 256 else "")
    _, config = read_recipe(name)
    assert config.model.name == f"itpn_{model.replace('-', '_')}"
    assert (config.model.feature_loss, config.model.feature_patches) == ("smooth_l1", "all")
    assert (config.model.feature_weight, config.model.auxiliary_weight) == (1.0, 1.0)
    assert (config.model.decoder_embed_dim, config.model.drop_path_rate) == (width, drop_path)
    assert (config.model.pyramid_depth, config.data.img_size) == (1, size)
    assert config.teacher.normalize
    assert config.teacher.name.startswith(f"vit_{'base_patch16' if teacher == 'b' else 'large_patch14'}_clip")


def test_masked_feature_modelling_is_added_to_pixels():
    for name in ("nano", "tiny", "hivit-base-p16_8xb512-amp-coslr-800e_in1k"):
        _, config = read_recipe(f"itpn-mfm_{name}")
        _, pixel = read_recipe(f"itpn-pixel_{name}")
        assert config.teacher.name == "ema"
        assert all(weight > 0 for weight in config.model.pyramid_weights)
        config.teacher, config.model.pyramid_weights = pixel.teacher, pixel.model.pyramid_weights
        config.model.pyramid_head_width = pixel.model.pyramid_head_width
        assert config == pixel


@pytest.mark.parametrize(
    ("model", "teacher", "message"),
    [
        ({"pixel_weight": 0.0}, {}, "nothing is predicted"),
        ({"pixel_weight": -1.0}, {}, "--model.pixel-weight must be at least 0"),
        ({"feature_weight": 1.0}, {}, "needs a teacher"),
        ({"feature_weight": 1.0}, {"name": "clip", "sha256": "12"}, "--teacher.sha256 must have 64 digits from 0 to f"),
        ({}, {"checkpoint": "."}, "teacher auto has nothing to do"),
        ({}, {"name": "ema"}, "has nothing to do"),
        ({"masked_laterals": True}, {}, "needs --model.masked-patches mask_token"),
        ({"masked_laterals": True, "masked_patches": "mask_token"}, {}, "shows the pixels"),
        ({"decoder_depth": 0}, {}, "without attention to the others"),
        (
            {"pyramid_weights": (1.0, 0.0, 0.0), "pyramid_head_depth": 0},
            {"name": "ema"},
            "--model.pyramid-head-depth 0",
        ),
        ({"pyramid_weights": (1.0, 0.0, -1.0)}, {"name": "ema"}, "--model.pyramid-weights must be at least 0"),
        ({"pyramid_head_width": 96}, {}, "divisible by 64"),
        ({"pixel_weight": 0.0, "pyramid_weights": (0.0, 0.0, 1.0)}, {"name": "ema"}, "would stay untrained"),
        ({"pixel_weight": 0.0, "auxiliary_weight": 1.0}, {"name": "ema"}, "would stay untrained"),
        ({"feature_weight": 1.0}, {"name": "clip", "checkpoint": "none.pt"}, "none.pt does not exist"),
        ({"feature_weight": 1.0}, {"name": "ema", "checkpoint": __file__}, "has no meaning"),
        ({"feature_weight": 1.0}, {"name": "ema", "momentum": 0.9, "momentum_end": 0.8}, "in this order"),
        ({"feature_weight": 1.0}, {"name": "ema", "momentum": 1.5}, "between 0 and 1"),
    ],
)
def test_impossible_objectives(model, teacher, message):
    config = PretrainingConfig(model=PretrainingModelConfig(**model), teacher=TeacherConfig(**teacher))
    with pytest.raises(UserError, match=message):
        config.check()


def test_numbers_as_people_write_them_in_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: mine\noptimizer: {lr: 1e-3}\ndata: {root: [photos]}\n")
    assert read_settings(path)[1].optimizer.lr == 1e-3
    for text in ("recipe: x\nmodle: {}\n", "model: {}\n", "[1]", "recipe: x\noptimizer: {lr: fast}", "a: ["):
        path.write_text(text)
        with pytest.raises(UserError):
            read_settings(path)
    with pytest.raises(UserError, match=r"unknown setting model\.nane"):
        from_dict({"model": {"nane": "x"}}, PretrainingConfig)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("data", "root", "photos"),
        ("data", "img_size", (64,)),
        ("data", "std", (0.0, 0.0, 0.0)),
        ("data", "hflip", 2.0),
        ("data", "crop_scale", (0.5, 0.2)),
        ("data", "crop_ratio", (0.0, 1.0)),
        ("model", "decoder_num_heads", 0),
        ("model", "pyramid_width", 0),
        ("model", "drop_path_rate", 1.5),
        ("model", "pos_embed", "none"),
        ("optimizer", "betas", (2.0, 0.9)),
        ("optimizer", "clip_grad", -1.0),
        ("optimizer", "lr", float("nan")),
        ("trainer", "max_epochs", "3"),
        ("trainer", "devices", 0),
        ("trainer", "precision", "half"),
    ],
)
def test_impossible_settings(section, field, value):
    config = PretrainingConfig()
    setattr(getattr(config, section), field, value)
    with pytest.raises(UserError) as error:
        config.check()
    assert field.replace("_", "-") in str(error.value).replace("_", "-")
    assert "\n" not in str(error.value)


def numbers_of(settings, section=""):
    """All settings that hold a number: section, name, int or float, and how it is put in the setting's place."""
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        own, hint = getattr(settings, field.name), str(hints[field.name])
        if dataclasses.is_dataclass(own):
            yield from numbers_of(own, field.name)
            continue
        alone = re.sub(r"tuple\[.*?\]", "", hint)
        for kind in (int, float):
            if kind.__name__ in alone.replace("<class ", ""):
                yield section, field.name, kind, lambda value: value
            if kind.__name__ in hint and kind.__name__ not in alone:
                length = len(own) if isinstance(own, tuple) else 2 if "..." in hint else hint.count(kind.__name__)
                yield section, field.name, kind, lambda value, length=length: (value,) * length


@pytest.mark.parametrize("cls", [PretrainingConfig, ClassificationConfig, DetectionConfig, SegmentationConfig])
def test_every_number_has_bounds(cls):
    """A larger one overflows in C++, takes all memory, or is never at an end."""
    found = list(numbers_of(cls()))
    assert len(found) > 30
    for section, name, kind, put in found:
        values = (10**23, -(10**23), 10**5000) if kind is int else (math.nan, math.inf, -math.inf, 1e308, 10**400)
        for value in values:
            config = cls()
            setattr(getattr(config, section) if section else config, name, put(value))
            with pytest.raises(UserError, match=r"must (be|lie)") as error:
                check_types(config)
            option = f"--{section}.{name}" if section else f"--{name}"
            assert str(error.value).startswith(option.replace("_", "-"))
            assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("option", "value", "most"),
    [
        ("data.num-workers", "1025", "1024"),
        ("data.batch-size", "99999999999", "1048576"),
        ("trainer.devices", "1000001", "1024"),
        ("trainer.num-nodes", "1000001", "100000"),
        ("model.patch-size", "4000000000", "1024"),
        ("model.pyramid-width", "99999999999999999999999", "32768"),
        ("model.pyramid-depth", "99999999999999999999999", "1000"),
        ("model.decoder-depth", "99999999999999999999999", "1000"),
        ("model.gather-window", "99999999999999999999999", "1024"),
        ("data.img-size", "1000000", "16384"),
    ],
)
def test_a_number_that_no_machine_can_serve(capsys, option, value, most):
    assert main(["train", "itpn-pixel_nano", f"--{option}", value]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--{option} must lie between " in error
    assert f" and {most}, not {value}" in error


def test_more_processes_than_cores_can_serve(monkeypatch):
    monkeypatch.setattr(launch, "count_cores", lambda: 2)
    settings = TrainerConfig(accelerator="cpu", devices=17)
    with pytest.raises(
        UserError, match=r"--trainer\.devices 17 are more .* this machine has 2 cores, so give 16 at most"
    ):
        launch.choose_devices(settings, launch.read_launch())
    assert launch.choose_devices(replace(settings, devices=16), launch.read_launch()).processes == 16


@pytest.mark.parametrize("ratio", [math.nan, math.inf, -math.inf, 1e308, -1.0, 1.5])
def test_a_mask_ratio_that_is_no_fraction(ratio):
    with pytest.raises(UserError, match=r"--model\.mask-ratio must"):
        itpn.get_model("itpn-pixel_nano", mask_ratio=ratio)


def test_everything_is_an_option():
    options = [field.options[0] for field in read_fields(PretrainingConfig)]
    assert len(options) == len(set(options))
    flat = sum(len(v) if isinstance(v, dict) else 1 for v in to_dict(PretrainingConfig()).values())
    assert len(options) == flat - 1
    assert "--data.dtype" not in options  # which only images decide
    assert {"--data.root", "--data.batch-size", "--data.num-workers", "--data.img-size", "--model.checkpoint"} <= {
        *options
    }
    assert {"--optimizer.lr", "--trainer.max-epochs", "--trainer.max-steps", "--trainer.precision"} <= {*options}
    assert {"--trainer.checkpoint-every-n-steps", "--seed", "--name", "--output-dir"} <= {*options}
    assert PretrainingDataConfig().root == ("data/imagenet",)


@pytest.mark.parametrize("place", ["run", "module", "profile", "cache"])
def test_settings_are_frozen_once_they_are_resolved(settings, tmp_path, monkeypatch, place):
    seen = []

    def stop(config, *_):
        seen.append(config)
        raise UserError("seen")

    config = settings(max_steps=1)
    command = partial(train, config, "test")
    if place == "run":
        monkeypatch.setattr("itpn.tasks.run.fit", lambda job, folder, notes: stop(job.module.config))
    elif place == "module":
        monkeypatch.setattr(loop, "run_job", lambda fabric, console, folder, job, newest: stop(job.module.config))
    elif place == "profile":
        command = partial(train, config, "test", profile=True)
        monkeypatch.setattr(profiling, "set_up", lambda fabric, console, folder, job: stop(job.module.config))
    else:
        config.teacher.name, config.model.feature_weight = "vit_tiny_patch16_224", 1.0
        monkeypatch.setattr(caching, "make_frozen_teacher", stop)
        source = find_images(config.data.root)
        command = partial(caching.cache_features, config, source, tmp_path / "cache", 1, False)
    with pytest.raises(UserError, match="seen"):
        command()
    for part, name in ((seen[0], "seed"), (seen[0].optimizer, "lr"), (seen[0].data, "img_size")):
        with pytest.raises(FrozenInstanceError):
            setattr(part, name, 1)
