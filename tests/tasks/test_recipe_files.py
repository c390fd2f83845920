"""Recipe files and files of settings with mistakes in them: one clear line, from every command that reads them."""

import os
import signal

import pytest

import itpn
from itpn.cli import main
from itpn.errors import UserError
from itpn.tasks.recipe_files import read_recipe

START = "from itpn.tasks.configs import *\nconfig = PretrainingConfig()\nconfig.model.name = 'itpn_nano'\n"


def mistake(capsys, *arguments: str) -> str:
    """The single line that a command answers, with exit code 2."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("itpn: ")
    return err


@pytest.mark.parametrize("command", [["train"], ["train", "--help"], ["info"], ["get_model"]], ids=" ".join)
@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("config.model = None", "the section model must be of class PretrainingModelConfig, not NoneType"),
        ("config.data = {'root': 'x'}", "the section data must be of class PretrainingDataConfig, not dict"),
        ("config.trainer = 3", "the section trainer must be of class TrainerConfig, not int"),
        ("config.model = ClassificationConfig().model", "must be of class PretrainingModelConfig, not Classification"),
        ("config = RunConfig(config.model, config.data, config.optimizer)", "must set `config` to one of Pretraining"),
        ("config = PretrainingConfig", "must set `config` to one of PretrainingConfig"),
        ("config.data.img_size = '32'", "data.img_size must be a whole number or two whole numbers, not '32'"),
        ("config.optimizer.betas = (0.9,)", "optimizer.betas must be two numbers, not (0.9,)"),
        ("config.seed = True", "seed must be a whole number, not True"),
        ("config.trainer.max_steps = True", "trainer.max_steps must be a whole number or None, not True"),
        ("config.model.mask_ratio = False", "model.mask_ratio must be a number, not False"),
        ("config.data.crop_scale = (0.9, 0.1)", "--data.crop-scale needs two fractions of the area"),
        ("config.model.patch_size = 6", "--model.patch-size must be divisible by 4, not 6"),
        ("config.model.name = 'itpn_nan'", "no model 'itpn_nan'; did you mean itpn_nano?"),
        ("config = ClassificationConfig(); config.data.batch_size = 3", "--data.batch-size must be even"),
    ],
)
def test_settings_of_a_recipe_file(tmp_path, capsys, command, line, answer):
    path = tmp_path / "mine.py"
    path.write_text(START + line)
    if command == ["get_model"]:
        with pytest.raises(UserError) as error:
            itpn.get_model(str(path))
        assert answer in str(error.value)
    else:
        assert answer in mistake(capsys, command[0], str(path), *command[1:])


def test_lists_are_tuples(tmp_path):
    """As in YAML."""
    path = tmp_path / "mine.py"
    path.write_text(
        START + "config.optimizer.betas = [0.9, 0.95]\nconfig.data = PretrainingDataConfig(root=['a', 'b'])"
    )
    config = read_recipe(str(path))[1]
    assert (config.optimizer.betas, config.data.root) == ((0.9, 0.95), ("a", "b"))


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        *((f"recipe: {name}", "its recipe must be a plain name") for name in ("5", "null", "[1]", "''", "true", "..")),
        *((f"recipe: {name}", "its recipe must be a plain name") for name in ("../../escaped", "/tmp/x", "'a\\b'")),
        ("recipe: x\ntask: [1]", "its task must be a name, not [1]"),
        ("recipe: x\ntask: null", "its task must be a name, not None"),
        ("", "it is empty"),
        ("[1]", "it holds a list"),
        ("seed: 1", "it names no recipe"),
        ("recipe: x\nseed: 1\nseed: 2", "seed is there twice"),
        ("recipe: x\ndata: {hflip: 0.1, hflip: 0.2}", "hflip is there twice"),
        ("recipe: x\nseed: true", "seed must be a whole number, not True"),
        ("recipe: x\ntrainer: {max_steps: true}", "trainer.max_steps must be a whole number or None, not True"),
        ("recipe: x\ndata: {mean: [true, 0.5, 0.5]}", "data.mean must be numbers or None, not (True, 0.5, 0.5)"),
        ("recipe: x\ndata: null", "the section data must hold settings, not None"),
        ("recipe: x\nmodel: [1]", "the section model must hold settings, not [1]"),
        ("recipe: x\noptimizer: {lr: fast}", "optimizer.lr must be a number or None, not 'fast'"),
        ("recipe: x\noptimizer: {lr: .nan}", "--optimizer.lr must be finite, not nan"),
        ("recipe: x\n1: 2", "unknown setting 1"),
    ],
)
def test_a_config_yaml_with_a_mistake(tmp_path, capsys, content, answer):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    for command in ("train", "info"):
        line = mistake(capsys, command, str(path))
        assert answer in line
        assert str(path) in line
        assert "Error" not in line or "twice" in answer


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("import sys; sys.exit('bye')", "SystemExit: bye"),
        ("sys = __import__('sys'); sys.exit()", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("class Mine(BaseException): pass\nraise Mine('two\\nlines')", "Mine: two lines"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("x = = 1", "SyntaxError"),
    ],
)
def test_a_recipe_file_ends_no_interpreter(tmp_path, capsys, line, answer):
    path = tmp_path / "mine.py"
    path.write_text(line)
    for command in (["train"], ["info"], ["train", "--help"], ["info", "itpn_nano", "--recipe"]):
        words = [*command, str(path)] if "--recipe" in command else [command[0], str(path), *command[1:]]
        assert f"recipe file {path} does not run: {answer}" in mistake(capsys, *words)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_recipe_file(tmp_path, signum):
    path = tmp_path / "mine.py"
    path.write_text(f"import os, time\nos.kill(os.getpid(), {int(signum)})\ntime.sleep(60)")
    assert main(["train", str(path)]) == 128 + signum


def test_ctrl_c_outside_of_commands(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        read_recipe(str(path))


@pytest.mark.parametrize(
    "words",
    [
        *("inspect LONG", "train LONG", "train LONG.py", "train LONG.yaml", "info LONG", "predict LONG data"),
        *("train itpn-pixel_nano --recipe LONG", "train itpn-pixel_nano --model.checkpoint LONG"),
        *("info itpn-pixel_nano --checkpoint LONG", "convert LONG a.safetensors", "export LONG --out a.onnx"),
        *(
            "evaluate classifier_small --checkpoint LONG",
            "train itpn-pixel_nano --data.root LONG",
            "shrink LONG --out x",
        ),
    ],
)
def test_a_name_that_no_file_can_have(capsys, words):
    mistake(capsys, *words.replace("LONG", "x" * 300).split())


@pytest.mark.parametrize("call", [itpn.load, itpn.inspect, itpn.get_model])
def test_a_name_that_no_file_can_have_in_python(call):
    with pytest.raises(UserError):
        call("x" * 300)


def test_what_is_no_recipe_file(tmp_path, capsys):
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "loop.py").symlink_to("loop.py")
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, answer in {"folder.py": "is a folder", "pipe.yaml": "is a pipe", "loop.py": "Too many levels"}.items():
        for command in ("train", "info"):
            line = mistake(capsys, command, str(tmp_path / name))
            assert answer in line
            assert "does not exist" not in line


def test_a_task_that_its_file_does_not_register(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom itpn.tasks.configs import *\n\n"
        "@dataclass\nclass Mine(PretrainingConfig):\n    task = 'mine'\n\nconfig = Mine()\n"
    )
    for words in (["train", str(path)], ["info", str(path)], ["train", str(path), "--help"]):
        line = mistake(capsys, *words)
        assert "sets a config of the task 'mine', which it does not register: call itpn.register_task" in line
        assert "--recipe" not in line
