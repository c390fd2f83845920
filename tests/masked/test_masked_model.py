"""The masked model beyond the golden cases: masks, outputs, reconstructions, other sizes."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import itpn
from itpn.errors import UserError
from itpn.masked.masking import draw_random_mask, split_mask
from itpn.masked.targets import normalize_patches, patchify, unpatchify
from itpn.tasks.configs import PretrainingModelConfig
from itpn.tasks.pretraining.network import build_masked_model


def small(img_size=(32, 48), **settings):
    torch.manual_seed(0)
    config = PretrainingModelConfig(
        "itpn_nano", patch_size=8, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2, **settings
    )
    return build_masked_model(config, img_size)


@pytest.mark.parametrize(("patches", "ratio"), [(196, 0.75), (64, 0.75), (24, 0.6), (15, 0.5)])
def test_random_masks(patches, ratio):
    mask = draw_random_mask(2000, patches, ratio, generator=torch.Generator().manual_seed(1))
    masked = patches - int(patches * (1 - ratio))
    assert (mask.sum(dim=1) == masked).all()
    # every patch is masked equally often: within five standard deviations of a binomial
    fraction = masked / patches
    assert ((mask.float().mean(dim=0) - fraction).abs() < 5 * (fraction * (1 - fraction) / 2000) ** 0.5).all()
    assert torch.equal(mask, draw_random_mask(2000, patches, ratio, generator=torch.Generator().manual_seed(1)))


def test_split_mask():
    mask = torch.tensor([[True, False, True, False, True], [False, True, True, True, False]])
    visible, masked, _ = split_mask(mask, 2)
    assert visible.tolist() == [[1, 3], [0, 4]]
    assert masked.tolist() == [[0, 2, 4], [1, 2, 3]]


def test_patchify_and_back():
    images = torch.randn(2, 3, 16, 24)
    pixels = patchify(images, 8)
    assert torch.equal(pixels[1, 4].reshape(8, 8, 3), images[1, :, 8:16, 8:16].permute(1, 2, 0))
    assert torch.equal(unpatchify(pixels, (2, 3), 8), images)
    picked = torch.tensor([[5, 0], [1, 2]])
    assert torch.equal(patchify(images, 8, picked), pixels[torch.arange(2)[:, None], picked])
    normal, mean, std = normalize_patches(pixels)
    torch.testing.assert_close(normal.var(dim=-1), torch.ones(2, 6), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal * std + mean, pixels)


def test_training_and_evaluation_agree():
    model, images = small(), torch.randn(3, 3, 32, 48)
    mask = draw_random_mask(3, 24, 0.75)
    train, evaluate = model.train()(images, mask), model.eval()(images, mask)
    torch.testing.assert_close(train.loss, evaluate.loss)
    assert train.prediction.shape == (3, 18, 192)
    torch.testing.assert_close(train.prediction.flatten(0, 1), evaluate.prediction[mask])
    torch.testing.assert_close(train.target.flatten(0, 1), evaluate.target[mask])
    assert torch.equal(train.losses["pixel"], train.loss)


def test_loss_is_of_masked_patches_only():
    model, images = small().eval(), torch.randn(2, 3, 32, 48)
    mask = draw_random_mask(2, 24, 0.75)
    output = model(images, mask)
    by_hand = (output.prediction - output.target)[mask].square().mean()
    torch.testing.assert_close(output.loss, by_hand)


def test_a_given_target_takes_the_place_of_pixels():
    model, images = small(), torch.randn(2, 3, 32, 48)
    mask = draw_random_mask(2, 24, 0.75)
    target = torch.randn(2, 24, 192)
    by_hand = (model.eval()(images, mask).prediction - target)[mask].square().mean()
    torch.testing.assert_close(model.train()(images, mask, target).loss, by_hand)


def test_prediction_layer_gets_masked_patches_only_in_training():
    model, images = small(), torch.randn(2, 3, 32, 48)
    rows = []
    model.decoder.heads["pixel"].register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    model.train()(images)
    model.eval()(images)
    assert rows == [18, 24]


def test_no_prediction_depends_on_a_masked_pixel():
    model, images = small().eval(), torch.randn(1, 3, 32, 48)
    mask = draw_random_mask(1, 24, 0.75)
    changed = images.clone()
    row, col = divmod(int(mask[0].nonzero()[0]), 6)
    changed[:, :, row * 8 : row * 8 + 8, col * 8 : col * 8 + 8] += 1
    torch.testing.assert_close(model(images, mask).prediction, model(changed, mask).prediction, atol=0, rtol=0)


def test_masks_come_from_the_global_seed():
    model, images = small(), torch.randn(2, 3, 32, 48)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(model(images).mask)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert masks[0].sum(dim=1).tolist() == [18, 18]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 24, dtype=torch.bool), "mask some"),
        (torch.ones(2, 24, dtype=torch.bool), "mask some"),
        (torch.arange(48).reshape(2, 24) < 30, "same number"),
        (torch.zeros(2, 25, dtype=torch.bool), r"bool \[2, 24\]"),
        (torch.zeros(2, 24), r"bool \[2, 24\]"),
    ],
)
def test_impossible_masks_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        small()(torch.randn(2, 3, 32, 48), mask)


def test_reconstruction_keeps_visible_patches():
    model, images = small(), torch.randn(2, 3, 32, 48)
    mask = draw_random_mask(2, 24, 0.75)
    grey, filled, masked = model.reconstruct(images, mask)
    assert model.training
    masked = masked.expand_as(images)
    assert torch.equal(filled[~masked], images[~masked])
    assert torch.equal(grey[~masked], images[~masked])
    assert (grey[masked] == 0).all()
    # a perfect prediction reconstructs the image
    model.decoder.forward = lambda levels, grid, split, masked_only: normalize_patches(patchify(images, 8))[0].gather(
        1, split.order.unsqueeze(-1).expand(-1, -1, 192)
    )
    model.decoder.norm, model.decoder.heads["pixel"] = nn.Identity(), nn.Identity()
    torch.testing.assert_close(model.reconstruct(images, mask)[1], images, atol=1e-5, rtol=1e-5)


def test_other_image_sizes():
    model = small().eval()
    output = model(torch.randn(1, 3, 64, 40))
    assert output.prediction.shape == (1, 40, 192)
    shapes = [tuple(level.shape) for level in model.extract_pyramid(torch.randn(1, 3, 64, 40))]
    assert shapes == [(1, 32, 32, 20), (1, 32, 16, 10), (1, 32, 8, 5)]
    assert [tuple(f.shape) for f in model.extract_feat(torch.randn(1, 3, 64, 40))] == [(1, 128, 8, 5)]


def test_gradient_checkpointing_changes_nothing():
    images, mask = torch.randn(2, 3, 32, 48), draw_random_mask(2, 24, 0.75)
    gradients = []
    for checkpointing in (False, True, "selective"):
        model = small(grad_checkpointing=checkpointing, drop_path_rate=0.5)
        torch.manual_seed(1)  # of stochastic depth
        model(images, mask).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for others in gradients[1:]:
        torch.testing.assert_close(others, gradients[0])


def test_gradient_checkpointing_keeps_less():
    model, images = small().eval(), torch.randn(8, 3, 32, 48)
    mask = draw_random_mask(8, 24, 0.75)
    kept = {}
    for how in (False, "selective", True):
        model.set_grad_checkpointing(how)
        kept[how] = kept_bytes(lambda: model(images, mask).loss)
    assert kept[True] < 0.4 * kept["selective"]
    assert kept["selective"] < 0.8 * kept[False]


def kept_bytes(forward) -> int:
    """Memory that a forward pass keeps for the backward pass."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = forward()
    assert loss.requires_grad  # keeps it alive until here
    return sum(event.self_cpu_memory_usage for event in profiler.events())


