"""Settings in files of older versions, whose names have changed since: of checkpoints, runs and their config.yaml."""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from itpn.checkpoints.older_settings import NAMES, VALUES, update_settings
from itpn.cli import main
from itpn.tasks import spec
from itpn.tasks.recipe_files import read_settings
from itpn.tasks.spec import all_tasks, find_task
from itpn.training.config import from_dict, to_dict
from itpn.training.run_state import find_settings

FILES = json.loads((Path(__file__).parent / "data" / "older_files.json").read_text())
OLDER = {
    file["metadata"]["task"]: json.loads(file["metadata"].get("settings") or file["metadata"]["config"])
    for file in FILES.values()
    if {"settings", "config"} & file["metadata"].keys()
}


@pytest.mark.parametrize("task", OLDER)
def test_settings_of_older_files_keep_their_values(task):
    """Under today's names, none is lost, and none is unknown."""
    older = OLDER[task]
    config = from_dict(update_settings(older), find_task(task).config)
    now = to_dict(config)
    for section, values in older.items():
        for name, value in values.items() if isinstance(values, dict) else ():
            new = NAMES.get(section, {}).get(name, name)
            assert now[section][new] == (VALUES.get((new, value), value) if isinstance(value, str) else value)
    assert update_settings(now) == now


def test_all_tasks_are_there():
    assert OLDER.keys() == {task.name for task in all_tasks() if task.config.__module__.startswith("itpn.")}


def test_every_new_name_is_a_setting():
    known: dict[str, set[str]] = {}
    for task in all_tasks():
        for section in fields(task.config):
            if section.default_factory is not None and is_dataclass(section.default_factory):
                known.setdefault(section.name, set()).update(f.name for f in fields(section.default_factory))
    for section, names in NAMES.items():
        assert set(names.values()) <= known[section]
        assert not set(names) & known[section]


def test_runs_of_older_versions(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"recipe": "r", "task": "pretraining", **OLDER["pretraining"]}))
    recipe, config = read_settings(path)
    stored = find_settings({"itpn": {"recipe": "r", "task": "pretraining", "settings": OLDER["pretraining"]}})
    assert recipe == "r"
    assert stored is not None
    assert from_dict(stored.values, type(config)) == config
    assert config.data.max_corrupt == OLDER["pretraining"]["data"]["max_broken"]


def test_the_first_files_name_no_task(tmp_path, monkeypatch):
    """They are of pre-training, whichever task is registered first."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"recipe": "r", **OLDER["pretraining"]}))
    monkeypatch.setattr(spec, "_TASKS", dict(reversed(spec._TASKS.items())))
    assert all_tasks()[0].name != "pretraining"
    assert read_settings(path)[1].task == "pretraining"


@pytest.mark.parametrize("odd", [{"model": 3}, {"model": {"neck": ["fresh"]}}, {3: {}}, {"model": {3: 4}}])
def test_corrupt_settings_stay_as_they_are(odd):
    assert update_settings(odd) == odd


def test_older_options_and_recipes_are_told_the_new_name(tmp_path, capsys):
    renamed = {"--data.max-broken": "--data.max-corrupt", "--model.hidden_units": "--model.masked-patches"}
    for option, new in renamed.items():
        assert main(["train", "itpn-pixel_nano", option, "0"]) == 2
        assert f"unknown option {option}; did you mean {new}?" in capsys.readouterr().err
    recipe = tmp_path / "old.py"
    code = "from itpn.tasks.pretraining.recipes import pixel_pretraining as p\nconfig = p('itpn_nano', max_epochs=1)\n"
    for line, hint in {"data.max_broken": "max_corrupt", "model.mask_ration": "mask_ratio"}.items():
        recipe.write_text(f"{code}config.{line} = 0.5\n")
        assert main(["train", str(recipe)]) == 2
        assert f"there is no setting {line.partition('.')[2]}; did you mean {hint}?" in capsys.readouterr().err
