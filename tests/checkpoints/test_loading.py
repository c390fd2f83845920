"""Weights into a model that is not quite theirs: what cannot be right is refused, what is changed is said."""

import collections
import json
import re
import zipfile

import numpy as np
import pytest
import timm
import torch
from public import read_golden, save_public

import itpn
from itpn.checkpoints.adapters import ADAPTERS
from itpn.checkpoints.convert import convert
from itpn.checkpoints.files import read_checkpoint
from itpn.checkpoints.io import write_safetensors
from itpn.errors import UserError
from itpn.models.position import resample_position_table
from itpn.tasks.configs import PretrainingConfig, PretrainingDataConfig, PretrainingModelConfig, TeacherConfig
from itpn.tasks.pretraining.module import save_weights
from itpn.tasks.pretraining.network import build_masked_model
from itpn.tasks.pretraining.weights import load_weights


def model_config(**settings) -> PretrainingModelConfig:
    own = {"name": "itpn_nano", "patch_size": 8, "decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2}
    return PretrainingModelConfig(**{**own, **settings})


def save(tmp_path, img_size=(32, 64), **settings):
    config = PretrainingConfig(model=model_config(**settings), data=PretrainingDataConfig(img_size=img_size))
    path = tmp_path / "model.safetensors"
    save_weights(path, build_masked_model(config.model, img_size), "test", config)
    return path


def load_into(path, img_size=(32, 64), **settings):
    model = build_masked_model(model_config(**settings), img_size)
    return model, [note.replace(str(path), "FILE") for note in load_weights(model, read_checkpoint(path))]


MFM = {"pyramid_weights": (0.1, 0.2, 0.3), "pyramid_head_width": 64}


def test_what_is_predicted_may_change(tmp_path):
    """From pixels to pixels and features, and back: what both have is kept, what is new is random and named."""
    teacher = TeacherConfig("ema")
    pixel = build_masked_model(model_config(), (32, 64))
    both = build_masked_model(model_config(**MFM), (32, 64), teacher)
    path = tmp_path / "model.safetensors"
    save_weights(
        path, pixel, "test", PretrainingConfig(model=model_config(), data=PretrainingDataConfig(img_size=(32, 64)))
    )
    notes = load_weights(both, read_checkpoint(path))
    assert notes == [f"{path} has no set of heads for pyramid levels: it is randomly initialized"]
    config = PretrainingConfig(
        model=model_config(**MFM), teacher=teacher, data=PretrainingDataConfig(img_size=(32, 64))
    )
    save_weights(path, both, "test", config)
    again = build_masked_model(model_config(), (32, 64))
    assert load_weights(again, read_checkpoint(path)) == []
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, pixel.state_dict()[name]), name
    assert itpn.load(path).feature_losses == ["pyramid_1", "pyramid_2", "pyramid_3"]
    with pytest.raises(UserError, match=r"it has no mask token\. Pass strict=False"):
        itpn.load(path, masked_patches="mask_token")
    with pytest.warns(UserWarning, match="has no") as said:
        itpn.load(path, masked_patches="mask_token", strict=False)
    assert [str(w.message).partition(" has no ")[2].partition(" (")[0] for w in said] == [
        "decoder that fits",
        "set of heads for pyramid levels that fits",
        "mask token",
    ]


def test_the_same_model(tmp_path):
    path = save(tmp_path, init_values=0.1)
    model, notes = load_into(path, init_values=0.1)
    assert notes == []
    stored = read_checkpoint(path).tensors
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def test_the_stored_network_counts(tmp_path):
    """Whatever the settings beside it would build."""
    path, model = tmp_path / "model.safetensors", build_masked_model(model_config(), (32, 64))
    other = PretrainingConfig(model=model_config(decoder_embed_dim=64), data=PretrainingDataConfig(img_size=(32, 64)))
    save_weights(path, model, "test", other)
    loaded = itpn.load(path)
    assert json.dumps(loaded.spec.to_dict()) == json.dumps(model.spec.to_dict())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    with pytest.raises(UserError, match="has no decoder that fits"):
        itpn.load(path, mask_ratio=0.5)  # a setting: of those that are stored


