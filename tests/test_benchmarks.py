"""Benchmarks: one arm that fails does not end the others."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def pretrain(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("pretrain", "plain", "arms"):
        sys.modules.pop(name, None)
    import pretrain

    monkeypatch.setattr(pretrain.BestProduct, "__init__", lambda *args: None)
    monkeypatch.setattr(pretrain.BestProduct, "flops_per_second", lambda self: 1e9)
    yield pretrain
    for name in ("pretrain", "plain", "arms"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("place", ["made", "first step", "later step"])
@pytest.mark.parametrize("failing", ["eager", "checkpointed", "plain"])
def test_an_arm_that_fails(pretrain, monkeypatch, tmp_path, capsys, failing, place):
    make, step = pretrain.Arm.__init__, pretrain.Arm.step
    steps = dict.fromkeys(("eager", "checkpointed", "plain"), 0)

    def fail_to_make(self, name, *args):
        if place == "made" and name == failing:
            raise RuntimeError("no compiler\nand a long story")
        make(self, name, *args)

    def fail_to_step(self, images):
        steps[self.name] += 1
        if self.name == failing and steps[self.name] == {"first step": 1, "later step": 3}.get(place):
            raise MemoryError("no compiler\nand a long story")
        step(self, images)

    monkeypatch.setattr(pretrain.Arm, "__init__", fail_to_make)
    monkeypatch.setattr(pretrain.Arm, "step", fail_to_step)
    options = ["--batch-size", "2", "--img-size", "32", "--warmup", "1", "--steps", "2", "--arms", *steps]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "itpn-pixel_nano", *options, "--json", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit) as ended:
        pretrain.main()
    assert ended.value.code == f"failed: {failing}"  # which Python prints, with exit code 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith(failing)] == [
        f"{failing} failed: {'RuntimeError' if place == 'made' else 'MemoryError'}: no compiler"
    ]
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == [arm for arm in steps if arm != failing]
    assert rows[0]["to the first"] == 1


def test_all_arms_fail(pretrain, monkeypatch):
    def fail(*args):
        raise RuntimeError("nothing works")

    monkeypatch.setattr(pretrain.Arm, "__init__", fail)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "itpn-pixel_nano", "--img-size", "32", "--arms", "eager", "plain"])
    with pytest.raises(SystemExit, match="failed: eager, plain"):
        pretrain.main()
