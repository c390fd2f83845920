"""A step never waits for the device, and is one graph to torch.compile, which is built once."""

import pytest
import torch
from torch._dynamo.utils import counters

from itpn.config import ModelConfig, TeacherConfig
from itpn.data.normalize import Normalize
from itpn.pretraining.average import MovingAverageTeacher
from itpn.pretraining.build import build_masked_model
from itpn.pretraining.model import MaskedImageModel

OBJECTIVES = {
    "pixel": {},
    "feature": {
        "pixel_weight": 0.0,
        "feature_weight": 1.0,
        "auxiliary_weight": 1.0,
        "feature_units": "all",
        "hidden_units": "mask_token",
        "mask": "block",
        "mask_ratio": 0.4,
        "decoder_depth": 0,
        "rel_pos_bias": True,
        "init_values": 0.1,
    },
    "feature of hidden units": {
        "pixel_weight": 0.0,
        "feature_weight": 1.0,
        "hidden_units": "mask_token",
        "mask": "block",
        "decoder_depth": 0,
    },
    "feature, dropped": {"feature_weight": 1.0, "auxiliary_weight": 1.0, "rel_pos_bias": True},
    "mfm": {"pyramid_weights": (0.1, 0.2, 0.3), "mask": "block"},
}


def build(objective: str, **settings) -> MaskedImageModel:
    torch.manual_seed(0)
    small = {"patch_size": 8, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, "pyramid_head_width": 64}
    config = ModelConfig("itpn_nano", **{**small, **OBJECTIVES[objective], **settings})
    teacher = {"pixel": None, "mfm": "ema"}.get(objective, "outside")
    return build_masked_model(config, (32, 48), TeacherConfig(teacher, width=24 if teacher == "outside" else None))


def step(model: MaskedImageModel, average: MovingAverageTeacher | None, images: torch.Tensor, forward=None):
    """Forward and backward; the loss."""
    forward = model if forward is None else forward
    normalized = Normalize(3, (0.5,), (0.25,)).to(images.device)(images)
    target = average(normalized) if average else None
    if target is None and model.feature_losses:
        target = torch.linspace(-1, 1, 24 * 24, device=images.device).reshape(1, 24, 24).expand(len(images), -1, -1)
    loss = forward(normalized, target=target).loss
    loss.backward()
    return loss


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_step_needs_to_know_a_number_on_the_device(objective, checkpointing):
    """On the meta device there are none to know: `.item()`, `nonzero` or a boolean index would fail."""
    model = build(objective, drop_path_rate=0.1, grad_checkpointing=checkpointing).train()
    average = MovingAverageTeacher(model).to("meta") if objective == "mfm" else None
    model.to("meta")
    images = torch.zeros(4, 3, 32, 48, dtype=torch.uint8, device="meta")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)
    loss = step(model, average, images)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
    optimizer.step()
    if average is not None:
        average.update(model, 0.99)
    assert loss.is_meta
    with pytest.raises(RuntimeError):
        loss.item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_step_waits_for_the_gpu(objective):
    model = build(objective, drop_path_rate=0.1).train().cuda()
    average = MovingAverageTeacher(model) if objective == "mfm" else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    images = torch.zeros(4, 3, 32, 48, dtype=torch.uint8, device="cuda")
    for mode in (0, "error"):  # the first step may set things up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            step(model, average, images)
            optimizer.step()
            if average is not None:
                average.update(model, 0.99)
        finally:
            torch.cuda.set_sync_debug_mode(0)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("drop_path", "checkpointing"), [(0.0, False), (0.1, False), (0.0, True), (0.1, True), (0.1, "selective")]
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_graph_for_all_steps(objective, drop_path, checkpointing):
    torch.compiler.reset()
    counters.clear()
    # the quicker backend does not draw the same random numbers again when it recomputes
    backend = "aot_eager" if objective == "pixel" else "eager"
    results = []
    for compiled in (False, True):
        model = build(objective, drop_path_rate=drop_path, grad_checkpointing=checkpointing).train()
        average = MovingAverageTeacher(model) if objective == "mfm" else None
        forward = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
        losses = []
        for number in range(2):
            images = torch.randint(0, 256, (3, 3, 32, 48), generator=torch.Generator().manual_seed(number)).byte()
            torch.manual_seed(number)
            losses.append(step(model, average, images, forward).detach())
            model.forward_eval(Normalize(3, (0.5,), (0.25,))(images[:1]))  # a picture, in between and of another size
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.01 * parameter.grad
        results.append((losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    if backend == "aot_eager" or not checkpointing:
        torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not counters["recompiles"]