@pytest.mark.parametrize(
    ("there", "here", "names"),
    [
        # layer scale must not get lost
        (
            {"init_values": 0.1},
            {},
            "has tensors that the model has no place for: 10 x layer scale; it takes .*-values 0.1$",
        ),
        (
            {},
            {"init_values": 0.1},
            "lacks 10 x layer scale, which would stay random; it takes --model.init-values None$",
        ),
        ({"pyramid_depth": 3}, {}, r"pyramid.blocks.0.1.* there and missing here\); it takes --model.pyramid-depth 3$"),
        ({"pyramid_width": 16}, {}, r"has no pyramid that fits .*; it takes --model.pyramid-width 16$"),
        ({"name": "itpn_base"}, {"name": "itpn_base_3324"}, r"no place for: .*; it takes --model.name itpn_base$"),
        (
            {"name": "itpn_tiny"},
            {},
            r"holds another model: it has 6 attention heads, the model 4; it takes --model.name itpn_tiny$",
        ),
        ({}, {"patch_size": 16}, r"proj.weight is 32x3x2x2 there and 32x3x4x4 here; it takes --model.patch-size 8"),
    ],
)
def test_another_backbone_or_pyramid_is_refused(tmp_path, there, here, names):
    path = save(tmp_path, **there)
    with pytest.raises(UserError, match=names):
        load_into(path, **here)


@pytest.mark.parametrize(
    "here", [{"decoder_depth": 1}, {"decoder_depth": 3}, {"decoder_embed_dim": 64}, {"decoder_num_heads": 4}]
)
def test_another_decoder_is_random_and_named(tmp_path, here):
    path = save(tmp_path)
    model, notes = load_into(path, **here)
    assert len(notes) == 1
    assert notes[0].startswith("FILE has no decoder that fits (")
    assert notes[0].endswith("): it is randomly initialized")
    stored = read_checkpoint(path).tensors
    state = model.state_dict()
    assert torch.equal(state["backbone.stages.2.0.attn.qkv.weight"], stored["backbone.stages.2.0.attn.qkv.weight"])
    assert not torch.equal(state["decoder.embeds.0.weight"], stored["decoder.embeds.0.weight"])
    with pytest.raises(UserError, match=r"has no decoder that fits \(.*\)\. Pass strict=False"):
        itpn.load(path, **here)
    with pytest.warns(UserWarning, match="has no decoder that fits"):
        itpn.load(path, strict=False, **here)


