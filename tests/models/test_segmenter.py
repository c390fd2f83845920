"""The segmenter: published maps inside it, its heads, several processes, any image size."""

import pytest
import torch
import torch.nn.functional as F
from processes import compare_processes
from public import read_golden, save_public
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from timm.optim import param_groups_layer_decay
from torch import nn

import itpn
from itpn.errors import UserError
from itpn.models.build import make_pyramid
from itpn.models.segmenter import Segmenter
from itpn.models.synced import SyncedBatchNorm2d
from itpn.tasks.pretraining.module import save_weights
from itpn.tasks.pretraining.network import build_from

NANO = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depths": (1, 1, 2), "num_heads": 4}


def make_segmenter(seed: int = 0, head_width: int = 32, auxiliary: bool = True, **backbone) -> Segmenter:
    torch.manual_seed(seed)
    trunk = make_pyramid("joined", pyramid_width=32, pyramid_depth=1, **{**NANO, **backbone})
    return Segmenter(trunk, 4, head_width, auxiliary)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_published_maps_inside_a_segmenter(tmp_path, checkpointing):
    golden, _ = read_golden("off_seg")
    with pytest.warns(UserWarning, match="has no segmentation head"):
        model = itpn.load(
            save_public(tmp_path, "off_seg"), task="segmentation", num_classes=5, head_width=32, strict=False
        )
    assert isinstance(model, Segmenter)
    model.set_grad_checkpointing(checkpointing)
    captured = []
    model.upernet.register_forward_pre_hook(lambda _, args: captured.append([level.clone() for level in args[0][2:]]))
    logits = model(golden["input"]["image"])["out"]
    assert logits.shape == (2, 5, 64, 64)
    assert [level.shape[1] for level in captured[0]] == [48, 64, 96, 96]
    for i, level in enumerate(captured[0]):
        assert (level - golden["output"][f"level_{i}"]).abs().max() < 2e-5


def test_only_heads_are_randomly_initialized(tmp_path):
    config = itpn.tasks.recipe_files.read_recipe("itpn-pixel_nano")[1]
    torch.manual_seed(3)
    pretrained = build_from(config)
    for parameter in pretrained.parameters():
        parameter.data += 0.01  # no parameter equals an initialization
    path = tmp_path / "model.safetensors"
    save_weights(path, pretrained, "itpn-pixel_nano", config)
    with pytest.warns(UserWarning, match="has no segmentation head"):
        model = itpn.load(path, task="segmentation", num_classes=4, strict=False)
    theirs = pretrained.state_dict()
    random = [
        name
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor, theirs.get(name.removeprefix("backbone."), torch.tensor(torch.nan)))
    ]
    assert {name.partition(".")[0] for name in random} == {"upernet", "classifier", "aux_classifier"}
    assert len(random) + sum(n.startswith(("backbone.", "pyramid.")) for n in theirs) == len(model.state_dict())
    with pytest.raises(UserError, match="num_classes=N"):
        itpn.load(path, task="segmentation")


def test_heads_are_the_published_ones():
    with torch.device("meta"):
        model = Segmenter(make_pyramid("joined"), 150)
    assert model.head_width == 768
    assert isinstance(model.upernet, UPerNetDecoder)
    assert [block[0].output_size for block in model.upernet.psp.blocks] == [1, 2, 3, 6]
    assert model.aux_classifier[0].in_channels == 768  # the map of stride 16
    norms = [type(layer) for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert set(norms) == {SyncedBatchNorm2d}
    assert model.classifier.out_channels == 150


@pytest.mark.parametrize("rel_pos_bias", [False, True, "decomposed"])
def test_any_size(rel_pos_bias):
    """Images are padded to whole patches; logits cover the image without the padding."""
    model = make_segmenter(rel_pos_bias=rel_pos_bias)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "rel" in name:
            parameter.data.normal_(generator=generator)
    x = torch.randn(2, 3, 70, 90, generator=generator)
    logits = model(x)
    assert {name: own.shape for name, own in logits.items()} == dict.fromkeys(("out", "aux"), (2, 4, 70, 90))
    sum(own.square().mean() for own in logits.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    model.eval()
    with torch.no_grad():
        ((name, ours),) = model(x).items()
        filled = F.pad(x, (0, 6, 0, 10))
        assert name == "out"
        assert torch.allclose(ours, model(filled)["out"][..., :70, :90], atol=1e-6)
        small = model.forward_logits(filled)["out"]
        assert small.shape == (2, 4, 20, 24)
        enlarged = F.interpolate(small, (80, 96), mode="bilinear", align_corners=False)
        assert torch.allclose(ours, enlarged[..., :70, :90])


def test_a_plain_state_dict_is_read_back(tmp_path):
    for auxiliary in (True, False):
        model = make_segmenter(auxiliary=auxiliary).eval()
        torch.save(model.state_dict(), tmp_path / "segmenter.pth")
        loaded = itpn.load(tmp_path / "segmenter.pth", num_heads=4)
        assert isinstance(loaded, Segmenter)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(loaded(x)["out"], model(x)["out"])
        assert itpn.inspect(tmp_path / "segmenter.pth").task == "segmentation"


def test_layers_of_the_learning_rate():
    model = make_segmenter()
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    decays = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert scales["backbone.backbone.patch_embed.proj.weight"] == 0.5**5
    assert scales["backbone.backbone.stages.2.1.attn.qkv.weight"] == 0.5
    assert {scale for name, scale in scales.items() if not name.startswith("backbone.backbone.")} == {1.0}
    assert decays["backbone.backbone.pos_embed"] == 0


def test_two_processes_compute_what_one_does(tmp_path):
    """Two images, one fully labelled and one hardly: gradients, and the statistics of batch norm."""
    model = make_segmenter()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    targets = torch.randint(4, (2, 64, 64), generator=generator)
    targets[1, 3:] = 255
    options = {"head_width": 32, "drop_rate": 0.0, "auxiliary": False}
    # in float64, because a map of 1x1 has two values to take a std of
    state = {n: t.double() for n, t in model.state_dict().items() if not n.startswith("aux_classifier.")}
    given = {"backbone": NANO, "options": options, "state": state, "images": images.double(), "targets": targets}
    assert compare_processes(given, tmp_path) == 12


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="four concatenated maps"):
        Segmenter(make_pyramid("pooled", **NANO), num_classes=3)
    with pytest.raises(ValueError, match="at least 2"):
        Segmenter(make_pyramid("joined", **NANO), num_classes=1)
