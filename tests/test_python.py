"""The functions of the package, called with what cannot be: one clear sentence, as on the command line."""

from pathlib import Path

import pytest

import itpn
from itpn.errors import UserError


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        ({"img_size": 33}, "--data.img-size 33x33 is not a multiple of --model.patch-size 8; try 32x32"),
        ({"img_size": (32, 30)}, "32x30 is not a multiple"),
        ({"img_size": 0}, "--data.img-size must be at least 1, not 0"),
        ({"img_size": "x"}, "data.img_size must be a whole number or two whole numbers, not 'x'"),
        ({"img_size": None}, "data.img_size must be a whole number"),
        ({"patch_size": 6}, "--model.patch-size must be divisible by 4, not 6"),
        ({"mask_ratio": 1.0}, "leaves no visible or no masked patch"),
        ({"mask_ratio": "half"}, "model.mask_ratio must be a number, not 'half'"),
        ({"decoder_num_heads": 7}, "--model.decoder-embed-dim must be divisible by 16 and by"),
        ({"drop_path_rate": float("nan")}, "--model.drop-path-rate must lie between 0 and 1, not nan"),
        ({"in_chans": 0}, "--model.in-chans must be at least 1, not 0"),
        ({"grad_checkpointing": "all"}, "model.grad_checkpointing must be True or False or 'selective', not 'all'"),
        ({"pyramid_width": 10**20}, "--model.pyramid-width must lie between 1 and 32768"),
        ({"num_classes": 3}, "a recipe of pretraining predicts no classes: leave out num_classes"),
        ({"num_classes": "x"}, "num_classes must be a whole number or None, not 'x'"),
        ({"num_class": 3}, "no model setting 'num_class'"),
        ({"name": 5}, "model.name must be a text, not 5"),
    ],
)
def test_get_model_with_settings_that_cannot_be(overrides, answer):
    with pytest.raises(UserError) as error:
        itpn.get_model("itpn-pixel_nano", **overrides)
    assert answer in str(error.value)


@pytest.mark.parametrize("classes", [0, -1, True, 10**20, 2.0])
def test_a_number_of_classes_that_cannot_be(classes):
    with pytest.raises(UserError, match="num_classes must be"):
        itpn.get_model("hivit-tiny-p16_8xb128-coslr-300e_in1k", num_classes=classes)


@pytest.mark.parametrize("call", [itpn.get_model, itpn.list_models, itpn.list_recipes])
@pytest.mark.parametrize("name", [None, 5, b"x", ["*"]])
def test_what_is_no_name(call, name):
    with pytest.raises(UserError, match=r"(recipe|pattern) must be a text"):
        call(name)


def test_a_recipe_file_by_its_path():
    path = next(Path(__file__).parents[1].joinpath("configs").rglob("itpn-pixel_nano.py"))
    assert itpn.get_model(path).backbone.patch_size == 8
