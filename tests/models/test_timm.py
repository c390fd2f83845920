"""Our backbones work wherever timm's models work."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import SelectAdaptivePool2d
from timm.models._manipulate import adapt_input_conv
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import itpn
from itpn.checkpoints.adapters import ADAPTERS
from itpn.models.position import resample_position_table, resample_relative_table
from itpn.models.pyramid import PyramidBackbone
from itpn.teachers.timm_teacher import teacher_width

BACKBONES = ["itpn_nano", "fast_itpn_nano", "hivit_tiny"]
PYRAMIDS = ["itpn_nano_pyramid", "fast_itpn_nano_pyramid"]


SMALL = {"hivit_tiny": {"embed_dim": 64, "depths": (1, 1, 2), "num_heads": 2}}


def build(name: str, **kwargs: Any) -> Any:
    """For images of 64 pixels and five classes."""
    classes = 0 if "pyramid" in name or kwargs.get("features_only") else 5
    return timm.create_model(name, **{"img_size": 64, "num_classes": classes, **SMALL.get(name, {}), **kwargs}).eval()


def create(name: str, **kwargs: Any) -> Any:
    """A model whose output depends on every parameter: none is zero or one."""
    torch.manual_seed(0)
    model = build(name, **kwargs)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape) * 0.02
    return model


def images(*size: int, chans: int = 3) -> Tensor:
    return torch.randn(2, chans, *(size or (64, 64)), generator=torch.Generator().manual_seed(1))


def tensors_of(output: Any) -> list[Tensor]:
    return list(output.values()) if isinstance(output, dict) else output if isinstance(output, list) else [output]


def assert_equal(output: Any, expected: Any, **tolerance: float) -> None:
    for ours, theirs in zip(tensors_of(output), tensors_of(expected), strict=True):
        torch.testing.assert_close(ours, theirs, **(tolerance or {"rtol": 0, "atol": 0}))


# --- features


@pytest.mark.parametrize("name", BACKBONES + PYRAMIDS)
def test_features_only(name):
    model = create(name, **({} if "pyramid" in name else {"num_classes": 0}))
    maps = model.forward_intermediates(images(), intermediates_only=True)
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    assert [64 // m.shape[2] for m in maps] == [info["reduction"] for info in model.feature_info] == [4, 8, 16]
    if "pyramid" in name:
        assert_equal(maps, model(images()))
    for indices in (None, (0,), (1, 2), (0, 2), (-1,)):
        chosen = {} if indices is None else {"out_indices": indices}
        features = build(name, features_only=True, **chosen)
        features.model.load_state_dict(model.state_dict(), strict=False)
        expected = [maps[i] for i in indices or range(3)]
        assert features.feature_info.channels() == [m.shape[1] for m in expected]
        assert features.feature_info.reduction() == [64 // m.shape[2] for m in expected]
        assert_equal(features(images()), expected)


@pytest.mark.parametrize("name", BACKBONES + PYRAMIDS)
def test_forward_intermediates(name):
    model = create(name)
    final, maps = model.forward_intermediates(images())
    assert_equal(final, model.forward_features(images()))
    for indices in (1, 2, [0], [0, 2], [-1]):
        expected = [maps[i] for i in (range(3)[-indices:] if isinstance(indices, int) else indices)]
        for output_fmt, order in (("NCHW", (0, 1, 2, 3)), ("NHWC", (0, 2, 3, 1))):
            options = {"indices": indices, "output_fmt": output_fmt}
            final_too, some = model.forward_intermediates(images(), **options)
            assert_equal(final_too, final)
            assert_equal(some, [m.permute(order) for m in expected])
            assert_equal(model.forward_intermediates(images(), intermediates_only=True, **options), some)
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(images(), output_fmt="NLC")
    with pytest.raises(ValueError, match="no norm"):
        model.forward_intermediates(images(), norm=True)


@pytest.mark.parametrize("name", BACKBONES + PYRAMIDS)
@pytest.mark.parametrize("indices", [[0], [0, 1], [2], 1])
def test_pruning_changes_no_value(name, indices):
    model = create(name)
    expected = model.forward_intermediates(images(), indices=indices, intermediates_only=True)
    before = sum(p.numel() for p in model.parameters())
    taken = model.prune_intermediate_layers(indices)
    assert taken == ([2] if indices == 1 else indices)
    assert_equal(model.forward_intermediates(images(), indices=taken, intermediates_only=True), expected)
    if "pyramid" not in name:
        assert sum(p.numel() for p in model.parameters()) < before


def test_levels_of_a_pyramid():
    maps = tensors_of(create("itpn_nano_pyramid")(images()))
    for levels, channels in (("pooled", [32] * 5), ("joined", [64, 96, 160, 160])):
        model = create("itpn_nano_pyramid", levels=levels)
        output = model(images())
        assert list(output) == [str(i) for i in range(len(channels))]
        assert [m.shape[1] for m in output.values()] == channels
        assert [64 // m.shape[2] for m in output.values()] == [4 * 2**i for i in range(len(channels))]
        # torchvision takes one number
        assert model.out_channels == (32 if levels == "pooled" else channels)
        features = build("itpn_nano_pyramid", levels=levels, features_only=True)
        features.model.load_state_dict(model.state_dict())
        assert features.feature_info.channels() == channels
        assert_equal(features(images()), output)
        assert_equal([m[:, :32] for m in tensors_of(output)[:3]], maps)
    features = timm.create_model("itpn_nano_pyramid", levels="pooled", features_only=True, out_indices=(1, 4))
    assert features.feature_info.reduction() == [8, 64]
    assert [tuple(m.shape[2:]) for m in features(images(128, 64))] == [(16, 8), (2, 1)]


# --- classifier


@pytest.mark.parametrize("name", BACKBONES)
def test_reset_classifier(name):
    model = create(name)
    tokens = model.forward_features(images())
    features = model.forward_head(tokens, pre_logits=True)
    assert features.shape == (2, model.num_features) == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert_equal(model(images()), features)
    model.reset_classifier(7)
    assert model.num_classes == model.get_classifier().out_features == 7
    assert_equal(model(images()), model.head(features))
    model.reset_classifier(3, global_pool="")
    assert model(images()).shape == (2, 16, 3)
    model.reset_classifier(0, global_pool="")
    assert_equal(model(images()), model.fc_norm(tokens))
    assert not any(module.training for module in model.modules())
    bare = create(name, num_classes=0)
    assert_equal(bare(images()), bare.forward_features(images()).mean(dim=1))
    bare.reset_classifier(4, "avg")
    assert bare(images()).shape == (2, 4)


POOLINGS = {
    "avg": lambda x: x.mean(dim=1),
    "max": lambda x: x.amax(dim=1),
    "avgmax": lambda x: 0.5 * (x.mean(dim=1) + x.amax(dim=1)),
    "": lambda x: x,
}


@pytest.mark.parametrize("global_pool", POOLINGS)
@pytest.mark.parametrize("name", BACKBONES)
def test_global_pool(name, global_pool):
    """timm's poolings, compared with its SelectAdaptivePool2d on maps."""
    model = create(name, global_pool=global_pool)
    tokens = model.forward_features(images())
    pooled = POOLINGS[global_pool](tokens)
    if global_pool:
        theirs = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)(tokens.transpose(1, 2).unflatten(2, (4, 4)))
        assert_equal(pooled, theirs, rtol=1e-6, atol=1e-6)
    features = model.fc_norm(pooled)
    assert_equal(model.forward_head(tokens, pre_logits=True), features)
    assert_equal(model(images()), model.head(features))
    assert model(images()).shape == ((2, 5) if global_pool else (2, 16, 5))
    for other, pool in POOLINGS.items():
        model.reset_classifier(3, global_pool=other)
        assert_equal(model(images()), model.head(model.fc_norm(pool(tokens))))
        model.reset_classifier(0)
        assert_equal(model(images()), model.fc_norm(pool(tokens)))
    features = build(name, features_only=True, global_pool=global_pool)  # without pooling
    assert [m.shape[1] for m in features(images())] == features.feature_info.channels()


