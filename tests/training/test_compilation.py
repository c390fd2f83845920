"""A run with torch.compile: compiled once, said, and left out of the speed."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func

from itpn.errors import MachineError
from itpn.masked.masked_model import MaskedImageModel
from itpn.tasks.configs import TrainerConfig
from itpn.tasks.pretraining.module import PretrainingModule
from itpn.tasks.run import train
from itpn.training import compilation as compiling
from itpn.training.compilation import compile_networks

pytestmark = pytest.mark.compile


@pytest.fixture
def quick_compiler(monkeypatch):
    """Graphs are captured as ever, but run as they are: generating code takes too long here."""
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def test_a_whole_run_compiles_once(settings, quick_compiler, capsys):
    config = settings(compile=True)
    config.trainer.visualize_every_n_steps = 2
    config.teacher.name = "ema"
    config.model.pyramid_weights = (1.0, 1.0, 1.0)
    run = train(config, "small")
    # the network and its EMA, once for all steps, epochs and visualizations
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert "compiled in" in capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    rows = (run / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + summary["steps"]
    column = rows[0].split(",").index("images_per_second")
    first, *others = (float(row.split(",")[column]) for row in rows[1:])
    assert first == 0.0  # not the speed of a compiler
    assert 0 < min(others) <= summary["images_per_second"] <= max(others)


@pytest.fixture
def network(monkeypatch):
    compiled = []
    network = nn.Linear(2, 2)
    monkeypatch.setattr(network, "compile", lambda: compiled.append(True))
    network.compiled = compiled
    return network


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("by_default", [False, True])
@pytest.mark.parametrize("wanted", [None, False, True])
def test_when(network, cuda, by_default, wanted):
    fabric = SimpleNamespace(device=torch.device("cuda" if cuda else "cpu"), is_global_zero=True)
    done = compile_networks([network], TrainerConfig(compile=wanted), fabric, by_default, Console(quiet=True))
    assert done.active == bool(network.compiled) == (wanted or (wanted is None and cuda and by_default))


class CompilerError(Exception):
    """As torch.compile wraps what its backends raise."""

    inner_exception = RuntimeError("\nNo working C++ compiler found\nand a long story")


def fail_in_forward(graph, inputs):
    raise CompilerError("backend='inductor' raised: ...")


def fail_in_backward(graph, inputs):
    return aot_autograd(fw_compiler=box, bw_compiler=fail_in_forward)(graph, inputs)


def box(graph, inputs):
    return make_boxed_func(graph.forward)


def run_out_of_memory(graph, inputs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def fail_when_run(graph, inputs):
    def run(*args):
        raise OSError("libcuda.so cannot found!")

    return run


FAILURES = {
    fail_in_forward: "No working C++ compiler found",
    fail_in_backward: "No working C++ compiler found",
    run_out_of_memory: "CUDA out of memory. Tried to allocate 2 GiB",
    fail_when_run: "libcuda.so cannot found!",
}


@pytest.fixture
def compiled_by_default(monkeypatch):
    """As on a GPU, by a backend of choice."""
    torch.compiler.reset()
    monkeypatch.setattr(compiling, "pays", lambda device: True)
    compile_network = torch.compile
    return lambda backend: monkeypatch.setattr(torch, "compile", partial(compile_network, backend=backend))


@pytest.mark.parametrize(("accumulate", "teacher"), [(1, None), (2, "ema")])
def test_a_failing_compiler_does_not_end_a_run(settings, compiled_by_default, capsys, accumulate, teacher):
    """The first step is repeated, and the run is that of networks which were never compiled, bit for bit."""
    runs = {}
    failures = dict(list(FAILURES.items())[:2]) if teacher else FAILURES
    for backend in (None, *failures):
        config = settings(compile=None if backend else False, accumulate_grad_batches=accumulate, max_steps=2)
        config.name, config.teacher.name = getattr(backend, "__name__", "eager"), teacher
        if teacher:
            config.model.pyramid_weights = (1.0, 1.0, 1.0)
        if backend is not None:
            compiled_by_default(backend)
        runs[backend] = train(config, "small")
        said = capsys.readouterr().out
        assert said.count("torch.compile failed: ") == (backend is not None)
        assert FAILURES.get(backend, "") in said
        assert "compiled in" not in said
    for backend in failures:
        one, two = (load_file(runs[key] / "model.safetensors") for key in (None, backend))
        assert all(torch.equal(weights, two[name]) for name, weights in one.items())
        one, two = (torch.load(runs[key] / "checkpoints/last.ckpt", weights_only=True) for key in (None, backend))
        assert one["loops"] == two["loops"]
        assert one["itpn_loader"] == two["itpn_loader"]


def test_a_required_compiler_that_fails_ends_a_run(settings, compiled_by_default):
    compiled_by_default(fail_in_forward)
    with pytest.raises(MachineError, match=r"^--trainer.compile: torch.compile failed: RuntimeError: No working C"):
        train(settings(compile=True), "small")


def test_a_fault_of_the_network_is_no_failure_of_the_compiler(settings, compiled_by_default, monkeypatch):
    """What fails without the compiler as well ends the run as it ever did."""
    compiled_by_default("eager")
    monkeypatch.setattr(MaskedImageModel, "_error", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(settings(), "small")


def test_later_steps_are_only_repeated_for_errors_of_the_compiler(settings, compiled_by_default, monkeypatch, capsys):
    compiled_by_default("eager")
    errors = iter([torch._dynamo.exc.Unsupported("a new graph"), ValueError("a fault")])
    training_step = PretrainingModule.training_step

    calls = 0

    def step(self, batch):
        nonlocal calls
        calls += 1
        if calls > 2 and (error := next(errors, None)):  # in the third step, and when it is repeated
            raise error
        return training_step(self, batch)

    monkeypatch.setattr(PretrainingModule, "training_step", step)
    with pytest.raises(ValueError, match="a fault"):
        train(settings(max_steps=4), "small")
    assert "torch.compile failed: Unsupported: a new graph; steps are not compiled" in capsys.readouterr().out
