"""Every combination of losses and masks: the value of each loss, and that no prediction depends on masked pixels."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from objectives import build_small

from itpn.masked.decoder import Decoder
from itpn.masked.masked_model import PYRAMID_LOSSES, MaskedImageModel, Objective
from itpn.masked.masking import draw_random_mask
from itpn.teachers.ema import EMATeacher, momentum_at

ALL = {"pixel_weight": 1.0, "feature_weight": 0.5, "auxiliary_weight": 0.25, "pyramid_weights": (0.1, 0.2, 0.3)}
WEIGHTS = {"pixel": 1.0, "feature": 0.5, "auxiliary": 0.25, "pyramid_1": 0.1, "pyramid_2": 0.2, "pyramid_3": 0.3}


build = partial(build_small, teacher="ema")


def features(model, images) -> dict[str, torch.Tensor]:
    return EMATeacher(model)(images)


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("masked_patches", ["dropped", "mask_token"])
@pytest.mark.parametrize("mask", ["random", "block"])
@pytest.mark.parametrize("feature_patches", ["all", "masked"])
def test_any_combination(images, masked_patches, mask, feature_patches):
    """All six losses at once, their weighted sum, and a gradient for everything that is trained."""
    model = build(masked_patches=masked_patches, mask=mask, mask_ratio=0.5, feature_patches=feature_patches, **ALL)
    output = model.train()(images, target=features(model, images))
    assert list(output.losses) == list(WEIGHTS)
    by_hand = sum(WEIGHTS[name] * loss for name, loss in output.losses.items())
    torch.testing.assert_close(output.loss, by_hand)
    output.loss.backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []


@pytest.mark.parametrize("masked_patches", ["dropped", "mask_token"])
@pytest.mark.parametrize("feature_patches", ["all", "masked"])
@pytest.mark.parametrize("loss", ["smooth_l1", "cosine", "cross_entropy"])
def test_losses_by_hand(images, masked_patches, feature_patches, loss):
    model = build(masked_patches=masked_patches, feature_patches=feature_patches, feature_loss=loss, **ALL)
    mask, target = draw_random_mask(3, 24, 0.75), features(model, images)
    outputs = [model.train(mode)(images, mask, target) for mode in (True, False)]
    for name in WEIGHTS:  # training predicts fewer patches, with the same losses
        torch.testing.assert_close(outputs[0].losses[name], outputs[1].losses[name])
    split = None
    if masked_patches == "dropped":
        _, split = model._make_mask(images, mask, (4, 6))
    model.eval()
    for name, tokens, head in model._decode(images, mask, split, (4, 6)):
        prediction = head.predict(name, tokens)
        if name == "pixel":
            continue
        picked = torch.ones_like(mask) if feature_patches == "all" else mask
        p, t = prediction[picked], target[name][picked]
        by_hand = {
            "smooth_l1": lambda p, t: F.smooth_l1_loss(p, t),
            "cosine": lambda p, t: -F.cosine_similarity(p, t, dim=-1).mean(),
            "cross_entropy": lambda p, t: -(t * p.log_softmax(-1)).sum(-1).mean(),
        }[loss](p, t)
        torch.testing.assert_close(outputs[1].losses[name], by_hand)


@pytest.mark.parametrize("masked_patches", ["dropped", "mask_token"])
def test_no_prediction_depends_on_masked_pixels(images, masked_patches):
    """Of any head; with mask tokens, stages 1 and 2 of masked patches are computed but kept out of the pyramid."""
    model = build(masked_patches=masked_patches, **ALL).eval()
    mask = draw_random_mask(3, 24, 0.75)
    changed = images.clone()
    row, col = divmod(int(mask[0].nonzero()[0]), 6)
    changed[0, :, row * 8 : row * 8 + 8, col * 8 : col * 8 + 8] += 1
    split = model._make_mask(images, mask, (4, 6))[1]
    for (name, ours, _), (_, theirs, _) in zip(
        model._decode(images, mask, split, (4, 6)), model._decode(changed, mask, split, (4, 6)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0, msg=name)


def test_mask_tokens_replace_masked_patches(images):
    """Stage 3 gets the mask token and the position of a masked patch, whatever the image."""
    model = build(masked_patches="mask_token", **ALL).eval()
    mask = torch.ones(3, 24, dtype=torch.bool)
    mask[:, 0] = False
    others = images.clone()
    others[:, :, :, 8:] = torch.randn(3, 3, 32, 40)
    others[:, :, 8:] = torch.randn(3, 3, 24, 48)
    stages = [model.backbone.forward_stages(x, mask=mask, mask_token=model.mask_token) for x in (images, others)]
    torch.testing.assert_close(stages[0][2], stages[1][2])
    assert (stages[0][0] - stages[1][0]).abs().max() > 0.1  # stages 1 and 2 get all patches


def test_masks_with_different_counts_in_each_image(images):
    """With mask tokens, counts may differ; every masked patch has the same weight."""
    model = build(masked_patches="mask_token", **ALL)
    mask = torch.zeros(3, 24, dtype=torch.bool)
    mask[0, :3], mask[1, 5:17], mask[2, 9] = True, True, True
    output = model.train()(images, mask, features(model, images))
    by_hand = (output.prediction - output.target)[mask].square().mean()
    torch.testing.assert_close(output.losses["pixel"], by_hand)
    with pytest.raises(ValueError, match="same number"):
        build(**ALL)(images, mask)


def test_one_teacher_for_all_heads(images):
    model = build(teacher="some", **{**ALL, "pixel_weight": 0.0})
    target = torch.randn(3, 24, 24)
    output = model.eval()(images, target=target)
    assert set(output.losses) == set(WEIGHTS) - {"pixel"}
    assert output.prediction.shape == (3, 24, 24)
    assert torch.equal(output.target, target)
    with pytest.raises(ValueError, match=r"target of 'feature' is \[3, 24, 23\], not \[3, 24, 24\]"):
        model(images, target=target[:, :, 1:])
    with pytest.raises(ValueError, match="targets for"):
        model(images, target={"pixel": target})


def test_without_a_target_there_is_no_loss(images):
    model = build(teacher="some", pixel_weight=0.0, feature_weight=1.0)
    output = model(images)
    assert output.loss is None
    assert output.losses == {}
    assert output.target is None
    assert output.prediction.shape == (3, 18, 24)
    assert model.eval()(images).prediction.shape == (3, 24, 24)


def test_dropping_saves_the_encoder_three_quarters(images):
    """Feature supervision at a quarter of the encoder's cost: only visible patches enter it."""
    model = build(**ALL)
    lengths = []
    model.backbone.stages[2][0].register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    model(images)
    assert lengths == [6]


