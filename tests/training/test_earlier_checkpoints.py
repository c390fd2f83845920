"""Checkpoints that Lightning's Trainer wrote are resumed to the very bits.

In ``data`` are two, of runs that were stopped by the last version that trained with it, without their tensors and
settings. They get those of a run that is stopped at the same step now, which are under the same names.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from resuming import assert_same_run, losses
from torch import nn

from itpn.tasks.configs import (
    ClassificationConfig,
    ClassificationDataConfig,
    ClassificationModelConfig,
    FineTuningConfig,
    RunConfig,
)
from itpn.tasks.run import train
from itpn.training.checkpointing import count_passes, find_evaluation, name_parameters

DATA = Path(__file__).with_name("data")


@pytest.fixture
def pretraining(settings):
    """Two steps an epoch, of four and of two passes, with an EMA teacher."""
    config = settings(accumulate_grad_batches=4)
    config.teacher.name, config.model.pyramid_weights, config.optimizer.clip_grad = "ema", (0.1, 0.2, 0.3), 0.5
    return config


@pytest.fixture
def classification(settings, photos, tmp_path):
    """Five steps an epoch, with an EMA of the weights, evaluated after each epoch."""
    for number, path in enumerate(sorted(photos.iterdir())):
        folder = tmp_path / "classes" / ("train" if number < 20 else "val") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    return ClassificationConfig(
        model=ClassificationModelConfig(
            name="itpn_nano", scratch=True, patch_size=8, ema_decay=0.9, drop_path_rate=0.1
        ),
        data=ClassificationDataConfig(root=(str(tmp_path / "classes"),), img_size=32, batch_size=4, num_workers=0),
        optimizer=FineTuningConfig(lr=1e-3, clip_grad=1.0),
        trainer=settings().trainer,
        output_dir=str(tmp_path / "runs"),
    )


def put_earlier_checkpoint(config: RunConfig, kind: str) -> dict:
    """Let the last checkpoint of a stopped run be of the form that Lightning's Trainer wrote; returns it."""
    last = Path(config.output_dir) / "test" / config.name / "checkpoints/last.ckpt"
    ours = torch.load(last, weights_only=True)
    earlier = torch.load(DATA / f"lightning-{kind}.pt", weights_only=True)
    for key in ("global_step", "epoch", "itpn_processes", "itpn_loader"):
        assert earlier[key] == ours[key], key
    assert count_passes(earlier["loops"]) == ours["loops"]["passes"]
    assert earlier["callbacks"]["Monitor"]["images_seen"] == ours["callbacks"]["Monitor"]["images_seen"]
    for key in ("base_lrs", "last_epoch", "_last_lr"):
        assert earlier["lr_schedulers"][0][key] == ours["lr_schedulers"][0][key], key
    groups = zip(
        earlier["optimizer_states"][0]["param_groups"], ours["optimizer_states"][0]["param_groups"], strict=True
    )
    assert all(one[key] == two[key] for one, two in groups for key in ("params", "lr", "initial_lr", "weight_decay"))
    earlier |= {"itpn": ours["itpn"], "state_dict": ours["state_dict"]}
    earlier["optimizer_states"][0]["state"] = ours["optimizer_states"][0]["state"]
    for path in last.parent.iterdir():
        path.unlink()
    torch.save(earlier, last)
    return earlier


@pytest.mark.parametrize(("kind", "step"), [("pretraining", 3), ("classification", 7)])
def test_a_run_that_lightning_began_is_resumed(request, train_until, kind, step):
    config = request.getfixturevalue(kind)
    straight = train(replace(config, name="straight"), "test")
    config = replace(config, name="stopped")
    train_until(config, step)
    earlier = put_earlier_checkpoint(config, kind)
    resumed = train(config, "test")
    assert_same_run(straight, resumed)
    assert losses(straight) == losses(resumed)
    for key in ("epoch", "loops", "itpn_loader", "lr_schedulers"):
        one, two = (torch.load(run / "checkpoints/last.ckpt", weights_only=True)[key] for run in (straight, resumed))
        assert one == two
    assert earlier["loops"]["fit_loop"]  # it was of that form


def test_an_earlier_evaluation_is_found():
    """Under the name of the task's class, with "figures"."""
    records = torch.load(DATA / "lightning-classification.pt", weights_only=True)["callbacks"]
    found = find_evaluation(records)
    assert found["step"] == 5
    assert found["metrics"].keys() >= {"val_top1", "ema_val_loss"}
    assert found["score"] == max(found["metrics"]["val_top1"], found["metrics"]["ema_val_top1"])
    assert find_evaluation({"Monitor": {}, "Checkpointing": {}}) is None


def test_numbered_parameters_of_a_sharded_network_get_their_names():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False))
    numbered = {"state": {2: "c", 0: "a"}, "param_groups": [{"lr": 1.0, "params": [2]}, {"lr": 2.0, "params": [0]}]}
    named = name_parameters(module, numbered)
    assert named["state"] == {"1.weight": "c", "0.weight": "a"}
    assert [group["params"] for group in named["param_groups"]] == [["1.weight"], ["0.weight"]]
    assert name_parameters(module, named) == named
