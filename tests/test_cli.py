"""The command line as a person meets it: quick, and one clear line for a mistake."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import itpn
from itpn.cli import main
from itpn.data.shapes import ShapesFolders
from itpn.errors import NonFiniteLoss, RunStopped, UserError
from itpn.system.signals import stopped_by_signals
from itpn.tasks.pretraining.module import save_weights
from itpn.tasks.recipe_files import read_recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def mistake(capsys, *arguments: str) -> str:
    """The single line that a command answers, with exit code 2."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("itpn: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["trian"], "no command 'trian'; did you mean train?"),
        (["train"], "required: RECIPE; usage: itpn train RECIPE [options]"),
        (["train", "itpn-pixel_nan"], "no recipe 'itpn-pixel_nan'; did you mean itpn-pixel_nano?"),
        (["train", "nowhere.py"], "recipe file nowhere.py does not exist"),
        (["train", "itpn-pixel_nano", "--data.root", "nowhere"], "nowhere does not exist"),
        (["train", "itpn-pixel_nano", "--trainer.max-epoch", "3"], "did you mean --trainer.max-epochs?"),
        (["train", "itpn-pixel_nano", "--trainer.max_epoch=3"], "did you mean --trainer.max-epochs?"),
        (["train", "itpn-pixel_nano", "--batch-size", "3"], "did you mean --data.batch-size?"),
        (["train", "itpn-pixel_nano", "--data.batchsize", "3"], "did you mean --data.batch-size?"),
        (
            ["train", "itpn-pixel_nano", "--trainer.max-epochs", "many"],
            "--trainer.max-epochs must be a whole number, not 'many'",
        ),
        (["train", "itpn-pixel_nano", "--trainer.precision", "8"], "invalid choice '8'"),
        (["train", "itpn-pixel_nano", "--seed"], "Missing value for argument '--seed'"),
        (["train", "itpn-pixel_nano", "stray"], "unexpected 'stray'"),
        (["train", "itpn-pixel_nano", "--model.name", "itpn_bas"], "no model 'itpn_bas'; did you mean itpn_base?"),
        (["train", "itpn-pixel_nano", "--data.img-size", "60"], "60x60 is not a multiple of --model.patch-size 8"),
        (["train", "itpn-pixel_nano", "--model.patch-size", "6"], "must be divisible by 4"),
        (["train", "itpn-pixel_nano", "--model.mask-ratio", "1"], "--model.mask-ratio 1.0 leaves no visible"),
        (["train", "itpn-pixel_nano", "--model.mask-ratio", "0"], "leaves no visible or no masked"),
        (["train", "itpn-pixel_nano", "--data.batch-size", "0"], "--data.batch-size must be at least 1"),
        (["train", "itpn-pixel_nano", "--data.dtype", "photo"], "unknown option --data.dtype"),  # it is a result
        (
            ["train", "itpn-pixel_nano", "--data.mean", "1", "2", "--model.in-chans", "3"],
            "--data.mean needs one number",
        ),
        (["train", "itpn-pixel_nano", "--name", "a/b"], "plain folder name"),
        (["train", "itpn-pixel_nano", "--model.checkpoint", "x.ckpt"], "x.ckpt does not exist"),
        (["info", "itpn_nan"], "did you mean itpn_nano?"),
        (["list", "resnet*"], "no recipe or model matches 'resnet*'"),
        (["train", "itpn-pixel_nano", "--data.img-size"], "--data.img-size needs a value"),
        (["predict", "x.safetensors", "nowhere"], "nowhere does not exist"),
        (["shrink", "nowhere", "--out", "x"], "nowhere does not exist"),
        (["shrink", "."], "required: --out DIR; usage: itpn shrink DIR [DIR ...] --out DIR [options]"),
        (["shrink", "tests", "--out", "tests/small"], "--out tests/small and tests overlap"),
        (["shrink", "tests/data", "--out", "tests"], "--out tests and tests/data overlap"),
        (["shrink", "x", "--out", "y", "--short-side", "0"], "--short-side must be at least 1, not 0"),
        (["shrink", "x", "--out", "y", "--quality", "101"], "--quality must lie between 1 and 100, not 101"),
        (["shrink", "x", "--out", "y", "--num-workers", "-1"], "--num-workers must be at least 0, not -1"),
        (["shrink", "x", "--out", "y", "--max-pixels", "0"], "--max-pixels must be at least 1, not 0"),
        (["list", "--what"], "unknown option --what"),
        (["--what"], "no option '--what' (see itpn --help)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(capsys, arguments, answer):
    assert answer in mistake(capsys, *arguments)


def test_folders_without_images(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    assert "no images in" in mistake(capsys, "train", "itpn-pixel_nano", "--data.root", str(tmp_path))


def test_a_recipe_file_with_a_mistake(capsys, tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_text("import nothing_of_that_name")
    assert "does not run: ModuleNotFoundError" in mistake(capsys, "train", str(recipe))
    recipe.write_text("settings = 1")
    assert "must set `config`" in mistake(capsys, "train", str(recipe))


def test_a_checkpoint_of_another_model(capsys, tmp_path, photos):
    arguments = ["--data.root", str(photos), "--data.num-workers", "0", "--output-dir", str(tmp_path)]
    small = ["--model.decoder-embed-dim", "32", "--model.decoder-depth", "1", "--trainer.max-steps", "1"]
    assert main(["train", "itpn-pixel_nano", *arguments, *small]) == 0
    weights = tmp_path / "itpn-pixel_nano/default/model.safetensors"
    capsys.readouterr()
    answer = mistake(capsys, "train", "itpn-pixel_tiny", *arguments, "--model.checkpoint", str(weights))
    assert "holds another model: it has 4 attention heads, the model 6" in answer
    assert answer.strip().endswith(
        "; it takes --model.name itpn_nano --model.decoder-embed-dim 32 --model.decoder-depth 1 "
        "--model.decoder-num-heads 4"
    )
    foreign = tmp_path / "other.safetensors"
    foreign.write_bytes(b"not safetensors at all")
    other = ["--name", "other", "--model.checkpoint", str(foreign)]
    answer = mistake(capsys, "train", "itpn-pixel_nano", *arguments, *other)
    assert "is corrupt" in answer
    changed = mistake(capsys, "train", "itpn-pixel_nano", *arguments, *small, "--optimizer.lr", "1")
    assert "holds a run with --optimizer.lr None, not 1.0; choose another --name" in changed


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--help"], ["list"], ["predict", "--help"], ["evaluate", "classifier_small", "--help"]),
        *(["train", "itpn-pixel_nan"], ["train", "itpn-pixel_nano", "--lr", "1"], ["export", "a", "--ou", "b"]),
    ],
)
def test_answers_come_at_once(arguments):
    """None of them waits for the import of torch, which takes seconds."""
    command = [sys.executable, "-X", "importtime", "-m", "itpn", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "itpn.tasks.recipe_files" in imported
    assert not imported & {"torch", "torchvision", "lightning", "timm", "tensorboard"}


def test_connections_are_closed_before_the_interpreter_ends(tmp_path):
    """Else a thread of torch's aborts the process now and then, and torchrun takes a complete run for a failed one."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        assert main(["list"]) == 0
        assert not torch.distributed.is_initialized()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("command", [["demo"], ["train", "itpn-pixel_nano"]])
@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (None, 1)],
    ids=["ctrl-c", "terminated", "not finite"],
)
def test_exit_codes(monkeypatch, photos, tmp_path, capsys, command, signum, code):
    def train(*args):
        if signum is None:
            raise NonFiniteLoss("loss is nan")
        stop = RunStopped(signum)
        stop.reported = True  # as the training loop leaves it
        raise stop

    monkeypatch.setattr("itpn.tasks.run.train", train)
    monkeypatch.setattr("itpn.tasks.demo.train_side_by_side", train)
    monkeypatch.setattr("itpn.tasks.demo.write_shapes", lambda root, **_: ShapesFolders(root, root, root))
    where = ["--data.root", str(photos)] if command[0] == "train" else ["--output-dir", str(tmp_path)]
    assert main([*command, *where]) == code
    assert capsys.readouterr().err == ("itpn: loss is nan\n" if code == 1 else "")


@pytest.mark.parametrize("columns", ["1", "2", "5", "19"])
@pytest.mark.parametrize("words", [["train", "--help"], ["train", "itpn-pixel_nano", "--help"], ["predict"], ["list"]])
def test_a_narrow_window(columns, words):
    command = [sys.executable, "-m", "itpn", *words]
    wide, narrow = (
        subprocess.run(command, env={**os.environ, "COLUMNS": c}, capture_output=True, text=True, timeout=30)
        for c in ("20", columns)
    )
    assert (narrow.returncode, narrow.stdout, narrow.stderr) == (wide.returncode, wide.stdout, wide.stderr)
    assert wide.stdout or wide.stderr


def test_quick_commands_do_not_import_torch():
    code = (
        "import sys; from itpn.cli import main;"
        "main(['list']); main(['train', 'x']); main(['train', 'itpn-pixel_nano', '--x']);"
        "main(['train', 'itpn-pixel_nano', '--data.root', 'nowhere']); main(['shrink', 'nowhere', '--out', 'x']);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_list_names_every_recipe(capsys):
    assert main(["list"]) == 0
    names = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    published = {
        f"itpn-pixel_hivit-{size}-p16_8xb512-amp-coslr-{epochs}e_in1k"
        for size in ("base", "large")
        for epochs in (400, 800, 1600)
    }
    assert published | {"itpn-pixel_nano", "itpn-pixel_tiny", "itpn_base", "hivit_tiny"} <= names
    assert main(["list", "nano"]) == 0
    assert {"itpn-pixel_nano", "itpn_nano"} <= {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert main(["list", "*pixel*large*800e*"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2  # and the header


def test_info_of_clip_supervision(capsys):
    """The student alone, its teacher apart, and where the 233 M of mmpretrain's table come from."""
    assert main(["info", "itpn-clip-b_hivit-base-p16_8xb256-amp-coslr-800e_in1k"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "83.70 M: backbone" in text
    assert "vit_base_patch16_clip_quickgelu_224.openai: 86.19 M, frozen" in text
    assert "mmpretrain's table has 233 M for this: 83.70 and 149.62 of the whole CLIP" in text


def test_no_weights_are_published():
    with pytest.raises(UserError, match=r"no weights are published.*PATH.*hf-hub:") as error:
        itpn.get_model("itpn-clip-b_hivit-base-p16_8xb256-amp-coslr-800e_in1k", pretrained=True)
    assert "\n" not in str(error.value)


def test_weights_of_a_hub(tmp_path, monkeypatch):
    """A repository's model.safetensors, or one line."""
    import huggingface_hub

    def download(repository, filename):
        assert repository == "lab/birds"
        if filename == "config.json":
            raise huggingface_hub.errors.EntryNotFoundError("no such file")
        assert filename == "model.safetensors"
        return str(tmp_path / "model.safetensors")

    recipe, config = read_recipe("itpn-mfm_nano")
    torch.manual_seed(0)
    model = itpn.get_model(recipe)
    save_weights(tmp_path / "model.safetensors", model, recipe, config)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, name: name)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    again = itpn.get_model(recipe, pretrained="hf-hub:lab/birds")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))

    def offline(repository, filename):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(UserError, match=r"hf-hub:lab/birds \(ConnectionError: no route to host\)"):
        itpn.get_model(recipe, pretrained="hf-hub:lab/birds")


def test_a_hub_out_of_reach_is_one_line(photos, tmp_path, capsys, monkeypatch):
    """Asking for CLIP without a network: the model, what to give instead, the option; and no run folder."""
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", offline)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: None)
    arguments = ["--data.root", str(photos), "--output-dir", str(tmp_path / "runs")]
    assert main(["train", "itpn-clip-b_hivit-base-p16_8xb256-amp-coslr-300e_in1k", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in ("vit_base_patch16_clip_quickgelu_224.openai", "OpenAI CLIP", "--teacher.checkpoint FILE"):
        assert part in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("size", "parameters", "flops"), [("base", "102.68", 18.47), ("large", "314.25", 63.98)])
def test_info_of_the_published_recipes(capsys, size, parameters, flops):
    assert main(["info", f"itpn-pixel_hivit-{size}-p16_8xb512-amp-coslr-800e_in1k"]) == 0
    out = capsys.readouterr().out
    assert f"{parameters} M" in out
    printed = next(line for line in out.splitlines() if "MACs" in line).split("│")[2].split()[0]
    assert float(printed) == pytest.approx(flops, rel=0.005)


def test_info_of_a_moving_average(capsys):
    assert main(["info", "itpn-mfm_tiny"]) == 0
    out = capsys.readouterr().out
    assert "0.48 G for a forward pass in training, 75% masked" in out
    assert "1.04 G for that of the EMA teacher, nothing masked" in out


def test_tools_and_the_command_do_the_same(tmp_path, photos, monkeypatch):
    """The original command line's form with a recipe's file, and ours with its name, also away from the checkout."""
    recipe = ROOT / "configs/itpn/itpn-pixel_nano.py"
    options = ["--data.root", str(photos), "--data.batch-size", "4", "--data.num-workers", "0", "--data.img-size", "32"]
    options += ["--trainer.max-steps", "2", "--output-dir", str(tmp_path / "runs")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    tool = [sys.executable, str(ROOT / "tools/train.py"), str(recipe), *options, "--name", "tool"]
    subprocess.run(tool, check=True, cwd=tmp_path, env=env, capture_output=True)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "itpn-pixel_nano", *options, "--name", "command"]) == 0
    runs = tmp_path / "runs/itpn-pixel_nano"
    assert (runs / "tool/metrics.csv").read_text().splitlines()[-1].split(",")[:4] == (
        runs / "command/metrics.csv"
    ).read_text().splitlines()[-1].split(",")[:4]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["list"], 1), (["info", "itpn_nano"], 1), (["train", "itpn-pixel_nano", "--help"], 1), (["inspect", "x.pt"], 2)],
)
def test_output_that_cannot_be_written(capsys, monkeypatch, arguments, code):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert main(arguments) == code
    no_room = "itpn: standard output cannot be written: No space left on device\n"
    assert capsys.readouterr().err == (no_room if code == 1 else "itpn: checkpoint x.pt does not exist\n")
    if code == 2:
        with open("/dev/full", "w") as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", full)
            assert main(arguments) == code


