"""The plain HiViT returns the same feature maps as mmpretrain's, at its own image size and at another."""

import pytest
from public import our_names, read_golden

from itpn.models.hivit import HiViT

DEPTHS = (2, 2, 7)


def build(case: str, **options) -> tuple[HiViT, dict]:
    golden, config = read_golden(case)
    model = HiViT(
        img_size=64,
        num_classes=0,
        embed_dim=64,
        depths=DEPTHS,
        num_heads=4,
        rel_pos_bias=config["model"]["rpe"],
        norm_eps=1e-5,
        **options,
    )
    state = our_names(golden["param"])
    model.load_state_dict({name.removeprefix("backbone."): tensor for name, tensor in state.items()}, strict=True)
    return model.eval(), golden


@pytest.mark.parametrize("case", ["mm_hivit_features", "mm_hivit_features_nonsquare"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_feature_maps(case, checkpointing):
    model, golden = build(case, pos_resample="legacy")
    model.set_grad_checkpointing(checkpointing)
    maps = model.forward_intermediates(golden["input"]["image"], intermediates_only=True)
    for i, ours in enumerate(maps):
        theirs = golden["output"][f"stage_{i}"]
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max().item() < 2e-5


def test_exact_resampling_differs_at_another_size():
    model, golden = build("mm_hivit_features_nonsquare")
    stage_3 = model.forward_intermediates(golden["input"]["image"], indices=[2], intermediates_only=True)[0]
    assert (stage_3 - golden["output"]["stage_2"]).abs().max().item() > 1e-2
