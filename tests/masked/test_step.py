"""A step never waits for the device, and is one graph to torch.compile, which is built once."""

import pytest
import torch
from objectives import OBJECTIVES, build, step
from torch._dynamo.utils import counters

from itpn.data.image_type import Pixels
from itpn.data.normalize import Normalize
from itpn.teachers.ema import EMATeacher

NORMALIZE = Normalize(Pixels(mean=(0.5,), std=(0.25,)))


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_step_waits_for_a_value_on_the_device(objective, checkpointing):
    """On the meta device there are no values: `.item()`, `nonzero` or a boolean index would fail."""
    model = build(objective, drop_path_rate=0.1, grad_checkpointing=checkpointing).train()
    teacher = EMATeacher(model).to("meta") if objective == "mfm" else None
    model.to("meta")
    images = torch.zeros(4, 3, 32, 48, dtype=torch.uint8, device="meta")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)
    loss = step(model, teacher, Normalize(Pixels(mean=(0.5,), std=(0.25,))).to("meta")(images))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
    optimizer.step()
    if teacher is not None:
        teacher.update(model, 0.99)
    assert loss.is_meta
    with pytest.raises(RuntimeError):
        loss.item()


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
        teacher = EMATeacher(model) if objective == "mfm" else None
        forward = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
        losses = []
        for number in range(2):
            images = torch.randint(0, 256, (3, 3, 32, 48), generator=torch.Generator().manual_seed(number)).byte()
            torch.manual_seed(number)
            losses.append(step(model, teacher, NORMALIZE(images), forward).detach())
            model.forward_eval(NORMALIZE(images[:1]))  # a visualization in between, of another size
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
