"""A checkpoint's first layer and prediction of pixels for images of other channels."""

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models._manipulate import adapt_input_conv

import itpn
from itpn.checkpoints.files import read_checkpoint
from itpn.commands.parsing import parse_with_recipe
from itpn.commands.train import Train
from itpn.errors import UserError
from itpn.tasks.classification.network import build_classifier, resolve
from itpn.tasks.configs import ClassificationConfig, PretrainingConfig, PretrainingDataConfig, PretrainingModelConfig
from itpn.tasks.pretraining.module import save_weights
from itpn.tasks.pretraining.network import build_masked_model
from itpn.tasks.run import train
from itpn.training.config import from_dict, read_yaml

OPTIONS = {"patch_size": 8, "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
STEM = "backbone.patch_embed.proj.weight"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A masked model of photographs whose predictions of red, green and blue differ."""
    torch.manual_seed(0)
    model = PretrainingModelConfig(name="itpn_nano", **OPTIONS)
    config = PretrainingConfig(model=model, data=PretrainingDataConfig(img_size=32, mean=(0.5,), std=(0.25,)))
    network = build_masked_model(model, (32, 32))
    torch.nn.init.normal_(network.decoder.heads["pixel"].bias)
    path = tmp_path_factory.mktemp("channels") / "model.safetensors"
    save_weights(path, network, "test", config)
    return path


def test_known_channels_are_kept_and_others_begin_at_zero(weights):
    rgb = itpn.load(weights)
    with pytest.warns(UserWarning, match="has 3 channels: its first layer was mapped to 2 1 0 - -, and so was its pr"):
        bands = itpn.load(weights, in_chans=5, channel_map=[2, 1, 0, "-", "-"])
    images = torch.randn(2, 5, 32, 32)
    mask = rgb.draw_mask(2, (4, 4))
    with torch.no_grad():
        before, after = rgb(images[:, [2, 1, 0]], mask), bands(images, mask)
        for one, other in zip(rgb.extract_pyramid(images[:, [2, 1, 0]]), bands.extract_pyramid(images), strict=True):
            torch.testing.assert_close(one, other)
    old, new = (p.prediction.unflatten(2, (64, -1)) for p in (before, after))  # [B, N, p * p, C]
    torch.testing.assert_close(new[..., :3], old[..., [2, 1, 0]])
    for channel in (3, 4):
        torch.testing.assert_close(new[..., channel], old.mean(dim=-1))
    assert not torch.allclose(old[..., 0], old[..., 1], atol=1e-2)
    bands.train()(images).loss.backward()
    assert bands.backbone.patch_embed.proj.weight.grad[:, 3:].abs().amin(dim=(0, 2, 3)).max() > 0


@pytest.mark.filterwarnings("ignore:.*first layer was")
def test_the_scale_is_timms(weights):
    stem = load_file(weights)[STEM]
    for channels, channel_map in ((4, (0, 1, 2, 0)), (2, (0, 1)), (6, (0, 1, 2, 0, 1, 2))):
        expected = adapt_input_conv(channels, stem.clone())
        for given in (None, channel_map):
            model = itpn.load(weights, task="backbone", in_chans=channels, channel_map=given)
            torch.testing.assert_close(model.patch_embed.proj.weight, expected)
    model = itpn.load(weights, task="backbone", in_chans=1, channel_map=(1,))
    torch.testing.assert_close(model.patch_embed.proj.weight, 3 * stem[:, 1:2])
    model = itpn.load(weights, task="backbone", channel_map=(2, 1, 0))  # as many channels in another order
    assert torch.equal(model.patch_embed.proj.weight, stem[:, [2, 1, 0]])


@pytest.mark.parametrize(
    ("in_chans", "channel_map", "message"),
    [
        (
            4,
            (2, 1, 0, "-", "-"),
            "--model.channel-map 2 1 0 - - is of 5 channels, the images have 4: give one for each",
        ),
        (2, (0, 3), "--model.channel-map 0 3: the checkpoint has no channel 3, but 3, counted from 0"),
        (2, (0, -1), "--model.channel-map 0 -1: the checkpoint has no channel -1, but 3, counted from 0"),
        (2, ("-", "-"), "--model.channel-map - - takes no channel of the checkpoint: give at least one"),
        (2, (0, "red"), r"channel_map must be whole numbers or '-' or None, not \(0, 'red'\)"),
    ],
)
def test_maps_that_do_not_fit(weights, in_chans, channel_map, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        itpn.load(weights, in_chans=in_chans, channel_map=channel_map)
    if "red" not in channel_map and -1 not in channel_map:
        with pytest.raises(UserError, match=f"^{message}$"):
            itpn.get_model("itpn-pixel_nano", weights, in_chans=in_chans, channel_map=channel_map, **OPTIONS)


def test_a_map_of_no_checkpoint():
    with pytest.raises(UserError, match=r"^channel_map says which channels of a checkpoint are kept: give pretrained="):
        itpn.get_model("itpn-pixel_nano", channel_map=(2, 1, 0))
    config = PretrainingConfig(model=PretrainingModelConfig(channel_map=(2, 1, 0)))
    with pytest.raises(
        UserError,
        match=r"^--model.channel-map says which channels of a checkpoint are kept: give --model.checkpoint$",
    ):
        config.check()


def test_a_map_on_the_command_line():
    words = ["itpn-pixel_nano", "--model.channel-map", "2", "1", "0", "-", "-", "--model.in-chans", "5"]
    command = parse_with_recipe(Train, words, "itpn train")
    assert command.config.model.channel_map == (2, 1, 0, "-", "-")
    assert command.config.model.in_chans == 5
    with pytest.raises(UserError, match=r"^--model.channel-map must be whole numbers or '-', not '2', 'x'$"):
        parse_with_recipe(Train, ["itpn-pixel_nano", "--model.channel-map", "2", "x"], "itpn train")


def test_a_resumed_run_is_not_mapped_again(weights, settings):
    """Its own checkpoint has the images' channels, of which there need be no third."""
    config = settings(max_steps=1)
    config.model.checkpoint, config.model.in_chans, config.model.channel_map = str(weights), 1, (2,)
    config.data.mean, config.data.std = (0.5,), (0.25,)
    config.optimizer.lr = config.optimizer.weight_decay = 0.0
    folder = train(config, "test")
    stem = 3 * load_file(weights)[STEM][:, 2:]
    assert torch.equal(load_file(folder / "model.safetensors")[STEM], stem)
    config.trainer.max_steps = 2
    assert train(config, "test") == folder
    assert torch.equal(load_file(folder / "model.safetensors")[STEM], stem)
    stored = read_yaml(folder / "config.yaml")
    assert from_dict(stored.values, PretrainingConfig).model.channel_map == (2,)
    assert itpn.load(folder / "model.safetensors").backbone.in_chans == 1


def test_fine_tuning_maps_channels(weights):
    config = ClassificationConfig()
    config.model.checkpoint, config.model.in_chans, config.model.channel_map = str(weights), 4, (2, 1, 0, "-")
    config.data.img_size = 32
    checkpoint = read_checkpoint(weights)
    network, notes = build_classifier(resolve(config, checkpoint)[0], ("cat", "dog"), checkpoint)
    stem = load_file(weights)[STEM]
    assert torch.equal(network.patch_embed.proj.weight[:, :3], stem[:, [2, 1, 0]])
    assert not network.patch_embed.proj.weight[:, 3].any()
    assert notes[-1] == f"{weights} has 3 channels: its first layer was mapped to 2 1 0 -"


@pytest.mark.parametrize("pairs", [("0", "4000"), ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")])
def test_what_images_are_is_in_reports_and_in_folders_for_the_hub(tmp_path, pairs):
    model = PretrainingModelConfig(name="itpn_nano", in_chans=5, **OPTIONS)
    data = PretrainingDataConfig(img_size=32, dtype="uint16", value_range=pairs, mean=(0.5,), std=(0.1,), nodata=7.0)
    save_weights(
        tmp_path / "a.safetensors",
        build_masked_model(model, (32, 32)),
        "test",
        PretrainingConfig(model=model, data=data),
    )
    values = "values from 0 to 4000" if len(pairs) == 2 else "a range of values for each channel"
    shown = f"5 channels of uint16, {values}, 7.0 without data"
    assert itpn.inspect(tmp_path / "a.safetensors").summary["images"] == shown
    own = itpn.load(tmp_path / "a.safetensors", task="backbone")
    itpn.save_pretrained(own, tmp_path / "b")
    itpn.save_pretrained(itpn.load(tmp_path / "b"), tmp_path / "c")
    stored = read_checkpoint(tmp_path / "c").preprocessing
    assert stored == {
        "dtype": "uint16",
        "channels": 5,
        "value_range": list(pairs),
        "nodata": 7.0,
        "mean": [0.5] * 5,
        "std": [0.1] * 5,
        "size": [32, 32],
    }
    images = torch.randn(1, 5, 32, 32)
    plain = timm.create_model(f"local-dir:{tmp_path / 'c'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(plain(images), own(images))
    with pytest.warns(UserWarning, match="has 5 channels: its first layer was adapted to 3"):
        itpn.save_pretrained(itpn.load(tmp_path / "b", in_chans=3), tmp_path / "d")  # of other images than those
    assert "dtype" not in read_checkpoint(tmp_path / "d").preprocessing


def test_photographs_are_not_named(weights):
    assert "images" not in itpn.inspect(weights).summary
