"""Targets per channel and with a floor, and pixels without data: values and gradients of plain loops."""

import pytest
import torch
from objectives import build_small
from torch import nn

from itpn.errors import UserError
from itpn.masked.masked_model import MaskedImageModel
from itpn.masked.masking import draw_random_mask
from itpn.masked.targets import feature_error, normalize_patches, patchify, unpatchify

LOSSES = {"pixel_weight": 1.0, "feature_weight": 0.5, "pyramid_weights": (0.1, 0.2, 0.3)}


def build(**settings) -> MaskedImageModel:
    features = any(name in settings for name in ("feature_weight", "pyramid_weights"))
    return build_small("vit_tiny_patch16_224" if features else None, **settings)


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def valid():
    """Of each channel its own: strips and single pixels without data, and whole patches of all and of one channel."""
    valid = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(2)) > 0.2
    valid[0, :, :8] = False  # the first row of patches
    valid[1, 1, 8:16, :24] = False
    valid[1, :, 16:24, 8:16] = False
    valid[1, 2, 20, 11] = True  # the one pixel of its patch
    valid[2, :, :, 40:] = False
    return valid


def normalize_by_loop(images, valid, per, floor):
    """Targets [B, C, H, W], valid pixels alone."""
    target = torch.zeros_like(images, dtype=torch.float64)
    for b in range(len(images)):
        for top in range(0, images.shape[2], 8):
            for left in range(0, images.shape[3], 8):
                for channels in [[0, 1, 2]] if per == "patch" else [[0], [1], [2]]:
                    where = torch.zeros_like(valid)
                    where[b, channels, top : top + 8, left : left + 8] = True
                    x = images[where & valid].double()
                    variance = x.var() if len(x) > 1 else 0.0
                    target[where & valid] = (x - x.mean()) / (variance + 1e-6 + floor**2) ** 0.5
    return target


@pytest.mark.parametrize("per", ["patch", "channel"])
@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_targets(images, per, floor):
    model = build(norm_pix_per=per, norm_pix_floor=floor).eval()
    target = unpatchify(model(images).target, (4, 6), 8)
    by_loop = normalize_by_loop(images, torch.ones_like(images, dtype=torch.bool), per, floor)
    torch.testing.assert_close(target.double(), by_loop, atol=1e-5, rtol=1e-5)


def test_a_floor_of_zero_is_the_published_target(images):
    pixels = patchify(images, 8)
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    assert torch.equal(build().eval()(images).target, (pixels - mean) / (variance + 1e-6).sqrt())
    by_hand = (pixels - mean) / (variance + 1e-6 + 0.5**2).sqrt()
    torch.testing.assert_close(normalize_patches(pixels, floor=0.5)[0], by_hand)


