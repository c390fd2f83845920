"""Files of the public code bases, as they save them, load into what computes the same: nothing is told but the file."""

import pytest
import timm
import torch
from public import our_names, read_golden, save_public
from torch import Tensor, nn

import itpn
from itpn.checkpoints.adapters import ADAPTERS
from itpn.masked.masked_model import MaskedImageModel
from itpn.models.hivit import HiViT
from itpn.models.pyramid import PyramidBackbone

# heads of files that have no relative position table to tell them
FOUR = {"num_heads": 4}
HEADS = {
    "mm_pixel": {**FOUR, "decoder_num_heads": 4},
    "off_pixel_pretrain": {**FOUR, "decoder_num_heads": 4},
    "mm_hivit_features_nonsquare": FOUR,
    "off_det_pixel": FOUR,
    "off_fast_itpn": FOUR,
    "off_fast_itpn_ls": FOUR,
}


def load(tmp_path, case: str, **overrides) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    model = itpn.load(save_public(tmp_path, case), **HEADS.get(case, {}), **overrides)
    assert not model.training
    return model, read_golden(case)[0]


def assert_close(ours: Tensor, golden: Tensor) -> None:
    assert ours.shape == golden.shape
    assert (ours - golden).abs().max().item() < 2e-5


def assert_same_gradients(model: nn.Module, golden: dict[str, Tensor]) -> None:
    expected = our_names(golden)
    if isinstance(model, HiViT):
        expected = {name.removeprefix("backbone."): gradient for name, gradient in expected.items()}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(parameters) == set(expected)
    for name, parameter in parameters.items():
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error.item() < 1e-5, name


@pytest.mark.parametrize("case", ["off_pixel_finetune", "off_fast_itpn", "off_fast_itpn_ls"])
def test_classifiers_and_every_gradient(tmp_path, case):
    model, golden = load(tmp_path, case)
    assert isinstance(model, HiViT)
    assert model.num_classes == 10
    image = golden["input"]["image"]
    assert_close(model.forward_features(image), golden["output"]["tokens"])
    logits = model(image)
    assert_close(logits, golden["output"]["logits"])
    if "pre_logits" in golden["output"]:
        assert_close(model.forward_head(model.forward_features(image), pre_logits=True), golden["output"]["pre_logits"])
    loss = nn.functional.cross_entropy(logits, golden["input"]["labels"])
    assert_close(loss, golden["output"]["loss"])
    loss.backward()
    assert_same_gradients(model, golden["grad"])


@pytest.mark.parametrize("case", ["off_det_pixel", "off_det_clip", "off_det_clip_nonsquare"])
def test_the_five_maps_of_detectors(tmp_path, case):
    model, golden = load(tmp_path, case, levels="pooled")
    assert isinstance(model, PyramidBackbone)
    with torch.no_grad():
        maps = model(golden["input"]["image"])
    assert list(maps) == ["0", "1", "2", "3", "4"]
    for i, level in enumerate(maps.values()):
        assert_close(level, golden["output"][f"level_{i}"])


def test_the_four_maps_of_segmenters(tmp_path):
    model, golden = load(tmp_path, "off_seg", levels="joined")
    with torch.no_grad():
        maps = model(golden["input"]["image"])
    assert model.out_channels == [level.shape[1] for level in maps.values()] == [48, 64, 96, 96]
    for i, level in enumerate(maps.values()):
        assert_close(level, golden["output"][f"level_{i}"])


@pytest.mark.parametrize("heads", ["roi_head.bbox_head.fc.weight", "decode_head.conv_seg.weight"])
def test_the_backbone_inside_a_detector_or_segmenter(tmp_path, heads):
    """As mmdetection and mmsegmentation save it: the heads tell which maps are wanted."""
    golden, _ = read_golden("off_seg")
    state = {f"backbone.{name}": tensor for name, tensor in golden["param"].items()} | {heads: torch.zeros(3, 3)}
    torch.save({"state_dict": state, "meta": {"epoch": 12}}, tmp_path / "epoch_12.pth")
    model = itpn.load(tmp_path / "epoch_12.pth")
    assert model.levels == ("joined" if "decode" in heads else "pooled")
    with torch.no_grad():
        first = model(golden["input"]["image"])["0"]
    assert_close(first[:, :32], golden["output"]["level_0"][:, :32])
    assert "heads of a detector or segmenter" in itpn.inspect(tmp_path / "epoch_12.pth").leftovers[-1].text


@pytest.mark.parametrize("case", ["mm_hivit_features", "mm_hivit_features_nonsquare"])
def test_backbones_of_mmpretrain(tmp_path, case):
    model, golden = load(tmp_path, case)
    with torch.no_grad():
        maps = model.forward_intermediates(golden["input"]["image"], intermediates_only=True)
    for i, stage in enumerate(maps):
        assert_close(stage, golden["output"][f"stage_{i}"])