def test_closed_output():
    done = subprocess.run(
        [sys.executable, "-m", "itpn", "train", "itpn-pixel_nano", "--help"], preexec_fn=_close_stdout
    )
    assert done.returncode == 0


def _close_stdout() -> None:
    os.close(1)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_during_imports(signum):
    """Modules of C code that are imported just then raise errors of their own, and numpy recursed without end."""
    command = [sys.executable, "-c", INTERRUPTED, str(int(signum)), "info", "itpn_nano"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == f"itpn: stopped by {signum.name}; files that were not complete are not kept\n"
    assert done.returncode == 128 + signum


def test_a_signal_waits_for_the_import_at_hand(tmp_path, monkeypatch):
    module = "import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2); whole = True"
    (tmp_path / "signalled.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)

    def wait() -> None:
        importlib.import_module("signalled")
        time.sleep(10)

    with pytest.raises(RunStopped), stopped_by_signals():
        wait()
    assert sys.modules.pop("signalled").whole
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_timer_of_the_caller_continues():
    signal.setitimer(signal.ITIMER_REAL, 100)
    with pytest.raises(RunStopped), stopped_by_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.setitimer(signal.ITIMER_REAL, 0)[0] > 50


@pytest.mark.parametrize("pause", [0, 0.2])
def test_a_stop_that_is_passed_over_leaves_no_timer(tmp_path, monkeypatch, pause):
    """Of several processes, one of which has failed."""
    (tmp_path / "signalled.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")

    def fail() -> None:
        importlib.import_module("signalled")
        raise ValueError

    with stopped_by_signals():
        try:
            fail()
        except ValueError:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(pause)  # the timer of the first signal ends, or does not
    del sys.modules["signalled"]
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


class Signals:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)


def test_a_signal_is_not_lost_where_nothing_can_be_raised(capsys):
    def wait() -> None:
        Signals()
        time.sleep(10)

    hook = sys.unraisablehook
    with pytest.raises(RunStopped), stopped_by_signals():
        wait()
    assert sys.unraisablehook is hook
    assert capsys.readouterr().err == ""


# an import that answers a signal with an error of its own
INTERRUPTED = """
import builtins, os, sys

signum, load = int(sys.argv.pop(1)), builtins.__import__

def fail(name, *arguments):
    if name != "torch":
        return load(name, *arguments)
    try:
        os.kill(os.getpid(), signum)
    except BaseException as error:
        raise ImportError("numpy.core.multiarray failed to import") from error

from itpn.cli import main

builtins.__import__ = fail
sys.exit(main())
"""