def test_every_trained_parameter_gets_a_gradient():
    model = small(init_values=0.1)
    model(torch.randn(2, 3, 32, 48)).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []


@pytest.mark.parametrize(
    ("recipe", "millions"),
    [
        ("itpn-pixel_hivit-base-p16_8xb512-amp-coslr-800e_in1k", 102.68),
        ("itpn-pixel_hivit-large-p16_8xb512-amp-coslr-800e_in1k", 314.25),
        ("itpn-clip-b_hivit-base-p16_8xb256-amp-coslr-800e_in1k", 83.70),
    ],
)
def test_published_sizes(recipe, millions):
    with torch.device("meta"):
        model = itpn.get_model(recipe)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_initialization():
    model = small()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:  # Xavier uniform: bounded, with the std of that bound
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert parameter.abs().max() <= bound, name
            assert float(parameter.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.15), name
        elif name.endswith("bias"):
            assert not parameter.any(), name


def test_get_model():
    model = itpn.get_model("itpn-pixel_nano", img_size=32, in_chans=1, mask_ratio=0.5)
    assert model(torch.randn(1, 1, 32, 32)).mask.sum() == 8
    with pytest.raises(UserError, match="no recipe 'itpn-pixel_nono'; did you mean itpn-pixel_nano"):
        itpn.get_model("itpn-pixel_nono")
    with pytest.raises(UserError, match="no weights are published"):
        itpn.get_model("itpn-pixel_nano", pretrained=True)
    with pytest.raises(UserError, match="no model setting 'depth'"):
        itpn.get_model("itpn-pixel_nano", depth=3)
    with pytest.raises(UserError, match="does not exist"):
        itpn.get_model("itpn-pixel_nano", pretrained="nowhere.safetensors")


def test_a_model_that_is_not_there():
    """The nearest name is given, whichever task builds the network."""
    model = "no model 'itpn_bas'; did you mean itpn_base"
    with pytest.raises(UserError, match=model):
        itpn.get_model("itpn-pixel_nano", name="itpn_bas")
    with pytest.raises(UserError, match=model):
        itpn.get_model("classifier_small", name="itpn_bas", scratch=True)


def test_get_model_of_clip_supervision():
    """Needs no download and no teacher: predictions without a target, and a loss with one."""
    model = itpn.get_model("itpn-clip-b_hivit-base-p16_8xb256-amp-coslr-800e_in1k", pretrained=False).eval()
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        output = model(images)
        assert output.prediction.shape == (1, 196, 512)
        assert output.loss is None
        loss = model(images, output.mask, output.prediction).loss
    assert float(loss) == pytest.approx(-1.0, abs=1e-5)  # the cosine with itself
    assert [tuple(f.shape) for f in model.extract_feat(images)] == [(1, 512, 14, 14)]
