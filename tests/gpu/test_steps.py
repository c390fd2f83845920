"""The network alone: no step waits for the GPU, a step is one graph, and compiled gradients are the eager ones."""

import contextlib

import pytest
import torch
from objectives import OBJECTIVES, build, step
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from itpn.data.image_type import Pixels
from itpn.data.normalize import Normalize
from itpn.teachers.ema import EMATeacher


@contextlib.contextmanager
def refusing_to_wait(device: torch.device):
    """Raise wherever the host would wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def make_images(device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 3, 32, 48, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_step_waits_for_the_gpu(device, objective, checkpointing):
    model = build(objective, drop_path_rate=0.1, grad_checkpointing=checkpointing).train().to(device)
    teacher = EMATeacher(model) if objective == "mfm" else None
    normalize = Normalize(Pixels(mean=(0.5,), std=(0.25,))).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    images = torch.zeros(4, 3, 32, 48, dtype=torch.uint8, device=device)
    for number in range(3):
        # the first step sets things up: state of the optimizer, libraries
        with refusing_to_wait(device) if number else contextlib.nullcontext():
            with torch.autocast(device.type, torch.bfloat16):
                loss = step(model, teacher, normalize(images))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
            optimizer.step()
            optimizer.zero_grad()
            if teacher is not None:
                teacher.update(model, 0.99)
    assert loss.isfinite()
    if device.type == "cuda":  # the mode does find a step that waits
        with refusing_to_wait(device), pytest.raises(RuntimeError, match="synchronizing"):
            loss.item()


@pytest.mark.gpu  # on a CPU: tests/masked/test_step.py
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_graph(objective):
    """Captured whole, once for all steps."""
    device = torch.device("cuda")
    torch.compiler.reset()
    counters.clear()
    model = build(objective, drop_path_rate=0.1).train().to(device)
    teacher = EMATeacher(model) if objective == "mfm" else None
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    for number in range(3):
        with torch.autocast(device.type, torch.bfloat16):
            assert step(model, teacher, make_images(device, number), forward).isfinite()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not counters["recompiles"]


def find_gradient(objective: str, device: torch.device, dtype: torch.dtype, compiled: bool) -> tuple[float, dict]:
    """Loss and gradients, float64 on the CPU, of one step with the same weights, images and mask."""
    model = build(objective).train().to(device)
    teacher = EMATeacher(model) if objective == "mfm" else None
    # the compiler of a CPU is another one, and needs a C++ compiler
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    forward = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
    images = make_images(device)
    torch.manual_seed(1)
    # compiled code draws the random numbers of eager code, so that masks are the same
    enabled = dtype is not torch.float32
    with inductor.patch(fallback_random=True), torch.autocast(device.type, dtype, enabled=enabled):
        loss = step(model, teacher, images, forward)
    return float(loss.detach()), {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}


def difference(one: dict, other: dict) -> float:
    """Norm of the difference of whole gradients, as a fraction of the gradient's norm."""
    assert one.keys() == other.keys()
    whole, difference = (torch.cat([x.flatten() for x in xs]) for xs in ([*other.values()], subtract(one, other)))
    return float(difference.norm() / whole.norm())


def subtract(one: dict, other: dict) -> list[torch.Tensor]:
    return [one[name] - other[name] for name in other]


ON_GPU = [pytest.param(torch.device("cuda"), objective, marks=pytest.mark.gpu) for objective in OBJECTIVES]


@pytest.mark.compile
@pytest.mark.parametrize(("device", "objective"), [(torch.device("cpu"), "pixel"), ON_GPU[0], ON_GPU[1], ON_GPU[-1]])
def test_compiled_gradients_are_the_eager_ones(device, objective):
    """In float32 and bf16.

    Fused kernels round at other places and sum in another order. A float32 has 24 bits: a rounding changes a number by
    6e-8 at most, the some hundred roundings between an activation and the loss, of which sums are taken, change the
    gradient by far less than 1e-4. A bfloat16 has 8 bits: a rounding changes it by 0.4 % at most and 0.1 % on average,
    some hundred independent ones by about 1 %, and each of two gradients has that error: 3 % is above the error and
    well below what a term that is missing or counted twice changes.
    """
    torch.compiler.reset()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32, which has 11 bits
    try:
        loss, exact = find_gradient(objective, device, torch.float32, compiled=False)
        for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 0.03)):
            own_loss, eager = find_gradient(objective, device, dtype, compiled=False)
            compiled_loss, compiled = find_gradient(objective, device, dtype, compiled=True)
            assert own_loss == pytest.approx(loss, rel=most)
            assert compiled_loss == pytest.approx(own_loss, rel=most)
            assert difference(compiled, eager) < most
            assert difference(compiled, exact) < most
            assert difference(eager, exact) < most
        assert difference({name: 1.1 * gradient for name, gradient in exact.items()}, exact) > 0.03
    finally:
        torch.set_float32_matmul_precision(before)