def test_losses_and_heads_must_fit():
    model = build(teacher=None)
    with pytest.raises(ValueError, match="do not fit heads"):
        MaskedImageModel(model.backbone, model.pyramid, None, Objective())
    decoder = Decoder((4, 6), {"feature": 24}, pyramid_width=32, width=32, depth=0, num_heads=2)
    with pytest.raises(ValueError, match="do not fit heads"):
        MaskedImageModel(model.backbone, model.pyramid, decoder, Objective())


def test_the_ema_teacher_follows_its_student(images):
    model = build(**ALL)
    teacher = EMATeacher(model).train()
    before = {name: p.clone() for name, p in teacher.ema.module.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    teacher.update(model, 0.75)
    for name, parameter in teacher.ema.module.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] + 0.25)
        assert not parameter.requires_grad
    assert not any(module.training for module in teacher.modules())


def test_targets_of_the_ema_teacher(images):
    """For a level its tokens, each normalized, those of a patch in a row; for the decoder of all levels, stage 3."""
    model = build(**ALL).eval()
    targets = EMATeacher(model)(images)
    levels = model.pyramid(model.backbone.forward_stages(images))
    for name, level in zip(PYRAMID_LOSSES, levels, strict=True):
        by_hand = (level - level.mean(-1, keepdim=True)) / (level.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(targets[name], by_hand.flatten(2))
    tokens = model.backbone.forward_features(images)
    torch.testing.assert_close(targets["feature"], F.layer_norm(tokens, (128,)))
    raw = EMATeacher(model, normalize=False)(images)
    torch.testing.assert_close(raw["pyramid_3"], levels[2].flatten(2))
    assert all(not target.requires_grad for target in targets.values())


def test_momentum():
    """Half a cosine, and less in the first steps: after 7 of them 1 - 8^(-2/3) = 3/4."""
    assert momentum_at(50_000, 100_000, 0.9, 1.0) == pytest.approx(0.95)
    assert momentum_at(100_000, 100_000, 0.9, 0.98) == momentum_at(150_000, 100_000, 0.9, 0.98) == pytest.approx(0.98)
    assert momentum_at(0, 100, 0.9, 1.0) == 0.0
    assert momentum_at(7, 10**9, 0.996, 1.0) == pytest.approx(0.75)
    assert momentum_at(10_000, 10**9, 0.99, 1.0) == pytest.approx(0.99, abs=1e-6)


@pytest.mark.parametrize("laterals", [False, True])
@pytest.mark.parametrize("auxiliary", [0.0, 0.25])
def test_training_computes_the_pyramid_of_masked_patches_only(images, laterals, auxiliary):
    """Where no head has blocks; here the number of masked patches differs between images."""
    weights = {"pixel_weight": 0.0, "feature_weight": 0.5, "auxiliary_weight": auxiliary}
    model = build(decoder_depth=0, masked_patches="mask_token", mask="block", masked_laterals=laterals, **weights)
    mask = torch.zeros(3, 24, dtype=torch.bool)
    mask[0, 3:9] = mask[1, [0, 20]] = mask[2, 10:14] = True
    counts, outputs, gradients = [], [], []
    model.pyramid.register_forward_pre_hook(lambda module, args: counts.append(args[0][0].shape[1]))
    for mode in (True, False):
        outputs.append(model.train(mode)(images, mask, features(model, images)))
        model.zero_grad()
        outputs[-1].loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert counts == [6, 24]
    torch.testing.assert_close(outputs[0].losses, outputs[1].losses)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-5)
    masked = outputs[1].prediction[0, 3:9]
    torch.testing.assert_close(outputs[0].prediction[0], masked)
    torch.testing.assert_close(outputs[0].prediction[1, 4:], outputs[1].prediction[1, [0, 20]])