@pytest.mark.parametrize("case", ["mm_pixel", "off_pixel_pretrain"])
def test_pixel_pretraining_and_every_gradient(tmp_path, case):
    model, golden = load(tmp_path, case)
    assert isinstance(model, MaskedImageModel)
    output = model(golden["input"]["image"], golden["output"]["mask"].bool())
    assert_close(output.prediction, golden["output"]["pred"])
    assert_close(output.loss, golden["output"]["loss"])
    output.loss.backward()
    assert_same_gradients(model, golden["grad"])


@pytest.mark.parametrize(
    ("case", "mask", "prediction"), [("mm_clip", "mask", "logits"), ("off_clip_pretrain", "bool_masked_pos", "main")]
)
def test_clip_pretraining_and_every_gradient(tmp_path, case, mask, prediction):
    model, golden = load(tmp_path, case)
    output = model(golden["input"]["image"], golden["input"][mask].flatten(1), golden["input"]["target"])
    assert_close(output.prediction, golden["output"][prediction])
    assert_close(output.loss, golden["output"]["loss"])
    output.loss.backward()
    assert_same_gradients(model, golden["grad"])


@pytest.mark.parametrize("key", ["model", "module", "state_dict", "net", None])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_wrapped_dicts_and_prefixes_are_undone(tmp_path, key, prefix):
    golden, _ = read_golden("off_pixel_finetune")
    state = {prefix + name: tensor for name, tensor in golden["param"].items()}
    torch.save({key: state, "optimizer": {"lr": 0.1}} if key else state, tmp_path / "weights.pth")
    with torch.no_grad():
        logits = itpn.load(tmp_path / "weights.pth")(golden["input"]["image"])
    assert_close(logits, golden["output"]["logits"])


def test_the_average_beside_the_weights(tmp_path):
    """The weights are read, or the EMA where that is requested or all there is; mmcv's copies are seen as such."""
    golden, _ = read_golden("off_pixel_finetune")
    raw = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in golden["param"].items()}
    path = tmp_path / "weights.pth"
    torch.save({"model": raw, "model_ema": golden["param"]}, path)
    assert torch.equal(itpn.load(path).head.bias, golden["param"]["head.bias"] + 1)
    assert torch.equal(itpn.load(path, ema=True).head.bias, golden["param"]["head.bias"])
    torch.save({"model_ema": golden["param"]}, path)
    assert torch.equal(itpn.load(path).head.bias, golden["param"]["head.bias"])

    golden, _ = read_golden("mm_clip")
    copies = {f"ema_{name.replace('.', '_')}": tensor + 1 for name, tensor in golden["param"].items()}
    torch.save({"state_dict": golden["param"] | copies}, path)
    model = itpn.load(path)
    assert torch.equal(model.mask_token, golden["param"]["backbone.mask_token"])
    assert any("second copy" in finding.text for finding in itpn.inspect(path).leftovers)


def test_safetensors_in_the_originals_names(tmp_path):
    from safetensors.torch import save_file

    golden, _ = read_golden("off_fast_itpn_ls")
    save_file(golden["param"], tmp_path / "fast.safetensors")
    with torch.no_grad():
        logits = itpn.load(tmp_path / "fast.safetensors", num_heads=4)(golden["input"]["image"])
    assert_close(logits, golden["output"]["logits"])


def test_released_fast_itpn_weights(tmp_path):
    """Pre-trained, so without a classifier, and with a pyramid of convolutions whose code was never published."""
    golden, _ = read_golden("off_fast_itpn_ls")
    state = {name: tensor for name, tensor in golden["param"].items() if not name.startswith(("head", "fc_norm"))}
    extra = {
        "mask_token": torch.zeros(1, 1, 256),
        "align_dim_16tofpn.weight": torch.zeros(32, 64, 1, 1),
        "align_dim_16to8.weight": torch.zeros(32, 32, 1, 1),
        "split_16to8.reduction.weight": torch.zeros(32, 64, 2, 2),
        "fpn_modules.0.mlp.fc1.weight": torch.zeros(128, 32, 1, 1),
        "decoder_embed.0.1.weight": torch.zeros(64, 32, 1, 1),
        "norm.weight": torch.zeros(64),
        "lm_head.weight": torch.zeros(24, 64),
    }
    path = tmp_path / "fast_itpn.pt"
    torch.save({"module": state | extra, "epoch": 1599}, path)
    model = itpn.load(path, num_heads=4)
    assert isinstance(model, HiViT)
    with torch.no_grad():
        assert_close(model.forward_features(golden["input"]["image"]), golden["output"]["tokens"])
    report = itpn.inspect(path)
    assert report.task == "backbone"
    (leftover,) = report.leftovers
    assert "convolutional form of Fast-iTPN's unpublished pre-training" in leftover.text
    assert set(leftover.names) == set(extra)