@pytest.mark.parametrize(
    "img_size", [(64, 64), (64, 32)]
)  # the second has as many patches as the file's, on another grid
def test_position_tables_of_another_grid_are_resampled(tmp_path, img_size):
    path = save(tmp_path)
    model, notes = load_into(path, img_size)
    grid = (img_size[0] // 8, img_size[1] // 8)
    tables = "backbone.pos_embed, decoder.pos_embed"
    assert notes == [f"FILE is made for another image size: {tables} resampled to {grid[0]}x{grid[1]} patches"]
    stored = read_checkpoint(path).tensors["backbone.pos_embed"]
    assert torch.equal(model.backbone.pos_embed, resample_position_table(stored, (4, 8), grid))


def test_relative_position_tables_of_another_grid_are_resampled(tmp_path):
    path = save(tmp_path, name="hivit_tiny")
    model, notes = load_into(path, (64, 64), name="hivit_tiny")
    assert notes[0].endswith("resampled to 8x8 patches, 10 relative position tables to 8x8")
    assert model.backbone.stages[2][0].attn.relative_position_bias_table.shape == (15 * 15, 6)


def test_the_words_of_the_complaints(tmp_path):
    """What users of the public code were told in pages of keys, or not at all."""
    # layer scale, of which a classifier without the option loses every vector
    fast = save_public(tmp_path, "off_fast_itpn_ls")
    kept = itpn.load(fast, num_heads=4)
    gammas = [name for name, _ in kept.named_parameters() if name.endswith(".gamma")]
    assert len(gammas) == 4
    with pytest.raises(
        UserError,
        match=r"has no place for: 4 x layer scale\. strict=False loads what fits, but this is another network",
    ):
        itpn.load(fast, num_heads=4, init_values=None)
    with pytest.raises(UserError, match="lacks 4 x layer scale, which would stay random"):
        itpn.load(save_public(tmp_path, "off_fast_itpn"), num_heads=4, init_values=0.1, layer_scale_stages=(3,))

    # a teacher of another width
    clip = save_public(tmp_path, "off_clip_pretrain")
    report = itpn.inspect(clip)
    assert report.summary["decoder"] == "48 channels, 0 blocks, 24 numbers a patch (feature)"
    wide = itpn.load(clip)
    assert wide.decoder.heads["feature"].out_features == wide.auxiliary.head.out_features == 24

    # pre-training weights in a fine-tuning model: what is not needed is not complained of, what is random is
    pixel = save_public(tmp_path, "off_pixel_pretrain")
    with pytest.raises(UserError, match=r"has no classifier\. Pass strict=False .* is randomly initialized"):
        itpn.load(pixel, task="classification", num_classes=7)
    with pytest.warns(UserWarning, match="has no classifier") as said:
        model = itpn.load(pixel, task="classification", num_classes=7, strict=False)
    assert len(said) == 1
    assert model.head.out_features == 7
    assert torch.equal(model.pos_embed, read_golden("off_pixel_pretrain")[0]["param"]["absolute_pos_embed"])
    report = itpn.inspect(pixel)
    assert [use.task for use in report.uses if use.ready] == ["pretraining", "pyramid", "backbone"]
    assert report.use("classification").missing == ["has no classifier"]
    expected = [f.text for f in report.use("classification").findings if f.kind == "expected"]
    assert expected == ["has a decoder that is not needed here", "has a pyramid that is not needed here"]
    with pytest.raises(UserError, match=r"there is no classifier to build: itpn.load with num_classes=N"):
        itpn.load(pixel, task="classification")


def test_other_sizes_channels_and_classes(tmp_path):
    path = save_public(tmp_path, "off_pixel_finetune")
    golden = read_golden("off_pixel_finetune")[0]["param"]
    with pytest.warns(UserWarning, match="resampled to 6x6 patches, 2 relative position tables to 6x6"):
        large = itpn.load(path, img_size=96)
    assert large(torch.zeros(1, 3, 96, 96)).shape == (1, 10)
    with pytest.warns(UserWarning, match="has 3 channels: its first layer was adapted to 1"):
        grey = itpn.load(path, in_chans=1)
    torch.testing.assert_close(grey.patch_embed.proj.weight, golden["patch_embed.proj.weight"].sum(1, keepdim=True))
    with pytest.raises(UserError, match=r"has no classifier that fits \(backbone.head.bias is 10 there and 3 here\)"):
        itpn.load(path, num_classes=3)
    with pytest.raises(UserError, match="no task 'tracking'; there are pretraining, segmentation, detection"):
        itpn.load(path, task="tracking")
    with pytest.raises(
        UserError, match=r"no classification network can be built with these settings: got an .* 'depht'"
    ):
        itpn.load(path, depht=3)


@pytest.mark.parametrize("layout", ["official", "mmpretrain"])
def test_pretraining_starts_from_a_public_file(tmp_path, layout):
    """The decoder is kept where the file has it, other channels and sizes are made to fit, the rest is said."""
    source = save(tmp_path, (32, 32), name="itpn_tiny")
    target = tmp_path / "theirs.pth"
    convert(source, target, layout)
    stored = read_checkpoint(source).tensors
    same, notes = load_into(target, (32, 32), name="itpn_tiny")
    assert notes == []
    assert all(torch.equal(tensor, stored[name]) for name, tensor in same.state_dict().items())

    other, notes = load_into(target, (48, 64), name="itpn_tiny", in_chans=1)
    assert [note.removeprefix("FILE ") for note in notes] == [
        "has 3 channels: its first layer was adapted to 1, and so was its prediction of pixels",
        "is made for another image size: backbone.pos_embed, decoder.pos_embed resampled to 6x8 patches",
    ]
    # the same answer to the same image: grey in all three channels, and the mean of the three predictions
    grey, mask = torch.randn(2, 1, 48, 64), other.draw_mask(2, (6, 8))
    colour, _ = load_into(target, (48, 64), name="itpn_tiny")
    with torch.no_grad():
        three = colour.eval()(grey.expand(-1, 3, -1, -1), mask).prediction.unflatten(2, (-1, 3)).mean(-1)
        torch.testing.assert_close(other.eval()(grey, mask).prediction, three, atol=1e-5, rtol=1e-5)
    assert torch.equal(other.pyramid.top.weight, stored["pyramid.top.weight"])


def test_pretraining_starts_from_a_classifier(tmp_path):
    """It has no pyramid and no decoder at all: both are random."""
    model = timm.create_model("fast_itpn_nano", img_size=32, patch_size=8, num_classes=5)
    torch.save(
        {"model": ADAPTERS["official_fast"].from_ours({f"backbone.{n}": t for n, t in model.state_dict().items()})[0]},
        tmp_path / "classifier.pth",
    )
    started, notes = load_into(tmp_path / "classifier.pth", (32, 32), name="fast_itpn_nano")
    assert [note.removeprefix("FILE ") for note in notes] == [
        "has no decoder: it is randomly initialized",
        "has no pyramid: it is randomly initialized",
    ]
    assert torch.equal(started.backbone.stages[2][3].mlp.fc1.weight, model.stages[2][3].mlp.fc1.weight)


def test_corrupt_and_foreign_files(tmp_path):
    """One clear line each, and nothing in a file is ever run."""

    def refused(path) -> str:
        with pytest.raises(UserError) as error:
            itpn.load(path)
        with pytest.raises(UserError) as other:
            itpn.inspect(path)
        assert str(error.value) == str(other.value)
        assert "\n" not in str(error.value)
        return str(error.value).replace(str(path), "FILE")

    path = tmp_path / "weights.pth"
    assert refused(path) == "checkpoint FILE does not exist"
    resnet = timm.create_model("resnet50")
    torch.save({"state_dict": resnet.state_dict()}, path)
    assert refused(path).startswith("checkpoint FILE is of another network (it has conv1.weight, bn1.weight")
    path.write_bytes(path.read_bytes()[:100_000])
    assert refused(path).startswith("checkpoint FILE is corrupt or no checkpoint; give a checkpoint of iTPN")
    path.write_bytes(b"PK\x03\x04 no zip at all")
    assert "is corrupt or no checkpoint" in refused(path)
    path.write_bytes(b"")
    assert "corrupt" in refused(path)
    torch.save({"model": {"a": 1}}, path)
    assert refused(path).startswith("checkpoint FILE has no weights in it")
    torch.save(torch.zeros(3), path)
    assert refused(path).startswith("checkpoint FILE holds a Tensor, not a dict of weights")
    torch.save({"model": resnet.state_dict(), "config": Code()}, path)
    assert re.match(r"checkpoint FILE has a Python object in it \(\S+\), which could run code", refused(path))

    torch.save({"model": resnet.state_dict(), "arrays": [Pointer(), Pointer()]}, path)  # of one object, at an address
    assert "checkpoint FILE is" in refused(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    assert refused(path).startswith("checkpoint FILE is a TorchScript archive, which is code, and is not read")

    golden, _ = read_golden("off_pixel_finetune")
    part = {name: tensor for name, tensor in golden["param"].items() if "blocks.3.reduction" not in name}
    torch.save({"model": part}, path)
    assert refused(path) == "checkpoint FILE is not complete: two merges between three stages expected, found 1"
    part = {name: tensor for name, tensor in golden["param"].items() if name != "blocks.4.mlp.fc2.weight"}
    torch.save({"model": part}, path)
    assert "is not complete: its architecture cannot be read" in refused(path)
    with pytest.raises(UserError, match="is not complete"):
        load_weights(build_masked_model(model_config(), (32, 32)), read_checkpoint(path))
    part = {name: tensor for name, tensor in golden["param"].items() if "blocks.5.attn.qkv" not in name}
    torch.save({"model": part}, path)
    with pytest.raises(
        UserError, match=r"lacks 1 x stages.attn.qkv.weight, 1 x stages.attn.qkv.bias, which would stay"
    ):
        itpn.load(path)

    whole = save(tmp_path)
    whole.write_bytes(whole.read_bytes()[:-1000])
    assert refused(whole).startswith("checkpoint FILE is corrupt or no checkpoint")


ODD_METADATA = [
    *[("config", 3), ("config", {"data": []}), ("architecture", []), ("classes", 3), ("classes", [3])],
    *[("preprocessing", [0.5]), ("preprocessing", 3), ("preprocessing", {"mean": 0.5})],
    *[("preprocessing", {"dtype": "uint16"}), ("preprocessing", {"dtype": "uint16", "channels": 3})],
]


@pytest.mark.parametrize(("name", "odd"), ODD_METADATA)
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_odd_metadata_is_said(tmp_path, name, odd, ending):
    tensors = itpn.load(save(tmp_path, (32, 32))).state_dict()
    path = tmp_path / f"odd.{ending}"
    if ending == "ckpt":
        state = {f"model.{key}": tensor for key, tensor in tensors.items()}
        torch.save({"state_dict": state, "global_step": "x", "itpn": {name: odd}}, path)
    else:
        write_safetensors(path, tensors, {name: odd})
    for read in (itpn.inspect, itpn.load):
        with pytest.raises(UserError, match=r"has corrupt (metadata|settings)") as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


class Pointer:
    """A Counter of an array of objects over bytes: whoever builds it follows an address of the file's choice."""

    def __reduce__(self):
        array = (np.ndarray, ((1,), np.dtype({"names": ["a"], "formats": ["O"]}), b"A" * 8))
        return (collections.Counter, (Reduced(array),))


class Reduced:
    def __init__(self, parts) -> None:
        self.parts = parts

    def __reduce__(self):
        return self.parts


class Code:
    def __reduce__(self):
        return (print, ("a checkpoint ran code",))


def test_weights_that_are_not_numbers_are_said(tmp_path):
    golden, _ = read_golden("off_pixel_finetune")
    golden["param"]["blocks.4.attn.proj.weight"][3, :2] = float("nan")
    torch.save({"model": golden["param"]}, tmp_path / "weights.pth")
    words = "2 infinite numbers or NaN in 1 tensors, backbone.stages.2.0.attn.proj.weight first"
    with pytest.warns(UserWarning, match=words):
        itpn.load(tmp_path / "weights.pth")
    report = itpn.inspect(tmp_path / "weights.pth")
    assert report.nonfinite == {"backbone.stages.2.0.attn.proj.weight": 2}
    assert words in str(report)
    assert "ready" not in str(report)


@pytest.mark.parametrize(
    ("kind", "number", "count"),
    [("float32", "nan", 2), ("float32", "inf", 2), ("bfloat16", "-inf", 2), ("float64", 1e300, 2)],
)
def test_no_run_starts_from_weights_that_are_not_numbers(tmp_path, kind, number, count):
    """A float64 can be too large for a network."""
    path = save(tmp_path)
    checkpoint = read_checkpoint(path)
    name = "backbone.stages.2.0.attn.proj.weight"
    checkpoint.tensors[name] = checkpoint.tensors[name].to(getattr(torch, kind))
    checkpoint.tensors[name][3, :count] = float(number)
    write_safetensors(path, checkpoint.tensors, checkpoint.metadata)
    with pytest.raises(
        UserError, match=rf"^checkpoint {path} has {count} infinite numbers or NaN in 1 tensors, {name} "
    ):
        load_into(path)


@pytest.mark.parametrize("kind", ["complex64", "bool", "int8"])
def test_numbers_that_are_no_weights(tmp_path, kind):
    path = save(tmp_path, img_size=(64, 64))
    checkpoint = read_checkpoint(path)
    name = "backbone.merges.0.norm.weight"
    checkpoint.tensors[name] = checkpoint.tensors[name].to(getattr(torch, kind))
    torch.save({"model": checkpoint.tensors}, tmp_path / "weights.pth")
    for read in (itpn.load, itpn.inspect):
        with pytest.raises(UserError, match=f"numbers of another kind than weights are: {name} is {kind}, not float"):
            read(tmp_path / "weights.pth")


def test_numbers_of_other_kinds_beside_the_weights(tmp_path):
    """Buffers of what else was trained, which the network has no place for."""
    checkpoint = read_checkpoint(save(tmp_path, img_size=(64, 64)))
    others = {"text.position_ids": torch.arange(77)[None], "decoder.attn_mask": torch.ones(4, 4).bool()}
    torch.save({"model": checkpoint.tensors | others}, tmp_path / "weights.pth")
    itpn.inspect(tmp_path / "weights.pth")
    itpn.load(tmp_path / "weights.pth", strict=False)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"img_size": -64}, "image size -64x-64 is not a multiple"),
        ({"img_size": "big"}, "img_size must be a whole number or two whole numbers, not 'big'"),
        ({"in_chans": 0}, "in_chans=0 must be above 0"),
        ({"num_classes": "7"}, "num_classes must be a whole number, not '7'"),
        ({"num_classes": 0}, "a classifier needs num_classes above 0; task='backbone'"),
        ({"num_heads": 0}, "num_heads must be above 0, not 0"),
        ({"migrate_ratio": 0.5, "migrate_from": 9}, "migrate_from must be one of the 2 blocks of stage 3, not 9"),
        ({"task": "pyramid", "levels": "all", "strict": False}, "levels must be 'pyramid', 'pooled' or 'joined'"),
        ({"task": "pretraining"}, "`itpn train RECIPE --model.checkpoint FILE` starts from the weights"),
    ],
)
def test_overrides_that_build_nothing(tmp_path, overrides, words):
    with pytest.raises(UserError, match=words):
        itpn.load(save_public(tmp_path, "off_pixel_finetune"), **overrides)


