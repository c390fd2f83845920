"""Weights into a model that is not quite theirs: what cannot be right is refused, what is changed is said."""

import pytest
import torch

import itpn
from itpn.checkpoints.weights import load_weights, read_weights, save_weights
from itpn.config import Config, DataConfig, ModelConfig, TeacherConfig
from itpn.errors import UserError
from itpn.models.position import resample_position_table
from itpn.pretraining.build import build_masked_model


def model_config(**settings) -> ModelConfig:
    own = {"name": "itpn_nano", "patch_size": 8, "decoder_width": 32, "decoder_depth": 2, "decoder_heads": 2}
    return ModelConfig(**{**own, **settings})


def save(tmp_path, img_size=(32, 64), **settings):
    config = Config(model=model_config(**settings), data=DataConfig(img_size=img_size))
    path = tmp_path / "model.safetensors"
    save_weights(path, build_masked_model(config.model, img_size), "test", config)
    return path


def load_into(path, img_size=(32, 64), **settings):
    model = build_masked_model(model_config(**settings), img_size)
    return model, load_weights(model, read_weights(path), "FILE")


MFM = {"pyramid_weights": (0.1, 0.2, 0.3), "pyramid_head_width": 64}


def test_what_is_predicted_may_change(tmp_path):
    """From pixels to pixels and features, and back: what both have is kept, what is new starts fresh and is said."""
    teacher = TeacherConfig("ema")
    pixel = build_masked_model(model_config(), (32, 64))
    both = build_masked_model(model_config(**MFM), (32, 64), teacher)
    path = tmp_path / "model.safetensors"
    save_weights(path, pixel, "test", Config(model=model_config(), data=DataConfig(img_size=(32, 64))))
    notes = load_weights(both, read_weights(path), "FILE")
    assert notes == ["FILE has no set of heads for pyramid levels that fits: it starts fresh"]
    config = Config(model=model_config(**MFM), teacher=teacher, data=DataConfig(img_size=(32, 64)))
    save_weights(path, both, "test", config)
    again = build_masked_model(model_config(), (32, 64))
    assert load_weights(again, read_weights(path), "FILE") == []
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, pixel.state_dict()[name]), name
    assert itpn.load(path).feature_losses == ["pyramid_1", "pyramid_2", "pyramid_3"]
    with pytest.warns(UserWarning, match="starts fresh") as said:
        itpn.load(path, hidden_units="mask_token")
    assert [str(w.message).partition(" has no ")[2] for w in said] == [
        f"{what} that fits: it starts fresh" for what in ("decoder", "set of heads for pyramid levels", "mask token")
    ]


def test_the_same_model(tmp_path):
    path = save(tmp_path, init_values=0.1)
    model, notes = load_into(path, init_values=0.1)
    assert notes == []
    stored = read_weights(path).tensors
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("there", "here", "names"),
    [
        ({"init_values": 0.1}, {}, "ls2.gamma is 32 there and missing here"),  # layer scale must not get lost
        ({}, {"init_values": 0.1}, "ls2.gamma is missing there and 32 here"),
        ({"pyramid_depth": 3}, {}, "pyramid.blocks.0.1"),
        ({"pyramid_width": 16}, {}, "pyramid"),
        ({"name": "itpn_base"}, {"name": "itpn_base_3324"}, r"holds another model \(itpn_base"),
        ({"name": "itpn_tiny"}, {}, r"holds another model \(itpn_tiny"),
        ({}, {"patch_size": 16}, "patch_embed.proj.weight is 32x3x2x2 there and 32x3x4x4 here"),
    ],
)
def test_another_backbone_or_pyramid_is_refused(tmp_path, there, here, names):
    path = save(tmp_path, **there)
    with pytest.raises(UserError, match=names):
        load_into(path, **here)


@pytest.mark.parametrize(
    "here", [{"decoder_depth": 1}, {"decoder_depth": 3}, {"decoder_width": 64}, {"decoder_heads": 4}]
)
def test_another_decoder_starts_fresh_and_is_said(tmp_path, here):
    path = save(tmp_path)
    model, notes = load_into(path, **here)
    assert len(notes) == 1
    assert "FILE has no decoder that fits: it starts fresh" in notes[0]
    stored = read_weights(path).tensors
    state = model.state_dict()
    assert torch.equal(state["backbone.stages.2.0.attn.qkv.weight"], stored["backbone.stages.2.0.attn.qkv.weight"])
    assert not torch.equal(state["decoder.embeds.0.weight"], stored["decoder.embeds.0.weight"])
    with pytest.warns(UserWarning, match="it starts fresh"):
        itpn.load(path, **here)


@pytest.mark.parametrize(
    "img_size", [(64, 64), (64, 32)]
)  # the second has as many units as the file's, on another grid
def test_position_tables_of_another_grid_are_resampled(tmp_path, img_size):
    path = save(tmp_path)
    model, notes = load_into(path, img_size)
    grid = (img_size[0] // 8, img_size[1] // 8)
    assert [note.split()[0] for note in notes] == ["backbone.pos_embed", "decoder.pos_embed"]
    assert f"resampled from (4, 8) to {grid} units" in notes[0]
    stored = read_weights(path).tensors["backbone.pos_embed"]
    assert torch.equal(model.backbone.pos_embed, resample_position_table(stored, (4, 8), grid))


def test_relative_position_tables_of_another_grid_are_resampled(tmp_path):
    path = save(tmp_path, name="hivit_tiny")
    model, notes = load_into(path, (64, 64), name="hivit_tiny")
    assert sum("relative_position_bias_table" in note for note in notes) == 10
    assert model.backbone.stages[2][0].attn.relative_position_bias_table.shape == (15 * 15, 6)


def test_files_that_are_not_ours(tmp_path):
    foreign = tmp_path / "resnet.ckpt"
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}}, foreign)
    with pytest.raises(UserError, match="has no itpn settings in it"):
        read_weights(foreign)
    foreign.write_bytes(b"PK no zip")
    with pytest.raises(UserError, match=r"resnet\.ckpt"):
        read_weights(foreign)

    class Code:
        def __reduce__(self):
            return (print, ("a checkpoint ran code",))

    torch.save({"itpn": Code()}, foreign)
    with pytest.raises(UserError, match="is not a checkpoint of itpn"):
        read_weights(foreign)
    whole = save(tmp_path)
    whole.write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(UserError, match="is damaged"):
        read_weights(whole)