@pytest.mark.parametrize("wrong", ["token", "map", "catavgmax", "fast", "AVG", "mean", 3, ("avg",), ["avg"]])
@pytest.mark.parametrize("name", BACKBONES)
def test_unknown_poolings_are_refused(name, wrong):
    poolings = r"global_pool must be one of 'avg', 'max', 'avgmax', '', not "
    with pytest.raises(ValueError, match=poolings + re.escape(repr(wrong))):
        build(name, global_pool=wrong)
    model = create(name)
    before = model(images())
    with pytest.raises(ValueError, match=poolings):
        model.reset_classifier(3, global_pool=wrong)
    assert_equal(model(images()), before)


@pytest.mark.parametrize("name", PYRAMIDS)
def test_a_pyramid_is_not_pooled(name):
    assert build(name, global_pool="").global_pool == ""
    for pooling in ("avg", "max", "token"):
        with pytest.raises(ValueError, match=f"are not pooled: global_pool must be '', not '{pooling}'"):
            build(name, global_pool=pooling)
        with pytest.raises(ValueError, match="which are not pooled"):
            create(name).reset_classifier(0, global_pool=pooling)


@pytest.mark.parametrize("name", PYRAMIDS)
def test_a_pyramid_has_no_classifier(name):
    model = create(name)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    with pytest.raises(ValueError, match="num_classes must be 0, not 3"):
        model.reset_classifier(3)
    with pytest.raises(ValueError, match="num_classes must be 0, not 3"):
        timm.create_model(name, num_classes=3)


