"""What the processes of a run agree on before they train."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torchrun
import yaml

from itpn.cli import main
from itpn.data import statistics_file
from itpn.errors import UserError
from itpn.tasks.configs import PretrainingConfig
from itpn.training import agreement
from itpn.training.agreement import RESOLVED, change, check_agreement, find_changes, resolve_together


@pytest.fixture
def command(tmp_path):
    """A run of two processes on images of two channels of 16 bits."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(6):
        np.save(tmp_path / f"images/{number}.npy", rng.integers(0, 1000 * (number + 1), (40, 44, 2)).astype(np.uint16))
    words = f"train itpn-pixel_nano --data.root {tmp_path}/images --output-dir {tmp_path}/runs --data.batch-size 2"
    words += " --data.img-size 32 --model.decoder-embed-dim 32 --model.decoder-depth 1 --data.num-workers 0"
    return [*words.split(), "--trainer.max-steps", "2", "--trainer.accelerator", "cpu"]


def read_other_images(arguments):
    """The images, which the second process would find to be others if it read them."""
    if os.environ["RANK"] == "1":
        statistics_file.compute_statistics = None
    return main(arguments)


def refuse(arguments):
    """With another learning rate in the second process, which ends by code 2."""
    rank = int(os.environ["RANK"])
    return main([*arguments, "--optimizer.base-lr", f"0.00{1 + rank}"]) - 2


def refuse_images(arguments):
    return main(arguments) - 2


def test_one_of_two_processes_reads_statistics(command, tmp_path):
    torchrun.run(read_other_images, command, folder=tmp_path, processes=2)
    assert main([*command, "--name", "alone"]) == 0
    runs = tmp_path / "runs/itpn-pixel_nano"
    two, one = (yaml.safe_load((runs / name / "config.yaml").read_text()) for name in ("default", "alone"))
    assert len(two["data"]["mean"]) == 2
    assert {**two, "name": ""} == {**one, "name": ""}
    assert json.loads((runs / "default/summary.json").read_text())["processes"] == 2


def read_errors(folder):
    return "".join((folder / f"stderr-{rank}").read_text() for rank in (0, 1)).splitlines()


def test_processes_with_different_settings_are_refused(command, tmp_path):
    torchrun.run(refuse, command, folder=tmp_path, processes=2)
    (line,) = read_errors(tmp_path)
    assert "different settings: --optimizer.base-lr is 0.001 in the first and 0.002 in that of rank 1" in line
    assert not (tmp_path / "runs").exists()


def test_what_the_first_process_finds_wrong_ends_both(command, tmp_path):
    np.save(tmp_path / "images/5.npy", np.zeros((40, 44, 3), np.uint16))
    torchrun.run(refuse_images, command, folder=tmp_path, processes=2)
    (line,) = read_errors(tmp_path)
    assert "0.npy has 2 channels of uint16" in line
    assert "5.npy has 3 channels of uint16" in line


def resolve(config):
    data = replace(config.data, mean=(0.1, 1 / 3), value_range=("0", "5"), root=("there",))
    return replace(config, data=data, seed=3), ["found"]


def test_settings_are_handed_to_processes_that_lightning_starts(monkeypatch):
    """And what they have of their own stays."""
    monkeypatch.setattr(agreement, "choose_devices", lambda *_: type("Devices", (), {"several": True}))
    monkeypatch.setenv(RESOLVED, "of an earlier run")
    config = PretrainingConfig()
    found, notes = resolve_together(config, resolve)
    assert (found, notes) == resolve(config)
    launch = agreement.read_launch()
    monkeypatch.setattr(launch.environment, "local_rank", lambda: 1)
    monkeypatch.setattr(agreement, "read_launch", lambda: launch)
    other = replace(config, data=replace(config.data, num_workers=3))
    found, _ = resolve_together(other, lambda _: pytest.fail("it was resolved again"))
    assert found == replace(resolve(config)[0], data=replace(resolve(config)[0].data, num_workers=3))
    monkeypatch.setattr(agreement, "MAX_CHARACTERS", 3)
    monkeypatch.setattr(launch.environment, "local_rank", lambda: 0)
    resolve_together(config, resolve)
    assert RESOLVED not in os.environ


def test_changes_are_what_differs():
    before = PretrainingConfig()
    after, _ = resolve(before)
    changes = find_changes(before, after)
    assert changes == {"data": {"mean": (0.1, 1 / 3), "value_range": ("0", "5"), "root": ("there",)}, "seed": 3}
    assert change(before, json.loads(json.dumps(changes))) == after


@pytest.mark.parametrize(
    ("section", "key", "value", "refused"),
    [
        ("data", "mean", (0.1,) * 100, True),
        ("trainer", "max_epochs", 7, True),
        ("model", "name", "itpn_tiny", True),
        ("teacher", "name", "ema", True),
        ("data", "root", ("elsewhere",), False),
        ("model", "checkpoint", "elsewhere", False),
        ("trainer", "devices", 3, False),
    ],
)
def test_settings_that_may_not_differ(monkeypatch, section, key, value, refused):
    config = PretrainingConfig()
    other = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    monkeypatch.setattr(agreement, "gather", lambda own: [own, own, agreement.to_dict(other)])
    option = f"--{section}.{key.replace('_', '-')} is "
    try:
        check_agreement(config)
        said = ""
    except UserError as error:
        said = str(error)
    assert (option in said, "of rank 2" in said) == (refused, refused)
    assert len(said) < 300
