"""Optimiser and schedule of the published recipes, against values worked out by hand."""

import pytest
import torch

from itpn.data.files import ImageSource
from itpn.tasks.configs import OptimizerConfig, PretrainingConfig, PretrainingDataConfig
from itpn.tasks.pretraining.data import make_loader
from itpn.tasks.pretraining.module import PretrainingModule, spread
from itpn.tasks.pretraining.network import build_masked_model
from itpn.tasks.recipe_files import read_recipe
from itpn.training.config import image_size
from itpn.training.optimization import RunLength, learning_rate, make_optimizer, measure_run, peak_lr


def make_config(**data) -> PretrainingConfig:
    _, config = read_recipe("itpn-pixel_hivit-base-p16_8xb512-amp-coslr-800e_in1k")
    config.model.name, config.model.decoder_depth = "itpn_nano", 1
    config.data = PretrainingDataConfig(**data)
    return config


def make_task() -> PretrainingModule:
    config = make_config(batch_size=8)
    return PretrainingModule(build_masked_model(config.model, image_size(config.data)), config, "test")


def measure(config: PretrainingConfig, world_size=1, accumulate=1, images=1_281_167) -> RunLength:
    config.trainer.accumulate_grad_batches = accumulate
    loader = make_loader(config, ImageSource(images=tuple(f"{i}.jpg" for i in range(images))), 0, world_size)
    return measure_run(config, loader.images, len(loader), world_size)


@pytest.mark.parametrize(
    ("world_size", "accumulate", "batch_size", "expected"),
    [(8, 1, 512, 2.4e-3), (1, 16, 256, 2.4e-3), (1, 1, 256, 1.5e-4), (2, 4, 128, 6e-4)],
)
def test_learning_rate_follows_the_true_global_batch(world_size, accumulate, batch_size, expected):
    config = make_config(batch_size=batch_size)
    global_batch = measure(config, world_size, accumulate).global_batch
    assert peak_lr(config.optimizer, global_batch) == pytest.approx(expected)
    config.optimizer.lr = 0.5
    assert peak_lr(config.optimizer, global_batch) == 0.5


def test_learning_rate_of_a_set_smaller_than_a_batch():
    config = make_config(batch_size=512)
    assert peak_lr(config.optimizer, measure(config, images=64).global_batch) == pytest.approx(1.5e-4 * 64 / 256)


def test_schedule_of_800_epochs():
    """312 steps an epoch, 40 of 800 epochs of warm-up from 1e-4 of the peak, cosine to 0."""
    config = make_config(batch_size=512)
    length = measure(config, world_size=8)
    assert length.steps_per_epoch == 1_281_167 // 4096 == 312
    assert length.total_steps == 800 * 312
    factor = learning_rate(config.optimizer, 2.4e-3, 800 * 312, 312)
    assert factor(0) == pytest.approx(1e-4)
    assert factor(20 * 312) == pytest.approx(0.50005)
    assert factor(40 * 312) == 1.0
    assert factor(420 * 312) == pytest.approx(0.5)  # halfway down
    assert factor(610 * 312) == pytest.approx(0.1464466, abs=1e-6)  # three quarters: (1 + cos(3 pi / 4)) / 2
    assert factor(800 * 312) == pytest.approx(0.0, abs=1e-12)


def test_short_runs_warm_up_for_a_tenth():
    factor = learning_rate(OptimizerConfig(warmup_epochs=40), 1.0, 100, 10)
    assert factor(9) < 1
    assert factor(10) == 1
    assert learning_rate(OptimizerConfig(), 1.0, 1, 1)(0) == 1  # a single step is not wasted on warming up
    assert learning_rate(OptimizerConfig(min_lr=0.1), 0.5, 100, 10)(100) == pytest.approx(0.2)


def test_no_decay_on_norms_biases_positions_and_mask_token():
    module = make_task()
    module.config.model.pos_embed = "learned"
    module.model.backbone.pos_embed.requires_grad_(True)
    optimizer, _ = make_optimizer(module, measure(module.config), "32-true")
    assert optimizer.defaults["fused"]
    assert (optimizer.defaults["betas"], optimizer.defaults["lr"]) == ((0.9, 0.95), pytest.approx(1.5e-4 * 8 / 256))
    names = {id(p): name for name, p in module.model.named_parameters()}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    spared = {names[id(p)] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    assert decayed | spared == {name for name, p in module.model.named_parameters() if p.requires_grad}
    for name in spared:
        assert name.endswith("bias") or "norm" in name or name in ("backbone.pos_embed", "decoder.mask_token"), name
    for name in decayed:
        assert name.endswith("weight"), name
        assert "norm" not in name
    assert "backbone.patch_embed.proj.weight" in decayed


def test_fused_steps_give_way_to_scaled_gradients_that_are_clipped():
    module = make_task()
    assert make_optimizer(module, measure(module.config), "16-mixed")[0].defaults["fused"]
    module.config.optimizer.clip_grad = 1.0
    assert not make_optimizer(module, measure(module.config), "16-mixed")[0].defaults["fused"]
    assert make_optimizer(module, measure(module.config), "bf16-mixed")[0].defaults["fused"]


def test_spread_sees_a_collapse():
    """Of targets that are all the same, and of those that tell nothing but the position; not of healthy ones."""
    noise = torch.randn(64, 16, 8, generator=torch.Generator().manual_seed(0))
    assert float(spread(torch.ones(64, 16, 8))) == 0
    assert float(spread(noise[:1].expand(64, -1, -1))) == 0
    assert float(spread(noise)) == pytest.approx(1, abs=0.02)
    assert float(spread(noise[:1])) == pytest.approx(1, abs=0.1)


def test_normalisation_and_back():
    module = make_task()
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    x = module.normalize(images)
    assert x[1, 2, 3, 1].item() == pytest.approx((images[1, 2, 3, 1].item() / 255 - 0.406) / 0.225, abs=1e-6)
    assert torch.equal(module.normalize.undo(x), images)
