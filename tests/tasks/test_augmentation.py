"""A recipe's augmentation of colours, where images are no photographs."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from itpn.cli import main
from itpn.errors import UserError
from itpn.tasks.augmentation import COLOURS, replace_colours
from itpn.tasks.classification.data import make_transform
from itpn.tasks.configs import ClassificationConfig, PretrainingConfig, SegmentationConfig
from itpn.tasks.recipe_files import list_recipes, read_recipe

TRAINED = ("--data.img-size", "32", "--data.batch-size", "2", "--data.num-workers", "0", "--trainer.max-steps", "1")


def of_bands(config, **data):
    """Resolved for images of five bands."""
    own = {"dtype": "uint16", "mean": (0.2,), "std": (0.1,), "value_range": ("0", "1000"), "nodata": 0.0, **data}
    return replace(config, model=replace(config.model, in_chans=5), data=replace(config.data, **own))


@pytest.mark.parametrize(
    ("config", "data", "strength", "option"),
    [
        (PretrainingConfig(), {"color_jitter": 0.3}, 0.3, "color-jitter"),
        (ClassificationConfig(), {}, 0.4, "auto-augment"),
        (ClassificationConfig(), {"channel_jitter": 0.1}, 0.1, "auto-augment"),
        (SegmentationConfig(), {}, 0.25, "photometric"),
    ],
)
def test_colours_are_replaced_by_channel_jitter(config, data, strength, option) -> None:
    before = of_bands(config, **data)
    after, notes = replace_colours(before)
    assert after.data.channel_jitter == strength
    assert notes == [
        f"--data.{option} of the recipe is for photographs: images of 5 channels of uint16 are augmented by "
        f"--data.channel-jitter {strength:g}"
    ]
    assert replace_colours(after) == (after, [])
    assert replace_colours(before, {"hflip", "channel_jitter"}) == (after, notes)
    name = option.replace("-", "_")
    with pytest.raises(
        UserError, match=rf"^--data.{option} is for RGB photographs, not for images of 5 channels of ui"
    ):
        replace_colours(before, {name})
    off = replace(before, data=replace(before.data, **{name: COLOURS[name][0]}))
    assert replace_colours(off, {name}) == (off, [])


def test_recipes_of_photographs_stay_as_published() -> None:
    for name in list_recipes():
        _, config = read_recipe(name)
        assert replace_colours(config, {"color_jitter", "auto_augment", "photometric"}) == (config, [])
        for dtype in (None, "photo"):
            own = replace(config, data=replace(config.data, dtype=dtype))
            assert replace_colours(own) == (own, [])


def test_a_classifier_of_bands_gets_their_range_and_mean() -> None:
    transform = make_transform(replace_colours(of_bands(ClassificationConfig(), img_size=32))[0])
    image = torch.from_numpy(np.random.default_rng(0).integers(1, 1000, (5, 40, 40), dtype=np.uint16))
    view = transform(image, random.Random(0), 1)["image"]
    assert (view.dtype, tuple(view.shape)) == (torch.uint16, (5, 32, 32))
    assert (transform.pixels.low, transform.pixels.high) == ((0.0,) * 5, (1000.0,) * 5)
    assert transform.pixels.stored_mean == pytest.approx((200.0,) * 5)
    assert transform.pixels.nodata == 0


@pytest.fixture
def classes(tmp_path) -> Path:
    """16-bit images of two classes."""
    rng = np.random.default_rng(0)
    for number in range(16):
        folder = tmp_path / "images" / ("train" if number < 12 else "val") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 4000, (40, 48), dtype=np.uint16)).save(folder / f"{number}.png")
    return tmp_path / "images"


def test_a_classifier_of_deep_images_trains_by_a_recipe_for_photographs(classes, tmp_path, capsys) -> None:
    options = (
        "--model.scratch",
        "--model.name",
        "itpn_nano",
        "--output-dir",
        str(tmp_path / "runs"),
        "--data.rotate90",
    )
    command = ["train", "classifier_small", "--data.root", str(classes), *TRAINED, *options]
    assert main([*command, "--data.auto-augment", "rand-m9-mstd0.5-inc1"]) == 2
    assert (
        "--data.auto-augment is for RGB photographs, not for images of 1 channel of uint16" in capsys.readouterr().err
    )
    assert not (tmp_path / "runs").exists()
    assert main(command) == 0
    output = capsys.readouterr()
    note = "--data.auto-augment of the recipe is for photographs: images of 1 channel of uint16 are augmented by"
    assert note in " ".join((output.out + output.err).split())
    written = yaml.safe_load((tmp_path / "runs/classifier_small/default/config.yaml").read_text())
    assert (written["data"]["auto_augment"], written["data"]["channel_jitter"]) == (None, 0.4)
    assert main([*command, "--trainer.max-steps", "2"]) == 0  # resumes


def test_pre_training_on_deep_images_refuses_colour_jitter(classes, tmp_path, capsys) -> None:
    command = [
        "train",
        "itpn-pixel_nano",
        "--data.root",
        str(classes),
        *TRAINED,
        "--output-dir",
        str(tmp_path / "runs"),
    ]
    assert main([*command, "--data.color-jitter", "0.3"]) == 2
    words = "--data.color-jitter is for RGB photographs, not for images of 1 channel of uint16: leave it out, or give"
    assert words in capsys.readouterr().err
    assert main([*command, "--data.channel-jitter", "0.3", "--data.channel-drop", "0.2", "--data.rotate90"]) == 0
