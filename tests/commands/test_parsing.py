"""Words as commands and settings: what is understood, what the help lists, and one clear line for what is wrong."""

import io
import re
from pathlib import Path

import pytest

from itpn.cli import COMMANDS, main
from itpn.commands.export import Export
from itpn.commands.parsing import parse, parse_with_recipe, read_fields
from itpn.commands.predict import Predict
from itpn.commands.train import Train
from itpn.errors import UserError
from itpn.tasks.configs import PretrainingConfig
from itpn.tasks.recipe_files import read_recipe


def show_help(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_words_of_a_command():
    words = [
        "a.pt",
        "x",
        "y",
        "--out=o",
        "--min_score",
        "0.25",
        "--data.members",
        "jpg",
        "seg.png",
        "--max-pixels",
        "9",
    ]
    command = parse(Predict, words, "itpn predict")
    assert (command.checkpoint, command.images, command.out) == ("a.pt", ("x", "y"), Path("o"))
    assert (command.min_score, command.members, command.max_pixels) == (0.25, ("jpg", "seg.png"), 9)
    assert parse(Predict, ["--members", "all", "--seed", "1", "a.pt", "x"], "itpn predict").seed == 1


@pytest.mark.parametrize(("words", "size"), [(["64"], 64), (["64", "96"], (64, 96))])
def test_a_side_or_height_and_width(words, size):
    assert parse(Export, ["a.pt", "--out", "a.onnx", "--img-size", *words], "itpn export").img_size == size


def test_switches_alone_mean_true():
    config = PretrainingConfig()
    given = ["--trainer.compile", "--data.hflip", "0", "--model.grad_checkpointing", "--model.rel-pos-bias", "False"]
    parsed = parse(PretrainingConfig, given, "itpn", config)
    assert parsed.trainer.compile is True
    assert parsed.model.grad_checkpointing is True
    assert parsed.model.rel_pos_bias is False
    given = ["--model.grad-checkpointing", "selective", "--trainer.compile=False", "--model.no-norm-pix-loss"]
    parsed = parse(PretrainingConfig, given, "itpn", config)
    assert parsed.model.grad_checkpointing == "selective"
    assert parsed.trainer.compile is False
    assert parsed.model.norm_pix_loss is False


def test_a_recipe_and_options_of_both_kinds():
    """In any order; what is not given is the recipe's."""
    words = ["itpn-pixel_nano", "--data.batch_size=3", "--profile", "--model.no-norm-pix-loss", "--name", "x"]
    command = parse_with_recipe(Train, words, "itpn train")
    assert command.recipe == "itpn-pixel_nano"
    assert command.profile
    assert command.given == ("--data.batch-size", "--model.no-norm-pix-loss", "--name")
    config = read_recipe("itpn-pixel_nano")[1]
    config.data.batch_size, config.model.norm_pix_loss, config.name = 3, False, "x"
    assert command.config == config


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_option(capsys, name):
    text = show_help(capsys, name)
    assert text.startswith(f"usage: itpn {name} [-h]")
    for field in read_fields(COMMANDS[name]):
        for shown in field.options or [field.usage]:
            assert shown in text
    assert "None" not in text
    assert ("--recipe FILE" in text) == (name not in ("list", "stats", "shrink", "demo"))


@pytest.mark.parametrize(
    ("command", "recipe"),
    [
        ("train", "itpn-pixel_nano"),
        ("train", "classifier_small"),
        ("evaluate", "classifier_small"),
        ("cache-features", "itpn-mfm_nano"),
    ],
)
def test_help_after_a_recipe_lists_own_options_and_settings(capsys, command, recipe):
    text = show_help(capsys, command, recipe)
    assert text.startswith(f"usage: itpn {command} {recipe} [-h]")
    for cls in (COMMANDS[command], type(read_recipe(recipe)[1])):
        for field in read_fields(cls):
            assert all(option in text for option in field.options)
    words = text.split("--data.hflip")[1].split("--")[0]
    assert "Probability of a horizontal flip" in " ".join(words.replace("│", "").split())


@pytest.mark.parametrize("words", [[name] for name in COMMANDS] + [["cache-features", "itpn-mfm_nano"]])
@pytest.mark.parametrize("columns", ["60", "80"])
def test_a_usage_is_no_wider_than_the_window(capsys, monkeypatch, words, columns):
    monkeypatch.setenv("COLUMNS", columns)
    lines = show_help(capsys, *words).splitlines()
    lines = lines[: lines.index("")]
    assert max(map(len, lines)) <= int(columns)
    usage = " ".join(map(str.strip, lines))
    for field in read_fields(COMMANDS[words[0]]) if len(words) == 1 else ():
        assert not field.usage or field.usage in usage or "OPTIONS" in usage


def test_help_of_all(capsys):
    assert main([]) == main(["--help"]) == main(["-h"]) == 0
    text = capsys.readouterr().out
    assert all(text.count(f"\n  {name} ") == 3 for name in COMMANDS)
    assert main(["--version"]) == 0
    assert re.fullmatch(r"itpn \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("predict a b --sed 1", "unknown option --sed; did you mean --seed?"),
        ("predict --sed 1 a b", "unknown option --sed; did you mean --seed?"),
        ("predict a b --feat x", "unknown option --feat; did you mean --features?"),
        ("predict a", "required: IMAGE [IMAGE ...]; usage: itpn predict CKPT IMAGE [IMAGE ...] [options]"),
        ("predict", "required: CKPT; usage: itpn predict CKPT IMAGE [IMAGE ...] [options]"),
        ("predict a b --members", "Missing value for argument '--members'."),
        ("predict a b --max-pixels x", "--max-pixels must be a whole number, not 'x'"),
        ("predict a b --min-score high", "--min-score must be a number, not 'high'"),
        ("predict a b --out=", "--out is empty: give a file or folder, or leave it out"),
        ("train itpn-pixel_nano --data.batch-size abc", "--data.batch-size must be a whole number, not 'abc'"),
        ("train itpn-pixel_nano --output-dir=", "--output-dir is empty: give a folder, or leave it out"),
        ("info itpn_nano --recipe=", "no recipe ''"),
        ("predict a -x", "unknown option -x; see --help"),
        ("inspect a b", "unexpected 'b'; usage: itpn inspect CKPT [options], and options are written --name VALUE"),
        ("list a b", "unexpected 'b'; usage: itpn list [PATTERN]"),
        ("list --recipe x.py", "unknown option --recipe; see --help"),
        ("export a --out b --levels pool", "--levels: choose from joined, pooled, pyramid; did you mean pooled?"),
        ("export a --out b --no-dynamic-size", "unknown option --no-dynamic-size; did you mean --dynamic-size?"),
        ("export a --ou b", "unknown option --ou; did you mean --out?"),
        (
            "export a --out b --img-size 1 2 3",
            "--img-size must be a whole number or two whole numbers, not '1', '2', '3'",
        ),
        ("export a --out b.onnx --img-size -8", "--img-size must be at least 1, not -8"),
        ("export a --out b.onnx --img-size 0", "--img-size must be at least 1, not 0"),
        ("export a --out b.onnx --img-size 64 1000000", "--img-size must lie between 1 and 16384, not 1000000"),
        ("train itpn-pixel_nano --optimizer.milestones", "Missing value for argument '--optimizer.milestones'."),
        ("train itpn-pixel_nano --data.root --seed 1", "Missing value for argument '--data.root'."),
        ("train segmenter_small --data.ignore", "Missing value for argument '--data.ignore'."),
        ("train itpn-pixel_nano --optimizer.milestones 0.5 0.5", "--optimizer.milestones must be rising fractions"),
        ("train itpn-pixel_nano -- --seed 1", "unexpected '--': leave it out"),
        ("predict a b --", "unexpected '--': leave it out"),
        ("train itpn-pixel_nano --trainer.no-compile", "did you mean --trainer.compile False?"),
        ("train itpn-pixel_nano --model.no-grad_checkpointing", "did you mean --model.grad-checkpointing False?"),
        ("train detector_small --model.no-masks", "did you mean --model.masks False?"),
        ("train itpn-pixel_nano --data.crop-scale a b", "--data.crop-scale must be two numbers, not 'a', 'b'"),
        ("train itpn-pixel_nano --model.pyramid-weights 1 2 x", "must be three numbers, not '1', '2', 'x'"),
        ("train itpn-pixel_nano --data.mean a", "--data.mean must be numbers, not 'a'"),
        ("train classifier_small --data.mean [a]", "--data.mean must be numbers, not '[a]'"),
        ("train segmenter_small --data.ignore nan", "--data.ignore must be whole numbers, not 'nan'"),
        ("train detector_small --data.large-scale-jitter 1", "must be two numbers, not '1'"),
        ("convert a b --to None", "--to must be 'itpn', 'official' or 'mmpretrain', not 'None'"),
        ("info foo", "no recipe or model 'foo'; see `itpn list`"),
        ("shrink --out x", "required: DIR [DIR ...]; usage: itpn shrink DIR [DIR ...] --out DIR [options]"),
        ("train --profile", "the recipe comes first: itpn train RECIPE --profile ..."),
        ("train itpn-pixel_nano --profil", "unknown option --profil; did you mean --profile?"),
        ("train itpn-pixel_nano --recipe", "Missing value for argument '--recipe'."),
        ("train itpn-pixel_nano --model.no-norm-pix-los", "did you mean --model.no-norm-pix-loss?"),
        (
            "cache-features itpn-pixel_nano",
            "required: --out DIR; usage: itpn cache-features itpn-pixel_nano --out DIR [",
        ),
        ("evaluate classifier_small --chekpoint x", "unknown option --chekpoint; did you mean --checkpoint?"),
        ("evaluate classifier_small --checkpoint a --optimizer.lr 1", "--optimizer.lr has no meaning here"),
        ("evaluate classifier_small --checkpoint a --model.checkpoint b", "give the checkpoint as --checkpoint"),
    ],
)
def test_mistakes(capsys, words, answer):
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("itpn: ")
    assert err.count("\n") == 1
    assert answer in err


