"""The networks by name and size, and their interface, which is timm's."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import itpn
from itpn.masked.masking import draw_random_mask, split_mask
from itpn.models.hivit import HiViT
from itpn.models.position import (
    relative_position_index,
    resample_position_table,
    resample_relative_table,
    sincos_position_table,
)

# millions of parameters with a classifier, billions of MACs (REFERENCE: Zhang et al. 2023; mmpretrain)
PUBLISHED = {"hivit_tiny": (19.18, 4.60), "hivit_small": (37.53, 9.07), "hivit_base": (79.05, 18.47)}


def count_macs(model: HiViT, visible: torch.Tensor | None = None) -> dict[str, float]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval().forward_stages(torch.zeros(1, 3, 224, 224, device="meta"), visible)
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for op, flops in counts.items() if "attention" in op or "bmm" in op)
    return {"attention": attention / 2e9, "other": (sum(counts.values()) - attention) / 2e9}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    parameters, flops = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.005)
    assert sum(count_macs(model).values()) == pytest.approx(flops, rel=0.005)


@pytest.mark.parametrize("name", ["itpn_base", "hivit_tiny"])
def test_a_masked_encoder_costs_a_quarter(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
        visible = split_mask(draw_random_mask(1, 196, 0.75), 49).visible
    whole, masked = count_macs(model), count_macs(model, visible)
    assert whole["attention"] > 0
    assert masked["other"] == pytest.approx(whole["other"] / 4, rel=0.02)


@pytest.mark.parametrize("rel_pos_bias", [False, True])
def test_masked_patches_change_nothing_before_attention(rel_pos_bias):
    """And after it, the output of visible patches equals that of attention that leaves the masked ones out."""
    torch.manual_seed(0)
    model = HiViT(64, 8, num_classes=0, embed_dim=64, depths=(1, 1, 2), num_heads=4, rel_pos_bias=rel_pos_bias).eval()
    for block in model.stages[2]:
        if rel_pos_bias:
            torch.nn.init.normal_(block.attn.relative_position_bias_table)
    images, batch = torch.randn(2, 3, 64, 64), torch.arange(2)[:, None]
    visible, masked, _ = split_mask(draw_random_mask(2, 64, 0.75), 16)
    whole, kept = model.forward_stages(images), model.forward_stages(images, visible)
    for stage in range(2):
        torch.testing.assert_close(kept[stage], whole[stage][batch, visible], atol=1e-6, rtol=0)

    # the slow, obvious way: all patches, with masked ones taken out of every softmax
    x = model.merges[1](whole[1]).flatten(1, 3) + model.pos_embed
    blocked = torch.zeros(2, 1, 1, 64).scatter(3, masked[:, None, None], float("-inf"))
    for block in model.stages[2]:
        h = block.norm1(x)
        q, k, v = block.attn.qkv(h).reshape(2, 64, 3, 4, 16).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * 16**-0.5 + blocked
        if rel_pos_bias:
            table = block.attn.relative_position_bias_table
            scores = scores + table[relative_position_index((8, 8))].permute(2, 0, 1)
        h = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 64, 64)
        x = x + block.attn.proj(h)
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(kept[2].flatten(1, 3), x[batch, visible], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("patch", [4, 8, 12, 16, 32])
@pytest.mark.parametrize("channels", [1, 5])
def test_any_patch_channels_and_size(patch, channels):
    model = timm.create_model("itpn_nano", patch_size=patch, in_chans=channels, img_size=(4 * patch, 6 * patch))
    assert model.pos_embed.shape == (1, 24, 128)
    maps = model.forward_intermediates(torch.randn(1, channels, 2 * patch, 5 * patch), intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 8, 20), (64, 4, 10), (128, 2, 5)]


def test_patch_embedding_is_a_convolution():
    model = timm.create_model("itpn_nano", patch_size=8, img_size=32)
    images = torch.randn(2, 3, 32, 48)
    ours = model.forward_intermediates(images, indices=[0], intermediates_only=True)[0]
    x = model.patch_embed.proj(images).permute(0, 2, 3, 1)
    expected = model.stages[0][0](model.patch_embed.norm(x)).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_wrong_sizes_are_refused():
    model = timm.create_model("itpn_nano", img_size=32, patch_size=8)
    with pytest.raises(ValueError, match=r"30x32 is not a multiple of the patch size 8.*32x32"):
        model(torch.zeros(1, 3, 30, 32))
    with pytest.raises(ValueError, match="divisible by 4"):
        HiViT(28, 14)
    with pytest.raises(ValueError, match="num_heads"):
        HiViT(embed_dim=96, num_heads=5)


def test_timm_knows_the_models():
    assert all(timm.is_model(name) for name in itpn.list_models())
    assert itpn.list_models("hivit_*") == ["hivit_tiny", "hivit_small", "hivit_base", "hivit_base_4420"]
    model = timm.create_model("hivit_tiny", num_classes=7, img_size=64)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    features = timm.create_model("itpn_nano", features_only=True, out_indices=(1, 2))
    assert features.feature_info.channels() == [64, 128]
    assert features.feature_info.reduction() == [8, 16]
    assert [tuple(f.shape) for f in features(torch.randn(1, 3, 64, 96))] == [(1, 64, 8, 12), (1, 128, 4, 6)]


def test_classifier_follows_timm():
    model = timm.create_model("itpn_nano", img_size=32, patch_size=8, num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    tokens = model.forward_features(images)
    assert tokens.shape == (2, 16, 128)
    features = model.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(features, model.fc_norm(tokens.mean(1)))
    torch.testing.assert_close(model(images), model.head(features))
    model.reset_classifier(3)
    assert model.get_classifier().out_features == model(images).shape[1] == 3
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), features)
    assert "pos_embed" in model.no_weight_decay()


def test_intermediates_follow_timm():
    model = timm.create_model("itpn_nano", img_size=32, patch_size=8, num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32)
    tokens, maps = model.forward_intermediates(images)
    torch.testing.assert_close(tokens, model.forward_features(images))
    torch.testing.assert_close(maps[2].flatten(2).transpose(1, 2), tokens)
    channels_last = model.forward_intermediates(images, indices=1, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(channels_last[0].permute(0, 3, 1, 2), maps[2])
    assert model.prune_intermediate_layers([1]) == [1]
    assert len(model.stages) == 2
    pruned = model.forward_intermediates(images, indices=[1], intermediates_only=True)
    torch.testing.assert_close(pruned[0], maps[1])
    tokens, _ = model.forward_intermediates(images)
    torch.testing.assert_close(tokens, maps[1].flatten(2).transpose(1, 2))
    torch.testing.assert_close(model.forward_features(images), tokens)
    torch.testing.assert_close(model(images), tokens.mean(1))
    model(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.reset_classifier(5)
    assert model(images).shape == (2, 5)


def test_layer_groups_cover_every_parameter_in_order():
    from timm.models import group_parameters

    model = timm.create_model("hivit_tiny")
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    names = dict(model.named_parameters())
    assert set(groups) == set(names)
    assert groups["patch_embed.proj.weight"] == groups["pos_embed"] == 0
    order = [groups[f"stages.{s}.{b}.mlp.fc1.weight"] for s, depth in enumerate((2, 2, 10)) for b in range(depth)]
    assert order == sorted(set(order))
    assert groups["head.weight"] > order[-1]


def test_stochastic_depth_grows_over_all_blocks():
    model = timm.create_model("hivit_tiny", drop_path_rate=0.2)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.2 * i / 13 for i in range(14)])


def test_layer_scale_starts_small():
    plain = timm.create_model("itpn_nano", img_size=32, patch_size=8, num_classes=0).eval()
    scaled = timm.create_model("itpn_nano", img_size=32, patch_size=8, num_classes=0, init_values=1e-9).eval()
    missing = scaled.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing
    assert all(".ls" in name for name in missing)
    images = torch.randn(1, 3, 32, 32)
    # layer scale 0 removes all branches: embedding, merges and positions are left
    x = scaled.merges[1](scaled.merges[0](scaled.patch_embed(images))).flatten(1, 3) + scaled.pos_embed
    torch.testing.assert_close(scaled.forward_features(images), x, atol=1e-6, rtol=1e-5)


def test_position_tables():
    table = sincos_position_table((3, 5), 16)
    # written out: column 4, row 2, frequencies 1, 10^-1, 10^-2, 10^-3 (dim / 4 = 4 of them)
    frequency = torch.tensor([1.0, 0.1, 0.01, 0.001])
    expected = torch.cat([f(p * frequency) for p in (4, 2) for f in (torch.sin, torch.cos)])
    torch.testing.assert_close(table[0, 2 * 5 + 4], expected)
    assert resample_position_table(table, (3, 5), (3, 5)) is table
    constant = torch.full((1, 15, 8), 0.7)
    torch.testing.assert_close(resample_position_table(constant, (3, 5), (9, 4)), torch.full((1, 36, 8), 0.7))
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_position_table((2, 2), 6)


def test_relative_positions():
    index = relative_position_index((2, 3))
    assert index.shape == (6, 6)
    offsets = [(r - 1, c - 2) for r in range(3) for c in range(5)]  # of table rows
    for query in range(6):
        for key in range(6):
            row, col = query // 3 - key // 3, query % 3 - key % 3
            assert offsets[index[query, key]] == (row, col)
    ramp = torch.tensor([[r * 1.0, c * 1.0] for r in range(-1, 2) for c in range(-2, 3)])  # the offset itself
    larger = resample_relative_table(ramp, (2, 3), (3, 5))
    assert larger.shape == (5 * 9, 2)
    torch.testing.assert_close(larger.reshape(5, 9, 2)[2, 4], torch.zeros(2), atol=1e-6, rtol=0)  # stays at its zero