def test_starting_from_a_network_that_no_recipe_has(tmp_path):
    torch.save(timm.create_model("itpn_nano", depths=(1, 2, 3), patch_size=8).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"holds a network of 128 channels and 1\+2\+3 blocks, which no model"):
        load_into(tmp_path / "other.pth", (32, 32))


def test_our_own_files_of_every_kind(tmp_path):
    """The same weights from a run's file, from timm's state dict, from a converted one and through the public names."""
    path = save(tmp_path, (32, 32), init_values=0.1)
    whole = itpn.load(path)
    backbone = itpn.load(path, task="backbone")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = whole.backbone.forward_features(images)
        torch.testing.assert_close(backbone(images), tokens.mean(1), atol=0, rtol=0)
        maps = itpn.load(path, task="pyramid")(images)
        for ours, level in zip(maps.values(), whole.extract_pyramid(images), strict=True):
            assert torch.equal(ours, level)
        torch.save(backbone.state_dict(), tmp_path / "timm.pth")
        assert torch.equal(itpn.load(tmp_path / "timm.pth").forward_features(images), tokens)
    assert itpn.load(path, task="pyramid", levels="pooled").out_channels == 32


def test_a_folder_in_timms_layout_keeps_its_arguments(tmp_path):
    """What shapes do not tell (eps, the way of resampling, which maps) is beside the weights."""
    with pytest.warns(UserWarning, match="has no pyramid"):
        source = itpn.load(save_public(tmp_path, "mm_hivit_features"), task="pyramid", levels="pooled", strict=False)
    assert not hasattr(source, "model_args")  # of no registered size, so not timm's
    model = timm.create_model("itpn_nano", norm_eps=1e-5, pos_resample="legacy", num_classes=3, img_size=64).eval()
    itpn.save_pretrained(model, tmp_path / "hub", label_names=["ant", "bee", "cat"])
    loaded = itpn.load(tmp_path / "hub")
    assert loaded.norm_eps == 1e-5
    images = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert read_checkpoint(tmp_path / "hub").metadata["classes"] == ["ant", "bee", "cat"]
    whole = timm.create_model("fast_itpn_nano_pyramid", levels="pooled", img_size=64)
    itpn.save_pretrained(whole, tmp_path / "pyramid")
    assert itpn.load(tmp_path / "pyramid").levels == "pooled"