# --- training


@pytest.mark.parametrize("name", BACKBONES + PYRAMIDS)
def test_grad_checkpointing(name):
    results = []
    for enabled in (False, True):
        model = create(name).train()
        model.set_grad_checkpointing(enabled)
        output = model(images())
        sum(t.square().mean() for t in tensors_of(output)).backward()
        results.append((output, [p.grad for p in model.parameters()]))
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in results[0][1])
    assert_equal(results[1][0], results[0][0])
    assert_equal(results[1][1], results[0][1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", BACKBONES + PYRAMIDS)
def test_layer_decay(name):
    model = create(name, rel_pos_bias=True)
    prefix = "backbone." if "pyramid" in name else ""
    spared = model.no_weight_decay()
    groups = param_groups_layer_decay(model, weight_decay=0.05, no_weight_decay_list=spared, layer_decay=0.5)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    own = dict(model.named_parameters())
    order = ["patch_embed.proj.weight"]
    for stage, blocks in enumerate(model.backbone.stages if prefix else model.stages):
        order += [f"stages.{stage}.{i}.norm2.weight" for i in range(len(blocks))]
    scales = [scale[id(own[prefix + layer])] for layer in order]
    scales.append(scale[id(own["pyramid.top.weight" if prefix else "head.weight"])])
    assert scales == sorted(set(scales))
    assert scales[-1] == 1
    assert scale[id(own[f"{prefix}pos_embed"])] == scales[0]
    assert spared <= set(own)
    for parameter_name, parameter in own.items():
        assert (decay[id(parameter)] == 0) == (parameter.dim() <= 1 or parameter_name in spared)
    assert decay[id(own[f"{prefix}pos_embed"])] == 0
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert set(coarse) == set(own)


# --- weights


def save(path: Path, tensors: dict[str, Any], classes: int = 0) -> dict[str, Any]:
    """Write a file; returns the arguments that make timm load it."""
    torch.save(tensors, path)
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": classes}}


def theirs(model: nn.Module, name: str, layout: str) -> dict[str, Tensor]:
    """Weights as the public code would have saved them."""
    state = model.state_dict()
    if layout == "timm":
        return state
    if "pyramid" not in name:
        state = {f"backbone.{key}": tensor for key, tensor in state.items()}
    tensors, left = ADAPTERS[layout].from_ours(state, getattr(model, "backbone", model).rel_pos_grid)
    assert not left
    return tensors if layout == "mmpretrain" else {"model": tensors}


LAYOUTS = [
    *((name, "timm") for name in BACKBONES + PYRAMIDS),
    *(
        (name, layout)
        for name in ("itpn_nano", "hivit_tiny", "itpn_nano_pyramid")
        for layout in ("official", "mmpretrain")
    ),
    *((name, "official_fast") for name in ("fast_itpn_nano", "fast_itpn_nano_pyramid")),
]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_pretrained(tmp_path, name, layout):
    # mmpretrain's classifier has no norm before it
    own: dict[str, Any] = {"fc_norm": False} if layout == "mmpretrain" else {}
    model = create(name, **own)
    source = own | save(tmp_path / "weights.pth", theirs(model, name, layout), model.num_classes)
    same = build(name, **source)
    assert_equal(same(images()), model(images()))
    if layout != "timm":
        return  # the rest does not depend on the layout

    prefix = "backbone." if "pyramid" in name else ""
    stem = f"{prefix}patch_embed.proj.weight"
    for chans in (1, 2, 5, 13):
        adapted = build(name, in_chans=chans, **source)
        expected = {**model.state_dict(), stem: adapt_input_conv(chans, model.state_dict()[stem])}
        assert adapted.state_dict().keys() == expected.keys()
        assert_equal(list(adapted.state_dict().values()), list(expected.values()))
        if chans == 1:
            gray = images(chans=1)
            assert_equal(adapted(gray), model(gray.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)

    larger = build(name, img_size=(64, 96), **source).state_dict()
    for key, stored in model.state_dict().items():
        if key.endswith("pos_embed"):
            stored = resample_position_table(stored, (4, 4), (4, 6))
        elif key.endswith("relative_position_bias_table"):
            stored = resample_relative_table(stored, (4, 4), (4, 6))
        assert_equal(larger[key], stored)

    features = build(name, features_only=True, **source)
    assert_equal(features(images()), model.forward_intermediates(images(), intermediates_only=True))


@pytest.mark.parametrize("name", BACKBONES)
def test_another_classifier_is_randomly_initialized(tmp_path, name):
    model = create(name)
    source = save(tmp_path / "weights.pth", model.state_dict(), 5)
    other = build(name, num_classes=9, **source)
    tokens = model.forward_features(images())
    assert_equal(other.forward_head(tokens, pre_logits=True), model.forward_head(tokens, pre_logits=True))
    assert other(images()).shape == (2, 9)
    assert not other.head.bias.any()
    # pre-trained weights have none
    bare = create(name, num_classes=0)
    source = save(tmp_path / "bare.pth", bare.state_dict())
    tuned = build(name, num_classes=9, **source)
    assert_equal(tuned.forward_features(images()), bare.forward_features(images()))


@pytest.mark.parametrize("name", BACKBONES + PYRAMIDS)
def test_checkpoint_path(tmp_path, name):
    model = create(name)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.pth.tar")
    loaded = build(name, checkpoint_path=str(tmp_path / "last.pth.tar"))
    assert_equal(loaded(images()), model(images()))


@pytest.mark.parametrize("name", BACKBONES + PYRAMIDS)
def test_no_weights_are_published(tmp_path, name):
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
        build(name, pretrained=True)
    assert not timm.is_model_pretrained(name)
    with pytest.raises(RuntimeError, match=r"Unexpected|Missing"):
        build(name, **save(tmp_path / "other.pth", {"conv1.weight": torch.zeros(1)}, 0 if "pyramid" in name else 5))


def test_lists():
    assert {"itpn_base", "fast_itpn_large"} <= set(timm.list_models("*itpn*"))
    assert set(BACKBONES) <= set(timm.list_models())
    assert timm.list_models("*itpn*", pretrained=True) == timm.list_pretrained("*hivit*") == []


@pytest.mark.filterwarnings("error")
def test_a_pyramid_is_created_by_name_and_listed_by_us_alone():
    """timm's tests take whatever timm lists for a classifier."""
    assert timm.list_models("*_pyramid") == timm.list_models("*_pyramid", module="registry", include_tags=True) == []
    pyramids = itpn.list_models("*_pyramid")
    assert {*PYRAMIDS, "itpn_base_pyramid"} <= set(pyramids)
    assert all(timm.is_model(name) for name in pyramids)
    assert isinstance(timm.create_model("itpn_nano_pyramid"), PyramidBackbone)
    assert teacher_width("itpn_nano_pyramid", None) == 32


# --- any size, any compiler


@pytest.mark.parametrize("name", BACKBONES + PYRAMIDS)
def test_any_size(name):
    model = create(name, img_size=(64, 96))
    for size in ((64, 96), (96, 64), (32, 128), (16, 16)):
        maps = model.forward_intermediates(images(*size), intermediates_only=True)
        assert [tuple(m.shape[2:]) for m in maps] == [(size[0] // s, size[1] // s) for s in (4, 8, 16)]
        assert all(t.isfinite().all() for t in tensors_of(model(images(*size))))
    with pytest.raises(ValueError, match="72x64 is not a multiple of the patch size 16"):
        model(images(72, 64))


@pytest.mark.compile
def test_compile():
    model = create("fast_itpn_nano_pyramid", depths=(1, 1, 1), rel_pos_bias=True)  # every kind of layer in one
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_equal(compiled(images()), model(images()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BACKBONES + PYRAMIDS)
def test_export(name):
    model = create(name, depths=(1, 1, 1))
    exported = torch.export.export(model, (images(),), strict=False).module()
    assert_equal(exported(images()), model(images()), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # torch calls tracing deprecated, and warns of each Python number in a trace
@pytest.mark.parametrize("name", BACKBONES + PYRAMIDS)
def test_trace(name):
    # features_only returns a list: the dict of a whole pyramid cannot be traced
    options: dict = {"features_only": True} if "pyramid" in name else {"global_pool": "avgmax"}
    if "itpn" in name:
        options |= {"migrate_ratio": 0.5, "gather_window": 2}
    model = build(name, depths=(1, 1, 2), scriptable=True, exportable=True, **options)  # timm's hints for its layers
    traced = torch.jit.trace(model, images(), check_trace=False)
    other = images().flip(0)
    assert_equal(traced(other), model(other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["hivit_tiny", "itpn_nano_pyramid"])
def test_device_and_dtype_as_timm_takes_them(name):
    empty = build(name, device="meta", dtype=torch.float64)
    assert {tensor.device.type for tensor in [*empty.parameters(), *empty.buffers()]} == {"meta"}
    assert {parameter.dtype for parameter in empty.parameters()} == {torch.float64}
    half = build(name, features_only=True, dtype=torch.bfloat16)
    assert {m.dtype for m in half(images().bfloat16())} == {torch.bfloat16}
    torch.manual_seed(0)
    there = build(name, device=torch.device("cpu"))
    torch.manual_seed(0)
    assert_equal(list(there.state_dict().values()), list(build(name).state_dict().values()))


@pytest.mark.parametrize("name", ["hivit_tiny", "itpn_nano_pyramid"])
def test_construction_on_the_meta_device(name):
    """Large models are loaded this way: no memory until the weights are read; then buffers that no file holds."""
    model = create(name, rel_pos_bias=True)
    with torch.device("meta"):
        empty = build(name, rel_pos_bias=True, num_classes=model.num_classes)
    loaded = empty.to_empty(device="cpu")
    for buffer in loaded.buffers():
        buffer.zero_()
    loaded.load_state_dict(model.state_dict())
    getattr(loaded, "backbone", loaded).init_non_persistent_buffers()
    assert_equal(loaded(images()), model(images()))