def test_a_terminal_without_frames(monkeypatch, capsys):
    """tyro draws hyphens where standard output is not in UTF-8."""
    for encoding in ("ascii", "utf-8"):
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert main(["convert", "a", "b", "--to", "keras"]) == 2
        assert main(["convert", "a"]) == 2
    first, second = "invalid choice 'keras' for --to: choose from", "required: FILE; usage: itpn convert"
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith((f"itpn: {first}", f"itpn: {second}")) for line in lines] == [True] * 4


def test_choices_are_sorted():
    """tyro gives a set, in another order each time."""
    with pytest.raises(UserError) as error:
        parse(PretrainingConfig, ["--trainer.precision", "bf17"], "itpn", PretrainingConfig())
    what, choices = str(error.value).split(": ")
    assert what == "invalid choice 'bf17' for --trainer.precision"
    assert choices == "choose from 16-mixed, 32, 32-true, auto, bf16, bf16-mixed, fp16; did you mean bf16?"


@pytest.mark.parametrize(
    ("words", "seed", "members", "said"),
    [
        (["--seed", "1", "--seed=2"], 2, (), ""),
        (["--members", "jpg", "png"], None, ("jpg", "png"), ""),
        (
            ["--members", "jpg", "--data.members", "png"],
            None,
            ("png",),
            "is given twice, and the last counts: give all",
        ),
    ],
)
def test_the_last_of_repeated_options_counts(capsys, words, seed, members, said):
    """As everywhere; where one takes several values, it is said that those before are lost."""
    parsed = parse(Predict, ["a.pt", "x", *words], "itpn predict")
    assert (parsed.seed, parsed.members) == (seed, members)
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == bool(said)
