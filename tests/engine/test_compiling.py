"""A run with torch.compile: compiled once, said, and left out of the speed."""

import json
from functools import partial

import pytest
import torch
from rich.console import Console
from torch import nn
from torch._dynamo.utils import counters

from itpn.config import TrainerConfig
from itpn.engine import launch
from itpn.engine.launch import Devices, compile_networks, read_launch
from itpn.engine.run import train
from itpn.errors import UserError


@pytest.fixture
def quick_compiler(monkeypatch):
    """Graphs are captured as ever, but run as they are: generating code takes too long here."""
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def test_a_whole_run_compiles_once(settings, quick_compiler, capsys):
    config = settings(compile=True)
    config.trainer.picture_every_n_steps = 2
    config.teacher.name = "ema"
    config.model.pyramid_weights = (1.0, 1.0, 1.0)
    run = train(config, "small")
    # a trial of the compiler, then the network and its average, once for all steps, epochs and pictures
    assert counters["stats"]["unique_graphs"] == 3
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
@pytest.mark.parametrize("asked", [None, False, True])
def test_when(monkeypatch, network, cuda, by_default, asked):
    monkeypatch.setattr(launch, "choose_devices", lambda *_: Devices(1, 1, 1, cuda))
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: x)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
    done = compile_networks([network], TrainerConfig(compile=asked), read_launch(), by_default, Console(quiet=True))
    assert done == bool(network.compiled) == (asked or (asked is None and cuda and by_default))


def test_no_compiler(monkeypatch, network, capsys):
    def fail(function):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand a long story")

    monkeypatch.setattr(torch, "compile", fail)
    console = Console(width=300)
    with pytest.raises(UserError, match=r"^--trainer.compile: torch.compile does not work here: InvalidCxx.* found$"):
        compile_networks([network], TrainerConfig(compile=True), read_launch(), True, console)
    monkeypatch.setattr(launch, "choose_devices", lambda *_: Devices(1, 1, 1, True))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
    assert not compile_networks([network], TrainerConfig(), read_launch(), True, console)
    assert "steps will be slower: InvalidCxxCompiler: No working C++ compiler found" in capsys.readouterr().out
    assert not network.compiled