def test_a_teacher_of_another_width(tmp_path):
    """The complaint "size of tensor a (512) must match b (768)": the student of CLIP-L is told from that of CLIP-B."""
    options = {"pixel_weight": 0.0, "feature_weight": 1.0, "masked_patches": "mask_token", "decoder_depth": 0}
    settings = model_config(**options)
    wide = build_masked_model(settings, (32, 32), TeacherConfig("ema"))
    assert wide.decoder.heads["feature"].out_features == 128
    teacher = TeacherConfig("vit_large_patch14_clip_quickgelu_224.openai", width=768)
    path = tmp_path / "model.safetensors"
    config = PretrainingConfig(model=settings, teacher=teacher, data=PretrainingDataConfig(img_size=32))
    save_weights(path, build_masked_model(settings, (32, 32), teacher), "test", config)
    convert(path, tmp_path / "theirs.pth", "official")
    assert "768 numbers a patch (feature)" in itpn.inspect(tmp_path / "theirs.pth").summary["decoder"]
    model = itpn.load(tmp_path / "theirs.pth", num_heads=4)
    mask = model.draw_mask(2, (4, 4))
    output = model(torch.randn(2, 3, 32, 32), mask, torch.randn(2, 16, 768))
    assert output.prediction.shape == (2, 16, 768)
    narrow = build_masked_model(
        settings, (32, 32), TeacherConfig("vit_base_patch16_clip_quickgelu_224.openai", width=512)
    )
    (note,) = load_weights(narrow, read_checkpoint(tmp_path / "theirs.pth"))
    assert note.endswith(
        "has no decoder that fits (decoder.heads.feature.bias is 768 there and 512 here): it is randomly initialized"
    )


