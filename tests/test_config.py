"""Settings on their way: out to YAML and back, and the impossible ones found."""

import pytest

from itpn.config import Config, DataConfig, check, from_dict, option_names, read_yaml, to_dict, write_yaml
from itpn.errors import UserError
from itpn.recipes import list_recipes, read_recipe


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_is_possible_and_survives_yaml(name, tmp_path):
    recipe, config = read_recipe(name)
    assert recipe == name
    check(config)
    config.data.img_size, config.optimizer.lr, config.data.root = (64, 96), 1e-5, ("a", "b")
    write_yaml(tmp_path / "config.yaml", name, config)
    assert read_yaml(tmp_path / "config.yaml") == (name, config)


def test_published_settings():
    """REFERENCE, section 3: pixel pre-training."""
    for size in ("base", "large"):
        for epochs in (400, 800, 1600):
            _, config = read_recipe(f"itpn-pixel_hivit-{size}-p16_8xb512-amp-coslr-{epochs}e_in1k")
            model, data, optimizer = config.model, config.data, config.optimizer
            assert (model.name, model.mask_ratio, model.decoder_depth) == (f"itpn_{size}", 0.75, 6)
            assert (model.decoder_width, model.decoder_heads, model.patch_size) == (512, 16, 16)
            assert (data.batch_size, data.img_size, data.crop_scale, data.hflip) == (512, 224, (0.2, 1.0), 0.5)
            assert (data.root, data.interpolation) == (("data/imagenet",), "bicubic")
            assert (optimizer.base_lr, optimizer.betas, optimizer.weight_decay) == (1.5e-4, (0.9, 0.95), 0.05)
            assert (optimizer.warmup_epochs, optimizer.warmup_start, optimizer.min_lr) == (40, 1e-4, 0.0)
            assert (config.trainer.max_epochs, model.drop_path_rate, optimizer.clip_grad) == (epochs, 0.0, None)


def test_numbers_as_people_write_them_in_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: mine\noptimizer: {lr: 1e-3}\ndata: {root: [photos]}\n")
    assert read_yaml(path)[1].optimizer.lr == 1e-3
    for text in ("recipe: x\nmodle: {}\n", "model: {}\n", "[1]", "recipe: x\noptimizer: {lr: fast}", "a: ["):
        path.write_text(text)
        with pytest.raises(UserError):
            read_yaml(path)
    with pytest.raises(UserError, match=r"unknown setting model\.nane"):
        from_dict({"model": {"nane": "x"}})


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("data", "root", "photos"),
        ("data", "img_size", (64,)),
        ("data", "std", (0.0, 0.0, 0.0)),
        ("data", "hflip", 2.0),
        ("data", "crop_scale", (0.5, 0.2)),
        ("data", "crop_ratio", (0.0, 1.0)),
        ("model", "decoder_heads", 0),
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
    config = Config()
    setattr(getattr(config, section), field, value)
    with pytest.raises(UserError) as error:
        check(config)
    assert field.replace("_", "-") in str(error.value).replace("_", "-")
    assert "\n" not in str(error.value)


def test_everything_is_an_option():
    options = option_names()
    assert len(options) == len(set(options))
    flat = sum(len(v) if isinstance(v, dict) else 1 for v in to_dict(Config()).values())
    assert len(options) == flat
    assert {"--data.root", "--data.batch-size", "--data.num-workers", "--data.img-size", "--model.checkpoint"} <= {
        *options
    }
    assert {"--optimizer.lr", "--trainer.max-epochs", "--trainer.max-steps", "--trainer.precision"} <= {*options}
    assert {"--trainer.checkpoint-every-n-steps", "--seed", "--name", "--output-dir"} <= {*options}
    assert DataConfig().root == ("data/imagenet",)