def test_a_network_without_positions_has_a_table_of_zeros(tmp_path):
    golden, _ = read_golden("off_pixel_finetune")
    state = {name: tensor for name, tensor in golden["param"].items() if name != "absolute_pos_embed"}
    torch.save({"model": state}, tmp_path / "weights.pth")
    with pytest.warns(UserWarning, match="has no position table: it is zero here"):
        model = itpn.load(tmp_path / "weights.pth")
    assert not model.pos_embed.any()


def test_what_training_code_stores_beside_the_weights(tmp_path, monkeypatch):
    """NumPy's numbers and mmengine's record of losses are read as data, without mmengine."""
    import sys
    import types

    import numpy as np

    class HistoryBuffer:
        def __init__(self) -> None:
            self.history = np.array([0.5, 0.25])

    HistoryBuffer.__module__ = "mmengine.logging.history_buffer"
    HistoryBuffer.__qualname__ = "HistoryBuffer"
    names = ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[-1]].HistoryBuffer = HistoryBuffer
    golden, _ = read_golden("mm_clip")
    hub = {"log_scalars": {"train/loss": HistoryBuffer()}, "runtime_info": {"iter": np.int64(7), "lr": np.float64(0.1)}}
    torch.save({"state_dict": golden["param"], "message_hub": hub, "meta": {}}, tmp_path / "epoch_1.pth")
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    assert torch.equal(itpn.load(tmp_path / "epoch_1.pth").mask_token, golden["param"]["backbone.mask_token"])


@pytest.mark.parametrize("pretrained", [False, True])
def test_the_original_hivit(tmp_path, pretrained):
    """Its classifier has an index of relative positions in each block; its masked auto-encoder no relative positions,
    a decoder of its own kind and a norm of all stages side by side."""
    golden, _ = read_golden("off_pixel_finetune")
    state = dict(golden["param"])
    index = state.pop("relative_position_index")
    image = golden["input"]["image"]
    path = tmp_path / "hivit.pth"
    if not pretrained:
        torch.save({"model": state | {f"blocks.{i}.attn.relative_position_index": index for i in (4, 5)}}, path)
        with torch.no_grad():
            assert_close(itpn.load(path)(image), golden["output"]["logits"])
        return
    state = {n: t for n, t in state.items() if "relative" not in n and not n.startswith(("head", "fc_norm"))}
    extra = {
        "norm.weight": torch.zeros(112),
        "decoder_embed.weight": torch.zeros(32, 112),
        "mask_token": torch.zeros(1, 1, 32),
        "decoder_pos_embed": torch.zeros(1, 16, 32),
        "decoder_blocks.0.attn.qkv.weight": torch.zeros(96, 32),
        "decoder_norm.weight": torch.zeros(32),
        "decoder_pred.weight": torch.zeros(768, 32),
    }
    torch.save({"model": state | extra}, path)
    model = itpn.load(path, num_heads=4)
    assert isinstance(model, HiViT)
    report = itpn.inspect(path)
    assert report.task == "backbone"
    assert report.use("backbone").ready
    assert [finding.kind for finding in report.leftovers] == ["expected"]


@pytest.mark.parametrize("name", ["hivit_tiny", "itpn_nano"])
def test_registered_models_without_relative_positions(tmp_path, name):
    """As HiViT's masked auto-encoders are, though its classifiers have them."""
    source = timm.create_model(name, img_size=64, num_classes=0, rel_pos_bias=False).eval()
    state = ADAPTERS["official"].from_ours({f"backbone.{n}": t for n, t in source.state_dict().items()})[0]
    torch.save(state, tmp_path / "plain.pth")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(itpn.load(tmp_path / "plain.pth")(images), source(images))


@pytest.mark.parametrize("prefix", ["backbone.", "encoder.body."])
def test_fast_itpn_inside_another_network(tmp_path, prefix):
    """A tracker or a detector that has copied it."""
    golden, _ = read_golden("off_fast_itpn_ls")
    state = {prefix + name: t for name, t in golden["param"].items() if not name.startswith(("head", "fc_norm"))}
    torch.save({"net": state}, tmp_path / "tracker.pth")
    with torch.no_grad():
        tokens = itpn.load(tmp_path / "tracker.pth", num_heads=4).forward_features(golden["input"]["image"])
    assert_close(tokens, golden["output"]["tokens"])


def test_another_size_given_is_as_another_image(tmp_path):
    """Tables resampled while loading, or for each image: the public code's way either way."""
    path, images = save_public(tmp_path, "off_det_pixel"), torch.randn(1, 3, 96, 128)
    with pytest.warns(UserWarning, match="resampled to 6x8 patches"):
        sized = itpn.load(path, img_size=(96, 128), num_heads=4)
    with torch.no_grad():
        for one, other in zip(sized(images).values(), itpn.load(path, num_heads=4)(images).values(), strict=True):
            assert torch.equal(one, other)
