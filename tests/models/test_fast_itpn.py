"""Fast-iTPN: sizes, its recipes, and masked pre-training."""

import pytest
import timm
import torch

from itpn.data.shapes import write_shapes
from itpn.errors import UserError
from itpn.masked.masking import draw_random_mask, split_mask
from itpn.models.hivit import HiViT
from itpn.tasks.configs import PretrainingConfig, PretrainingModelConfig
from itpn.tasks.pretraining.network import build_masked_model
from itpn.tasks.recipe_files import list_recipes, read_recipe
from itpn.tasks.run import train

# millions of parameters (REFERENCE, section 1: the authors' table), and as counted
PUBLISHED = {"tiny": (24, 24.22), "small": (40, 39.91), "base": (85, 84.83), "large": (312, 312.02)}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size):
    """The authors' numbers are rounded and of fine-tuned classifiers."""
    with torch.device("meta"):
        model = timm.create_model(f"fast_itpn_{size}", init_values=0.1)
    published, exact = PUBLISHED[size]
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(parameters) == published
    assert parameters == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("name", [name for name in list_recipes("fast-itpn-[cpm]*_*") if "nano" not in name])
def test_recipes_build(name):
    _, config = read_recipe(name)
    config.check()
    config.teacher.width = 768  # that of CLIP-L, which is not built here
    with torch.device("meta"):
        model = build_masked_model(config.model, (224, 224), config.teacher)
    block = model.backbone.stages[2][0]
    assert block.ls1.gamma.shape == (model.backbone.embed_dim,)
    assert model.backbone.rel_pos_grid is None
    if "clip-l" in name:
        assert (config.trainer.max_epochs, config.model.pyramid_depth, config.model.init_values) == (1600, 1, 0.1)
        assert config.teacher.name.startswith("vit_large_patch14_clip")
        assert config.model.drop_path_rate == (0.2 if "large" in name else 0.1)


@pytest.mark.parametrize("name", ["fast-itpn-pixel_nano", "fast-itpn-mfm_nano"])
def test_the_loss_falls(name, tmp_path):
    """With token migration; the recipes are those of iTPN-nano with another network."""
    recipe, config = read_recipe(name)
    _, plain = read_recipe(name.removeprefix("fast-"))
    plain.model.name = f"fast_{plain.model.name}"
    assert config == plain
    folders = write_shapes(tmp_path / "shapes", train=32, val=6, img_size=32)
    config.data.root, config.data.img_size = (str(folders.imagefolder / "train"),), 32
    config.data.batch_size, config.data.num_workers, config.optimizer.lr = 8, 0, 2e-3
    config.trainer.max_epochs, config.trainer.log_every_n_steps, config.output_dir = 6, 2, str(tmp_path)
    config.model.migrate_ratio = 0.25
    run = train(config, recipe)
    rows = [float(row.split(",")[2]) for row in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert sum(rows[-3:]) < 0.9 * sum(rows[:3])


@torch.no_grad()
def test_masked_patches_change_nothing():
    """The output of visible patches equals that of attention that leaves the masked ones out."""
    torch.manual_seed(0)
    model = timm.create_model("fast_itpn_nano", img_size=64, patch_size=8, num_classes=0, init_values=0.5).eval()
    assert isinstance(model, HiViT)
    for block in model.stages[2]:
        torch.nn.init.normal_(block.attn.q_bias)
        torch.nn.init.normal_(block.attn.v_bias)
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.1)
    images, batch = torch.randn(2, 3, 64, 64), torch.arange(2)[:, None]
    visible, masked, _ = split_mask(draw_random_mask(2, 64, 0.75), 16)
    whole, kept = model.forward_stages(images), model.forward_stages(images, visible)
    for stage in range(2):
        torch.testing.assert_close(kept[stage], whole[stage][batch, visible], atol=1e-5, rtol=1e-5)
    x = model.merges[1](whole[1]).flatten(1, 3) + model.pos_embed
    blocked = torch.zeros(2, 1, 1, 64).scatter(3, masked[:, None, None], float("-inf"))
    for block in model.stages[2]:
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).split(128, dim=2)
        q, v = q + attn.q_bias, v + attn.v_bias
        q, k, v = (y.reshape(2, 64, 4, 32).transpose(1, 2) for y in (q, k, v))
        scores = q @ k.transpose(-2, -1) * 32**-0.5 + blocked
        x = x + block.ls1(attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        gate, value = block.mlp.fc1(block.norm2(x)).chunk(2, dim=2)
        x = x + block.ls2(block.mlp.fc2(block.mlp.norm(gate * gate.sigmoid() * value)))
    torch.testing.assert_close(kept[2].flatten(1, 3), x[batch, visible], atol=1e-5, rtol=1e-5)


def test_settings_reach_the_network():
    settings = {"migrate_ratio": 0.25, "migrate_from": 1, "gather_window": 4, "gather_side": 2}
    model = build_masked_model(PretrainingModelConfig("fast_itpn_nano", **settings), (64, 64))
    assert {name: getattr(model.backbone, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"migrate_ratio": 1.0}, "--model.migrate-ratio must be at least 0 and below 1, not 1.0"),
        ({"migrate_ratio": -0.1}, "--model.migrate-ratio must be"),
        ({"migrate_from": -1}, "--model.migrate-from must be at least 0, not -1"),
        ({"gather_window": -7}, "--model.gather-window must be at least 0, not -7"),
        ({"gather_window": 7, "gather_side": 2}, "--model.gather-side must divide --model.gather-window 7, not 2"),
        ({"gather_side": 0}, "--model.gather-side must divide"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(UserError, match=message):
        PretrainingConfig(model=PretrainingModelConfig(**settings)).check()


@pytest.mark.parametrize("settings", [{"rel_pos_bias": True}, {"name": "hivit_tiny"}])
def test_gathering_refuses_relative_positions(settings):
    with pytest.raises(UserError, match=r"--model\.gather-window needs --model\.rel-pos-bias False"):
        build_masked_model(PretrainingModelConfig(gather_window=7, **settings), (224, 224))
