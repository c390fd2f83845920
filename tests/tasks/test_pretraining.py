"""Optimiser and schedule of the published recipes, against values worked out by hand."""

from types import SimpleNamespace

import pytest
import torch

from itpn.data.files import ImageSource
from itpn.tasks.configs import OptimizerConfig, PretrainingDataConfig
from itpn.tasks.pretraining.data import make_loader
from itpn.tasks.pretraining.module import PretrainingTask, spread
from itpn.tasks.pretraining.network import build_masked_model
from itpn.tasks.recipes import read_recipe
from itpn.training.config import image_size
from itpn.training.module import learning_rate


def make_task(world_size=1, accumulate=1, images=1_281_167, **data) -> PretrainingTask:
    recipe, config = read_recipe("itpn-pixel_hivit-base-p16_8xb512-amp-coslr-800e_in1k")
    config.model.name, config.model.decoder_depth = "itpn_nano", 1
    config.data = PretrainingDataConfig(**data)
    source = ImageSource(images=tuple(f"{i}.jpg" for i in range(images)))
    task = PretrainingTask(
        build_masked_model(config.model, image_size(config.data)),
        config,
        recipe,
        lambda rank, world: make_loader(config, source, rank, world),
    )
    loader = make_loader(config, source, 0, world_size)
    task._trainer = SimpleNamespace(
        global_rank=0,
        world_size=world_size,
        accumulate_grad_batches=accumulate,
        precision="32-true",
        estimated_stepping_batches=800 * -(-len(loader) // accumulate),
    )
    return task


@pytest.mark.parametrize(
    ("world_size", "accumulate", "batch_size", "expected"),
    [(8, 1, 512, 2.4e-3), (1, 16, 256, 2.4e-3), (1, 1, 256, 1.5e-4), (2, 4, 128, 6e-4)],
)
def test_learning_rate_follows_the_true_global_batch(world_size, accumulate, batch_size, expected):
    task = make_task(world_size, accumulate, batch_size=batch_size)
    assert task.peak_lr() == pytest.approx(expected)
    task.config.optimizer.lr = 0.5
    assert task.peak_lr() == 0.5


def test_learning_rate_of_a_set_smaller_than_a_batch():
    assert make_task(images=64, batch_size=512).peak_lr() == pytest.approx(1.5e-4 * 64 / 256)


def test_schedule_of_800_epochs():
    """312 steps an epoch, 40 of 800 epochs of warm-up from 1e-4 of the peak, cosine to 0."""
    task = make_task(8)
    assert task.steps_per_epoch() == 1_281_167 // 4096 == 312
    share = learning_rate(task.config.optimizer, 2.4e-3, 800 * 312, 312)
    assert share(0) == pytest.approx(1e-4)
    assert share(20 * 312) == pytest.approx(0.50005)
    assert share(40 * 312) == 1.0
    assert share(420 * 312) == pytest.approx(0.5)  # halfway down
    assert share(610 * 312) == pytest.approx(0.1464466, abs=1e-6)  # three quarters: (1 + cos(3 pi / 4)) / 2
    assert share(800 * 312) == pytest.approx(0.0, abs=1e-12)


def test_short_runs_warm_up_for_a_tenth():
    share = learning_rate(OptimizerConfig(warmup_epochs=40), 1.0, 100, 10)
    assert share(9) < 1
    assert share(10) == 1
    assert learning_rate(OptimizerConfig(), 1.0, 1, 1)(0) == 1  # a single step is not wasted on warming up
    assert learning_rate(OptimizerConfig(min_lr=0.1), 0.5, 100, 10)(100) == pytest.approx(0.2)


def test_no_decay_on_norms_biases_positions_and_mask_token():
    task = make_task(batch_size=8)
    task.config.model.pos_embed = "learned"
    task.model.backbone.pos_embed.requires_grad_(True)
    configured = task.configure_optimizers()
    optimizer = configured["optimizer"]
    assert optimizer.defaults["fused"]
    assert (optimizer.defaults["betas"], optimizer.defaults["lr"]) == ((0.9, 0.95), pytest.approx(1.5e-4 * 8 / 256))
    names = {id(p): name for name, p in task.model.named_parameters()}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    spared = {names[id(p)] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    assert decayed | spared == {name for name, p in task.model.named_parameters() if p.requires_grad}
    for name in spared:
        assert name.endswith("bias") or "norm" in name or name in ("backbone.pos_embed", "decoder.mask_token"), name
    for name in decayed:
        assert name.endswith("weight"), name
        assert "norm" not in name
    assert "backbone.patch_embed.proj.weight" in decayed


def test_fused_steps_give_way_to_scaled_gradients_that_are_clipped():
    task = make_task(batch_size=8)
    task._trainer.precision = "16-mixed"
    assert task.configure_optimizers()["optimizer"].defaults["fused"]
    task.config.optimizer.clip_grad = 1.0
    assert not task.configure_optimizers()["optimizer"].defaults["fused"]


def test_spread_sees_a_collapse():
    """Of targets that are all the same, and of those that tell nothing but the position; not of healthy ones."""
    noise = torch.randn(64, 16, 8, generator=torch.Generator().manual_seed(0))
    assert float(spread(torch.ones(64, 16, 8))) == 0
    assert float(spread(noise[:1].expand(64, -1, -1))) == 0
    assert float(spread(noise)) == pytest.approx(1, abs=0.02)
    assert float(spread(noise[:1])) == pytest.approx(1, abs=0.1)


def test_normalisation_and_back():
    task = make_task(batch_size=8)
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    x = task.normalize(images)
    assert x[1, 2, 3, 1].item() == pytest.approx((images[1, 2, 3, 1].item() / 255 - 0.406) / 0.225, abs=1e-6)
    assert torch.equal(task.normalize.undo(x), images)
