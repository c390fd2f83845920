"""Layer-wise learning rates, decay and schedules of the published fine-tuning, against values worked out by hand."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup

from itpn.seeding import derive_seed
from itpn.tasks.classification.module import ClassificationModule
from itpn.tasks.classification.network import build_recipe
from itpn.tasks.configs import ClassificationConfig
from itpn.tasks.finetuning.module import decay_per_layer
from itpn.tasks.recipe_files import read_recipe
from itpn.training.loop import seed_pass
from itpn.training.optimization import learning_rate, measure_run, peak_lr

PIXEL_B = "hivit-base-3324-p16_itpn-pixel-pre_8xb128-coslr-100e_in1k"
PIXEL_L = "hivit-large-2240-p16_itpn-pixel-pre_8xb128-coslr-50e_in1k"
CLIP_B = "hivit-base-3324-p16_itpn-clip-pre_8xb128-coslr-100e_in1k"
CLIP_L = "hivit-large-2240-p16_itpn-clip-pre_8xb64-coslr-50e_in1k"


def make_task(recipe: str, init_values: float | None = None) -> ClassificationModule:
    """Without memory for its weights, on eight processes with ImageNet-1K."""
    name, config = read_recipe(recipe)
    assert isinstance(config, ClassificationConfig)
    config.model.ema_decay, config.model.init_values = None, init_values
    config.data.mean, config.data.std = (0.0,), (1.0,)
    with torch.device("meta"):
        model = build_recipe(config, None, None)[0]
    module = ClassificationModule(model, config, name, tuple(map(str, range(1000))))
    return module


@pytest.mark.parametrize(
    ("recipe", "peak", "scales"),
    [
        # d^(13/31) is 0.80717 a layer; layer k of 31 has its power 31 - k
        (
            PIXEL_B,
            1.6e-3,
            {
                "pos_embed": 0.00130607,
                "patch_embed.proj.weight": 0.00130607,
                "stages.0.0.mlp.fc1.weight": 0.00161808,
                "stages.0.2.mlp.fc1.weight": 0.00248351,
                "merges.0.reduction.weight": 0.00248351,
                "stages.2.23.attn.qkv.weight": 0.80717305,
                "fc_norm.weight": 0.80717305,
                "head.weight": 1.0,
            },
        ),
        # d^(13/45) is 0.84138
        (
            PIXEL_L,
            4e-3,
            {
                "patch_embed.proj.weight": 0.00042142,
                "stages.0.0.mlp.fc1.weight": 0.00050087,
                "merges.1.reduction.weight": 0.00042142 / 0.84138287**4,
                "stages.2.0.attn.proj.weight": 0.00042142 / 0.84138287**5,
                "stages.2.39.attn.qkv.weight": 0.84138287,
                "head.bias": 1.0,
            },
        ),
        (CLIP_B, 5e-4, {"patch_embed.proj.weight": 0.00130607, "stages.2.23.mlp.fc2.weight": 0.80717305}),
        (CLIP_L, 2e-4, {"patch_embed.proj.weight": 0.00042142, "stages.2.39.mlp.fc2.weight": 0.84138287}),
    ],
)
def test_learning_rates_by_layer(recipe, peak, scales):
    module = make_task(recipe)
    length = measure_run(module.config, images=1_281_167, passes_per_epoch=1, processes=8)
    assert peak_lr(module.config.optimizer, length.global_batch) == pytest.approx(peak)
    groups = module.parameter_groups()
    names = {id(parameter): name for name, parameter in module.model.named_parameters()}
    found = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert set(found) == set(names.values())
    for name, scale in scales.items():
        assert found[name] == pytest.approx(scale, rel=2e-5), name


@pytest.mark.parametrize("recipe", [PIXEL_B, PIXEL_L, CLIP_B, CLIP_L])
def test_what_is_not_decayed(recipe):
    """Norms, biases, position tables and layer scale (REFERENCE, section 3)."""
    module = make_task(recipe, init_values=0.1)
    names = {id(parameter): name for name, parameter in module.model.named_parameters()}
    for group in module.parameter_groups():
        for parameter in group["params"]:
            name = names[id(parameter)]
            spared = "norm" in name or name.endswith(("bias", "pos_embed", "bias_table", "gamma"))
            assert group["weight_decay"] == (0.0 if spared else 0.05), name


@pytest.mark.parametrize(
    ("recipe", "epochs", "warmup", "drop_path", "batch"),
    [
        (PIXEL_B, 100, 5, 0.15, 1024),
        (PIXEL_L, 50, 5, 0.2, 1024),
        (CLIP_B, 100, 20, 0.1, 1024),
        (CLIP_L, 50, 5, 0.25, 512),
    ],
)
def test_published_settings(recipe, epochs, warmup, drop_path, batch):
    """REFERENCE, section 3, and the schedule that follows: steps of 1024 or 512 of 1,281,167 images."""
    config = read_recipe(recipe)[1]
    data, optimizer = config.data, config.optimizer
    assert (config.trainer.max_epochs, optimizer.warmup_epochs, config.model.drop_path_rate) == (
        epochs,
        warmup,
        drop_path,
    )
    assert 8 * data.batch_size == batch
    assert (data.mixup, data.cutmix, data.label_smoothing, data.erase) == (0.8, 1.0, 0.1, 0.25)
    assert (data.auto_augment, optimizer.weight_decay) == ("rand-m9-mstd0.5-inc1", 0.05)
    steps = 1_281_167 // batch
    assert steps == {1024: 1251, 512: 2502}[batch]
    factor = learning_rate(optimizer, 1e-3, epochs * steps, steps)
    first = warmup * steps  # not cut short, 20 of 100 epochs neither
    assert factor(0) == pytest.approx(1e-4)
    assert factor(first // 2) == pytest.approx(1e-4 + 0.9999 * (first // 2) / first)
    assert factor(first) == 1.0
    half = first + (epochs * steps - first) // 2
    assert factor(half) == pytest.approx(0.5 * (1 + 1e-3), abs=1e-4)  # halfway down to 1e-6 of 1e-3
    assert factor(epochs * steps) == pytest.approx(1e-3)


def test_layer_decay_as_it_is():
    model = build_recipe(read_recipe("hivit-tiny-p16_8xb128-coslr-300e_in1k")[1])[0]
    assert decay_per_layer(model, 0.75, None) == 0.75
    assert decay_per_layer(model, 0.75, 13) == pytest.approx(0.75 ** (13 / 15))


def test_fast_itpn_keeps_its_global_batch():
    for px, passes in ((224, 1), (384, 2), (512, 4)):
        suffix = f"x{passes}" if passes > 1 else ""
        config = read_recipe(f"fast-itpn-base-3324-p16_8xb{128 // passes}{suffix}-coslr-100e_in1k-{px}px")[1]
        assert config.data.img_size == px
        assert 8 * config.data.batch_size * config.trainer.accumulate_grad_batches == 1024


def make_small_task(**data) -> ClassificationModule:
    config = read_recipe("classifier_small")[1]
    config.model.name, config.model.scratch, config.model.patch_size = "itpn_nano", True, 8
    config.data.img_size, config.data.mean, config.data.std = 32, (0.5,), (0.25,)
    for name, value in data.items():
        setattr(config.data, name, value)
    return ClassificationModule(build_recipe(config, 3)[0], config, "test", ("a", "b", "c")).eval()


def draw_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return {"image": images, "label": torch.tensor([0, 1, 2, 1])}


def test_loss_is_that_of_smoothed_labels():
    module, batch = make_small_task(erase=0.0, label_smoothing=0.2), draw_batch()
    logits = module.model(((batch["image"] / 255) - 0.5) / 0.25)
    targets = F.one_hot(batch["label"], 3) * 0.8 + 0.2 / 3
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(module.training_step(batch)["loss"], expected)


def test_loss_is_that_of_mixed_images():
    """timm's mixup after the step's own seed, whatever was drawn before."""
    module, batch = make_small_task(erase=0.0, mixup=0.8, cutmix=1.0), draw_batch()
    random.random(), np.random.rand(3), torch.rand(2)
    seed_pass(0, number=7, rank=0)
    loss = module.training_step(batch)["loss"]
    seed = derive_seed(0, "step", 7, 0)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    images, targets = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=3)(
        ((batch["image"] / 255) - 0.5) / 0.25, batch["label"]
    )
    expected = -(targets * module.model(images).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    assert not math.isclose(float(loss), float(F.cross_entropy(module.model(images), batch["label"])))
