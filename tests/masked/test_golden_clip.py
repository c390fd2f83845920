"""CLIP supervision computes what both public code bases compute, gradients included."""

import pytest
import torch
from public import our_names, read_golden

from itpn.masked.decoder import AuxiliaryHead, Decoder
from itpn.masked.masked_model import MaskedImageModel, Objective
from itpn.models.hivit import HiViT
from itpn.models.pyramid import FeaturePyramid

PUBLISHED = {"masked_patches": "mask_token", "masked_laterals": True}


def build_mmpretrain(feature_loss="cosine", **objective) -> tuple[MaskedImageModel, dict, dict]:
    golden, _ = read_golden("mm_clip")
    depths = (2, 2, 2)  # in our count
    backbone = HiViT(
        img_size=64,
        num_classes=0,
        embed_dim=64,
        depths=depths,
        num_heads=4,
        pos_embed="fixed",
        rel_pos_bias=True,
        init_values=0.1,
    )
    decoder = Decoder(
        (4, 4), {"feature": 24}, pyramid_width=32, width=64, depth=0, add_mask_tokens=False, embed_norm_eps=1e-5
    )
    options = {"weights": {"feature": 1.0}, "feature_loss": feature_loss, "feature_patches": "masked", **PUBLISHED}
    model = MaskedImageModel(
        backbone, FeaturePyramid((16, 32, 64), width=32, depth=2), decoder, Objective(**{**options, **objective})
    )
    model.load_state_dict(our_names(golden["param"]), strict=True)
    return model, golden, our_names(golden["grad"])


def build_official(**objective) -> tuple[MaskedImageModel, dict, dict]:
    golden, _ = read_golden("off_clip_pretrain")
    depths = (1, 1, 5)
    backbone = HiViT(
        img_size=64, num_classes=0, embed_dim=48, depths=depths, num_heads=3, rel_pos_bias=True, init_values=0.1
    )
    decoder = Decoder((4, 4), {"feature": 24}, pyramid_width=32, width=48, depth=0, add_mask_tokens=False)
    auxiliary = AuxiliaryHead(backbone, 24, init_values=0.1, block_norm_eps=1e-5)
    options = {"weights": {"feature": 1.0, "auxiliary": 1.0}, "feature_patches": "all", **PUBLISHED}
    model = MaskedImageModel(
        backbone,
        FeaturePyramid((12, 24, 48), width=32, depth=1),
        decoder,
        Objective(**{**options, **objective}),
        auxiliary,
    )
    model.load_state_dict(our_names(golden["param"]), strict=True)
    return model, golden, our_names(golden["grad"])


def assert_close(ours: torch.Tensor, golden: torch.Tensor) -> None:
    assert ours.shape == golden.shape
    assert (ours - golden).abs().max().item() < 2e-5


def assert_same_gradients(model: MaskedImageModel, expected: dict[str, torch.Tensor]) -> None:
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(expected)
    for name, parameter in model.named_parameters():
        if name in expected:
            error = (parameter.grad - expected[name]).norm() / expected[name].norm()
            assert error.item() < 1e-5, name


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("loss", ["cosine", "cross_entropy"])
def test_mmpretrain(loss, train):
    model, golden, _ = build_mmpretrain(loss)
    mask = golden["input"]["mask"].flatten(1)
    output = model.train(train)(golden["input"]["image"], mask, golden["input"]["target"])
    expected = golden["output"]["logits"]
    if train:  # masked patches come last; the image with fewer of them begins with visible ones
        order = mask.int().argsort(dim=1, stable=True)[:, -int(mask.sum(dim=1).max()) :]
        expected = expected[torch.arange(len(mask))[:, None], order]
        assert output.prediction.shape[1] < mask.shape[1]
    assert_close(output.prediction, expected)
    assert_close(output.loss, golden["output"][{"cosine": "loss_cosine", "cross_entropy": "loss_ce"}[loss]])
    assert torch.equal(output.losses["feature"], output.loss)


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_every_gradient_of_mmpretrain(checkpointing):
    model, golden, gradients = build_mmpretrain()
    model.set_grad_checkpointing(checkpointing)
    mask = golden["input"]["mask"].flatten(1)
    model.train()(golden["input"]["image"], mask, golden["input"]["target"]).loss.backward()
    assert_same_gradients(model, gradients)


def test_stages_of_mmpretrain():
    model, golden, _ = build_mmpretrain()
    mask = golden["input"]["mask"].flatten(1)
    stages = model.backbone.forward_stages(golden["input"]["image"], mask=mask, mask_token=model.mask_token)
    for ours, name in zip([stages[0], stages[1], stages[2].flatten(1, 3)], ["feat_0", "feat_1", "feat_2"], strict=True):
        assert_close(ours, golden["output"][name])
    (tokens,) = [tokens for _, tokens, _ in model.eval()._decode(golden["input"]["image"], mask, None, (4, 4))]
    assert_close(model.decoder.norm(tokens), golden["output"]["features"])


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_both_heads_and_every_gradient_of_the_official_code(checkpointing):
    model, golden, gradients = build_official()
    model.set_grad_checkpointing(checkpointing)
    image, mask, target = (golden["input"][name] for name in ("image", "bool_masked_pos", "target"))
    output = model.train()(image, mask, target)
    assert_close(output.prediction, golden["output"]["main"])
    assert_close(output.losses["feature"], golden["output"]["loss_main"])
    assert_close(output.losses["auxiliary"], golden["output"]["loss_aux"])
    assert_close(output.loss, golden["output"]["loss"])
    output.loss.backward()
    assert_same_gradients(model, gradients)
    predictions = {
        name: head.predict(name, tokens) for name, tokens, head in model.eval()._decode(image, mask, None, (4, 4))
    }
    assert_close(predictions["auxiliary"], golden["output"]["aux"])


def test_stages_of_masked_patches_are_kept_out_by_default():
    """The published code lets stages 1 and 2 of masked patches, which see their pixels, into the pyramid."""
    model, golden, _ = build_official(masked_laterals=False)
    image, mask, target = (golden["input"][name] for name in ("image", "bool_masked_pos", "target"))
    ours = model.eval()(image, mask, target).prediction
    assert (ours - golden["output"]["main"]).abs().max().item() > 1e-2
    changed = image.clone()
    row, col = divmod(int(mask[0].nonzero()[0]), 4)
    changed[0, :, row * 16 : row * 16 + 16, col * 16 : col * 16 + 16] += 1
    torch.testing.assert_close(model(changed, mask, target).prediction, ours, atol=0, rtol=0)