def test_no_average_to_take(tmp_path):
    with pytest.raises(UserError, match="has no EMA of the weights beside them"):
        itpn.load(save_public(tmp_path, "off_pixel_finetune"), ema=True)


def test_images_that_are_not_square(tmp_path):
    """The size is in what timm's layout, a converted file and a run keep beside the weights."""
    model = timm.create_model("hivit_tiny", img_size=(32, 64), num_classes=3).eval()
    itpn.save_pretrained(model, tmp_path / "hub", label_names=["ant", "bee", "cat"])
    convert(tmp_path / "hub", tmp_path / "ours.safetensors")
    assert read_checkpoint(tmp_path / "ours.safetensors").metadata["classes"] == ["ant", "bee", "cat"]
    images = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        for path in ("hub", "ours.safetensors"):
            assert torch.equal(itpn.load(tmp_path / path)(images), model(images))
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(
        UserError, match=r"its architecture cannot be read \(a position table of 21 entries is not of a square image\)"
    ):
        itpn.load(tmp_path / "bare.pth")


def test_compressed_parts_are_refused(tmp_path):
    """torch maps them without a word, and takes the compressed bytes for weights."""
    torch.save({"weight": torch.zeros(1000), "bias": torch.zeros(3)}, tmp_path / "plain.pth")
    source, packed = zipfile.ZipFile(tmp_path / "plain.pth"), tmp_path / "packed.pth"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for member in source.infolist():
            content = source.read(member)
            stored = len(content) > 100 and not member.filename.endswith("data/1")
            kind = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED  # one part is enough
            archive.writestr(member.filename, content, kind)
    with pytest.raises(UserError, match=r"packed\.pth has compressed parts"):
        itpn.load(str(packed))


def test_names_of_weights_that_are_no_text(tmp_path):
    torch.save({1: torch.zeros(2), 2.5: torch.zeros(2)}, tmp_path / "numbers.pth")
    with pytest.raises(UserError, match="has no weights in it"):
        itpn.load(str(tmp_path / "numbers.pth"))