def test_noise_in_a_flat_patch_is_a_small_target():
    """Grey noise of a hundredth of the data's std; the channels differ by offsets, as after ImageNet's statistics."""
    noise = 0.01 * torch.randn(1, 1, 32, 48, generator=torch.Generator().manual_seed(3))
    pixels = patchify(noise + torch.tensor([-2.1, -2.0, -1.8])[:, None, None], 8)
    published = normalize_patches(pixels)[0].unflatten(-1, (64, 3))
    assert (published.mean(dim=2).abs() > 0.2).all()  # the offset of each channel, of which only the noise is free
    own = normalize_patches(pixels, channels=3)[0].unflatten(-1, (64, 3))
    assert own.mean(dim=2).abs().max() < 1e-4
    assert own.std() == pytest.approx(1, abs=0.02)
    assert normalize_patches(pixels, channels=3, floor=0.1)[0].std() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("per", ["patch", "channel"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("of_each_channel", [True, False])
def test_loss_on_valid_pixels(images, valid, per, train, of_each_channel):
    """Every valid masked pixel counts alike; what stands where there is no data changes nothing."""
    if not of_each_channel:
        valid = valid[:, :1]
    model, mask = build(norm_pix_per=per, norm_pix_floor=0.1), draw_random_mask(3, 24, 0.75)
    model.train(train)
    known = valid.expand_as(images)
    prediction = unpatchify(model.eval()(images, mask).prediction, (4, 6), 8)
    by_loop = normalize_by_loop(images, known, per, 0.1)
    where = known & model.mask_map(mask, (4, 6))
    expected = (prediction - by_loop)[where].square().mean()
    loss = model.train(train)(images, mask, valid=valid).loss
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    for name, ours, theirs in zip(
        names, torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, msg=name)
    torch.testing.assert_close(model(images, mask).loss, model(images, mask, valid=torch.ones_like(known)).loss)


def test_pixels_without_data_may_hold_anything(images, valid):
    """In the target; the network sees a number there, whatever is chosen."""
    model, mask = build(), draw_random_mask(3, 24, 0.75)
    hidden = model.mask_map(mask, (4, 6)) & ~valid  # of masked patches, which the network does not see
    strange = images.masked_fill(hidden, float("nan"))
    losses = [model(x, mask, valid=valid).loss for x in (images, strange)]
    assert torch.equal(*losses)
    gradients = [torch.autograd.grad(loss, model.decoder.heads["pixel"].weight)[0] for loss in losses]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("feature_patches", ["all", "masked"])
@pytest.mark.parametrize("masked_patches", ["dropped", "mask_token"])
@pytest.mark.parametrize("train", [True, False])
def test_losses_on_features_leave_out_patches_without_data(images, valid, feature_patches, masked_patches, train):
    model = build(masked_patches=masked_patches, feature_patches=feature_patches, **LOSSES)
    target, mask = torch.randn(3, 24, 24), draw_random_mask(3, 24, 0.75)
    output = model.train(train)(images, mask, target, valid)
    with torch.no_grad():
        _, split = model._make_mask(images, mask, (4, 6))
        decoded = model.eval()._decode(images, mask, split, (4, 6))
        predictions = {name: head.predict(name, tokens) for name, tokens, head in decoded}
    for name in ("feature", "pyramid_1", "pyramid_2", "pyramid_3"):
        errors = [
            feature_error(predictions[name][b, n], target[b, n], "smooth_l1")
            for b in range(3)
            for n in range(24)
            if (feature_patches == "all" or mask[b, n]) and patchify(valid, 8)[b, n].any()
        ]
        torch.testing.assert_close(output.losses[name], torch.stack(errors).mean())


@pytest.mark.parametrize("objective", [{}, LOSSES, {**LOSSES, "feature_patches": "all"}])
@pytest.mark.parametrize("nowhere", [True, False])
def test_a_batch_without_a_valid_masked_patch(images, objective, nowhere):
    """A loss of 0 and gradients of 0; with data in visible patches, losses on features of all patches have some."""
    model, mask = build(**objective), draw_random_mask(3, 24, 0.75)
    valid = torch.zeros(3, 1, 32, 48, dtype=torch.bool) if nowhere else ~model.mask_map(mask, (4, 6))
    output = model(images, mask, torch.randn(3, 24, 24) if objective else None, valid)
    output.loss.backward()
    assert output.losses["pixel"] == 0
    if nowhere or objective.get("feature_patches") != "all":
        assert output.loss == 0
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None and not p.grad.any() for p in trained)
    else:
        assert output.loss > 0


@pytest.mark.parametrize("per", ["patch", "channel"])
@pytest.mark.parametrize("floor", [0.0, 0.2])
@pytest.mark.parametrize("partly", [True, False])
def test_a_perfect_prediction_reconstructs_the_image(images, valid, per, floor, partly):
    valid = valid if partly else None
    model, mask = build(norm_pix_per=per, norm_pix_floor=floor), draw_random_mask(3, 24, 0.75)
    target = model.eval()(images, mask, valid=valid).target
    model.decoder.forward = lambda levels, grid, split, masked_only: target.gather(
        1, split.order.unsqueeze(-1).expand(-1, -1, 192)
    )
    model.decoder.norm, model.decoder.heads["pixel"] = nn.Identity(), nn.Identity()
    torch.testing.assert_close(model.reconstruct(images, mask, valid)[1], images, atol=1e-5, rtol=1e-5)


def test_a_reconstruction_is_of_valid_pixels(images, valid):
    model, mask = build(norm_pix_per="channel"), draw_random_mask(3, 24, 0.75)
    _, filled, masked = model.reconstruct(images, mask, valid)
    assert torch.equal(filled[~valid], images[~valid])
    assert (filled != images)[masked & valid].float().mean() > 0.99


@pytest.mark.parametrize(
    "valid", [torch.ones(3, 1, 32, 48), torch.ones(3, 2, 32, 48).bool(), torch.ones(3, 1, 32, 40).bool()]
)
def test_maps_of_another_shape_are_refused(images, valid):
    with pytest.raises(ValueError, match=r"valid must be bool \[3, 1 or 3, 32, 48\], not torch"):
        build()(images, valid=valid)


def test_a_floor_needs_normalized_pixels():
    with pytest.raises(UserError, match=r"--model\.norm-pix-floor has no effect with"):
        build(norm_pix_loss=False, norm_pix_floor=0.1)


def test_one_graph_for_all_maps(images):
    """Without a value that the host waits for."""
    model, graphs = build(norm_pix_per="channel", norm_pix_floor=0.1), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True)
    for seed in range(2):
        torch.manual_seed(seed)
        valid = torch.rand(3, 1, 32, 48) > 0.3
        output = compiled(images, valid=valid)
        torch.testing.assert_close(output.loss, model(images, output.mask, valid=valid).loss)
    assert len(graphs) == 1
