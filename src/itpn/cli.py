"""The command line. Torch is imported only by the commands that compute, so that mistakes are answered at once."""

import argparse
import contextlib
import difflib
import io
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, get_args

from itpn.checkpoints.older_settings import NAMES
from itpn.checkpoints.paths import HUB, check_file
from itpn.errors import ExportFailed, MachineError, NonFiniteLoss, RunStopped, UserError
from itpn.system.accidents import guard
from itpn.system.environment import check_environment
from itpn.system.processes import GRACE, conclude, disconnect, end_children, is_first
from itpn.system.signals import stopped_by_signals
from itpn.tasks.recipes import describe, list_recipes, nearest, read_recipe, recipe_files
from itpn.tasks.spec import load_installed_tasks, task_of
from itpn.training.config import option_types

DESCRIPTION = "Pre-train a hierarchical vision transformer together with its feature pyramid on your own images."

CACHE_DESCRIPTION = (
    "Worth it where the teacher costs more than the student and the disk holds its features: several runs or many "
    "epochs over a set that is not large, a large teacher, masked patches dropped. Training then sees the crops drawn "
    "here and no others, a view an epoch, so give several --views; for a long run over millions of images the live "
    "teacher with its fresh crops is better. A crop takes a byte for each value of its pixels and 4 (--half: 2) for "
    "each value of its features: 0.55 MB at 224 px with CLIP-B. Stopped in the middle, the same command resumes."
)

PROFILE = "take a few steps only, keep nothing of them, and say where their time goes: a summary and a trace"

SHRINK_DESCRIPTION = (
    "Worth it where decoding is what training waits for: photographs of many megapixels. 512 px suit "
    "--data.img-size 224: the smallest random crops, a fifth of the area, are then about as large. Nothing is "
    "enlarged, and upright JPEGs that are small already stay as they are. Class folders and .cls in shards are kept "
    "as labels, train and val apart. Stopped in the middle, the same command resumes."
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 when done, 1 for a run that went wrong, 2 for a mistake of the user's, 128 and its number after a signal.
    """
    from itpn.system.console import complain, finish_output, forget_remarks, silence

    forget_remarks()
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):  # its number would be that of the next file
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that a terminal cannot show ends no command
            stream.reconfigure(errors="backslashreplace")
    try:
        with stopped_by_signals(), guard():
            try:
                code = run_command(arguments)
            except SystemExit:  # --help
                finish_output()
                raise
            disconnect()
            finish_output()
            return code
    except (UserError, MachineError, NonFiniteLoss, ExportFailed) as error:
        return conclude(error)
    except RunStopped as stop:
        if not stop.told and is_first():
            complain(f"stopped by {stop}; files that were not complete are not kept")
        end_children(GRACE)
        disconnect()
        return 128 + stop.signum
    except KeyboardInterrupt:
        end_children(GRACE)
        return 130
    except BrokenPipeError:  # `itpn list | head`
        silence(sys.stdout)
        return 0
    except BaseException:
        end_children(0)
        raise


def run_command(arguments: list[str]) -> int:
    if holding := next((argument for argument in arguments if "\0" in argument), None):
        raise UserError(f"{holding!r} holds a zero byte, which no name of a file can have")
    check_environment()
    arguments = import_task(arguments)
    if len(arguments) > 1 and arguments[0] in WITH_CONFIG and not arguments[1].startswith("-"):
        return WITH_CONFIG[arguments[0]](arguments[1], arguments[2:])  # options come from the recipe's config
    if len(arguments) > 1 and arguments[0] in WITH_CONFIG and arguments[1] not in ("-h", "--help"):
        raise UserError(f"the recipe comes first: itpn {arguments[0]} RECIPE {arguments[1]} ...")
    parser = make_parser()
    names = [*WITH_CONFIG, *COMMANDS]
    if arguments and not arguments[0].startswith("-") and arguments[0] not in names:
        raise UserError(f"no command {arguments[0]!r}{nearest(arguments[0], names)} (see itpn --help)")
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    if options.command not in ("list", "demo", "shrink"):
        load_installed_tasks()  # whose checkpoints may be named
    return COMMANDS[options.command](options)


def import_task(arguments: list[str]) -> list[str]:
    """Import the recipe file of a task of the user's own, `--recipe FILE`, which registers it.

    Returns:
        The other arguments.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    _add_recipe(parser)
    for index, argument in enumerate(arguments):
        if argument.partition("=")[0] == "--recipe":
            own, rest = parser.parse_known_args(arguments[index:])
            read_recipe(own.recipe)
            return [*arguments[:index], *rest]
    return arguments


def make_parser() -> argparse.ArgumentParser:
    from itpn import __version__

    parser = _Parser(prog="itpn", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"itpn {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND", parser_class=_Parser)

    add = commands.add_parser("list", help="recipes and models")
    add.add_argument(
        "pattern", nargs="?", default="*", help="a part of the name, or a shell pattern, e.g. '*base*800e*'"
    )

    add = commands.add_parser("info", help="parameters, MACs and shapes of a recipe or model")
    add.add_argument("name", help="a name of `itpn list`, or a recipe file")
    add.add_argument("--checkpoint", help="gives the network of a recipe that takes it from one")

    add = commands.add_parser(
        "train",
        help="train a recipe; `itpn train RECIPE --help` lists every option",
        usage="itpn train RECIPE|FILE.py|config.yaml [--profile] [options]",
        description="Every field of a recipe's config is an option: `itpn train RECIPE --help` lists them.",
    )
    add.add_argument("recipe", help="a name of `itpn list`, a recipe file, or the config.yaml of a run")
    _add_training_options(add)

    add = commands.add_parser(
        "cache-features",
        help="run a recipe's teacher once over the images, into shards to train from",
        usage="itpn cache-features RECIPE|FILE.py --out DIR [--views N] [--half] [options of itpn train]",
        description=CACHE_DESCRIPTION,
    )
    add.add_argument("recipe", help="a name of `itpn list` with an outside teacher, or a recipe file")
    _add_cache_options(add)

    add = commands.add_parser(
        "shrink",
        help="images far larger than needed, once into shards of small ones to train from",
        description=SHRINK_DESCRIPTION,
    )
    add.add_argument("images", nargs="+", metavar="DIR", help="folders of images, or of tar shards")
    add.add_argument("--out", required=True, metavar="DIR", help="folder for the shards: the --data.root of training")
    add.add_argument(
        "--short-side", type=int, default=512, metavar="PX", help="height or width, the shorter (default: %(default)s)"
    )
    add.add_argument("--quality", type=int, default=95, help="of the JPEGs, 1 to 100 (default: %(default)s)")
    add.add_argument("--shard-size", type=int, default=512, metavar="N", help="images in each (default: %(default)s)")
    add.add_argument("--num-workers", type=int, metavar="N", help="processes that shrink (default: one for each core)")
    _add_members(add)
    _add_max_pixels(add, "left out (default: 2**27)")

    add = commands.add_parser(
        "evaluate",
        help="metrics of a classifier, detector or segmenter on labelled images",
        usage="itpn evaluate RECIPE|FILE.py --checkpoint CKPT [--out DIR] [--knn] [options of itpn train]",
        description="The recipe says where the images are (--data.root); sizes and normalisation are the checkpoint's.",
    )
    add.add_argument("recipe", help="a recipe of `itpn list` for its task, a recipe file, or a run's config.yaml")
    _add_evaluation_options(add)

    add = commands.add_parser("predict", help="reconstruct, classify or detect, or write features")
    add.add_argument("checkpoint", help="a checkpoint of iTPN, Fast-iTPN or HiViT, see itpn inspect")
    add.add_argument("images", nargs="+", help="image files, tar shards or folders of either")
    add.add_argument("--out", help="folder for the results (default: the first new of predictions, predictions-2, ...)")
    add.add_argument("--seed", type=int, default=0, help="of the masks of a pre-training model (default: %(default)s)")
    add.add_argument("--min-score", type=float, default=0.5, help="of objects, above 0.05 (default: %(default)s)")
    add.add_argument("--features", metavar="FILE", help="write features to this .safetensors or .npy file instead")
    _add_members(add)
    _add_max_pixels(add, "skipped (default: the checkpoint's setting)")
    _add_recipe(add)

    add = commands.add_parser("inspect", help="what a checkpoint is, and what it can be used for")
    add.add_argument("checkpoint", help="a file of itpn, timm, the authors or mmpretrain, or hf-hub:OWNER/NAME")
    _add_recipe(add)

    add = commands.add_parser("convert", help="a checkpoint from one code base's names to another's")
    add.add_argument("source", help="a checkpoint that itpn inspect knows")
    add.add_argument("target", help=".safetensors for itpn's form, .pth or .pt for the others")
    add.add_argument("--to", choices=("itpn", "official", "mmpretrain"), help="whose names (a .safetensors: itpn)")
    _add_heads(add)

    add = commands.add_parser("export", help="a network as a file that runs without itpn: ONNX or torch.export")
    add.add_argument("checkpoint", help="a checkpoint that itpn inspect knows")
    add.add_argument("--out", required=True, metavar="FILE", help=".onnx, or .pt2 for torch.export")
    add.add_argument(
        "--task",
        help="a task, whose outputs are computed, `pyramid` or `backbone`, for maps (default: the first that the file "
        "has and that can be exported)",
    )
    add.add_argument(
        "--levels",
        choices=("pyramid", "pooled", "joined"),
        help="maps of a pyramid: strides 4 to 16, 4 to 64 for a detector, or joined with the stages, 4 to 32",
    )
    add.add_argument(
        "--img-size",
        type=int,
        nargs="+",
        metavar="PX",
        help="side of the images, or height and width (default: the file's)",
    )
    add.add_argument("--dynamic-size", action="store_true", help="any height and width; the batch is always open")
    _add_heads(add)
    _add_recipe(add)

    add = commands.add_parser("demo", help="the whole story on generated images: pre-train, classify, detect, segment")
    add.add_argument("--output-dir", default="runs/demo", help="where everything goes (default: %(default)s)")
    return parser


# messages speak of the second names, which training has


def _add_members(parser: argparse.ArgumentParser) -> None:
    names = "--members", "--data.members"
    what = "of tar shards, endings of the images to read, as jpg or seg.png, or all (default: a sample's plain image)"
    parser.add_argument(*names, nargs="+", default=(), metavar="ENDING", help=what)


def _add_max_pixels(parser: argparse.ArgumentParser, what: str) -> None:
    names = "--max-pixels", "--data.max-pixels"
    parser.add_argument(*names, type=int, metavar="N", help=f"images of more pixels are {what}")


def _check_max_pixels(options: argparse.Namespace) -> int | None:
    limit: int | None = options.max_pixels
    if limit is not None and limit < 1:
        raise UserError(f"--max-pixels must be at least 1, not {limit}")
    return limit


def _add_heads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-heads", type=int, help="attention heads, where the file cannot tell them (itpn inspect)")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    help = "the recipe file that registers the checkpoint's task, where that is one of your own"
    parser.add_argument("--recipe", metavar="FILE", help=help)


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", action="store_true", help=PROFILE)


def _add_cache_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="folder for the shards; give it as --data.root to train from them")
    parser.add_argument("--views", type=int, default=1, help="crops of each image, each an epoch's (default: 1)")
    parser.add_argument("--half", action="store_true", help="features in 16 bits: half the space, not the very numbers")


def _add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a checkpoint that `itpn inspect` knows")
    parser.add_argument("--out", help="folder for metrics and plots (default: `evaluation` beside the checkpoint)")
    parser.add_argument("--knn", action="store_true", help="evaluate features by k-NN among the training images")


# what evaluation goes by, beside the checkpoint and what a task adds
EVALUATION = (
    *("--evaluation.", "--data.num-workers", "--data.max-pixels", "--seed"),
    *("--trainer.precision", "--trainer.accelerator", "--trainer.devices", "--trainer.num-nodes", "--model.num-heads"),
)


def run_evaluate(recipe: str, options: list[str]) -> int:
    name, config = read_recipe(recipe)
    task = task_of(config)
    if task.resolve_evaluation is None:
        raise UserError(f"{recipe} is a recipe of {task.name}: give one of a classifier, detector or segmenter")
    parser = _Parser(prog=f"itpn evaluate {recipe}", add_help=False)
    _add_evaluation_options(parser)
    if "--help" in options or "-h" in options:
        make_parser().parse_args(["evaluate", "--help"])
    own, rest = parser.parse_known_args(options)
    if own.knn and not task.knn:
        raise UserError("--knn is for classes of images: give a recipe of a classifier")
    config = parse_options(config, rest, f"itpn evaluate {recipe}", ("--checkpoint", "--out", "--knn"))
    for option in rest:
        if option.startswith("--model.checkpoint"):
            raise UserError("give the checkpoint as --checkpoint, not as --model.checkpoint")
        known = (*EVALUATION, *task.evaluation_options)
        if option.startswith("--data.img-size") and "--data.test-size" in known:
            raise UserError("images are evaluated at the checkpoint's size: give --data.test-size for another")
        if option.startswith("--") and not option.replace("_", "-").startswith(known):
            raise UserError(f"{option} has no meaning here: the network is the checkpoint's, and it is not trained")
    check_file(own.checkpoint)
    config = replace(config, model=replace(config.model, checkpoint=own.checkpoint, scratch=False))
    config.check()
    out = Path(own.out) if own.out else _evaluation_folder(own.checkpoint, own.knn)
    given = {option.partition("=")[0].removeprefix("--data.").removeprefix("no-").replace("-", "_") for option in rest}
    from itpn.commands.evaluate import evaluate

    evaluate(task, config, name, own.checkpoint, out, given, own.knn)
    return 0


def _evaluation_folder(checkpoint: str, knn: bool) -> Path:
    """Beside the checkpoint, so that evaluations of two do not overwrite each other."""
    path = Path(checkpoint)
    words = ["evaluation", *(["knn"] if knn else [])]
    if checkpoint.startswith(HUB):
        return Path("-".join([checkpoint.removeprefix(HUB).replace("/", "-"), *words]))
    if path.is_dir():
        return path / "-".join(words)
    return path.parent / "-".join([*([] if path.name == "model.safetensors" else [path.stem]), *words])


def run_cache_features(recipe: str, options: list[str]) -> int:
    config = read_recipe(recipe)[1]
    parser = _Parser(prog=f"itpn cache-features {recipe}", add_help=False)
    _add_cache_options(parser)
    if "--help" in options or "-h" in options:
        make_parser().parse_args(["cache-features", "--help"])
    own, rest = parser.parse_known_args(options)
    config = parse_options(config, rest, f"itpn cache-features {recipe}", ("--out", "--views", "--half"))
    task = task_of(config)
    if task.cache_features is None:
        raise UserError(f"{recipe} is a recipe of {config.task}, which has no teacher")
    source = check_early(config)
    if source.cache:
        raise UserError(f"{source.cache} holds cached features already: give the images as --data.root")
    task.cache_features(config, source, Path(own.out), own.views, own.half)
    return 0


def run_shrink(options: argparse.Namespace) -> int:
    from itpn.data.files import find_splits

    for name, most in (("short_side", None), ("shard_size", None), ("quality", 100)):
        value = getattr(options, name)
        if value < 1 or (most and value > most):
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} must be {f'between 1 and {most}' if most else 'at least 1'}, not {value}")
    if options.num_workers is not None and options.num_workers < 0:
        raise UserError(f"--num-workers must be at least 0, not {options.num_workers}")
    max_pixels = _check_max_pixels(options)
    if not options.out or not all(options.images):
        raise UserError("a folder's name is empty: give the images as DIR and the folder for the shards as --out")
    out = Path(os.path.realpath(options.out))
    for root in options.images:
        place = Path(os.path.realpath(root))
        if place == out or out in place.parents or place in out.parents:
            raise UserError(f"--out {options.out} and {root} overlap: choose an --out beside it")
    splits = find_splits(options.images, options.members)
    from itpn.commands.shrink import shrink
    from itpn.data.decode import MAX_PIXELS

    sizes = options.short_side, options.quality, options.shard_size
    shrink(splits, Path(options.out), *sizes, options.num_workers, max_pixels or MAX_PIXELS)
    return 0


def run_train(recipe: str, options: list[str]) -> int:
    name, config = read_recipe(recipe)
    parser = _Parser(prog=f"itpn train {recipe}", add_help=False, allow_abbrev=False)
    _add_training_options(parser)
    own, rest = parser.parse_known_args(options)
    config = parse_options(config, rest, f"itpn train {recipe}", ("--profile",), f"{DESCRIPTION} --profile: {PROFILE}.")
    source = check_early(config)
    from itpn.tasks.run import train

    if own.profile:
        from itpn.training.profiling import profile

        train(config, name, source, profile)
    else:
        train(config, name, source)
    return 0


def parse_options(
    config: Any, options: list[str], prog: str, others: Sequence[str] = (), description: str = DESCRIPTION
) -> Any:
    """Override settings from the command line; ``others`` are options of the command itself.

    Raises:
        UserError: an unknown option (the nearest is named) or a value of the wrong type.
    """
    import tyro

    from itpn.system.console import lost_answer

    complaints = io.StringIO()
    options = _say_true(options, option_types(type(config)))
    try:
        with contextlib.redirect_stderr(complaints):
            parsed, unknown = tyro.cli(
                type(config), default=config, args=options, prog=prog, return_unknown_args=True, description=description
            )
    except OSError as error:
        raise lost_answer(error) from error
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        raise UserError(_one_line(complaints.getvalue())) from None
    if unknown:
        raise UserError(_unknown_option(unknown[0], [*others, *option_types(type(config))]))
    return parsed


def _say_true(options: list[str], types: dict[str, Any]) -> list[str]:
    """`--trainer.compile` alone means True, as it does for a setting that can be nothing but True and False."""
    said = []
    for option, following in itertools.zip_longest(options, options[1:], fillvalue="--"):
        said.append(option)
        if bool in get_args(types.get(option.replace("_", "-"))) and following.startswith("--"):
            said.append("True")
    return said


def _one_line(box: str) -> str:
    """tyro's framed message as one line: what is wrong, without the repeated help."""
    lines = [re.sub(r"[│╭╮╰╯]", "", line).strip() for line in box.splitlines()]
    message = []
    for line in lines[1:]:
        if line.startswith("─"):
            break
        message.append(line)
    text = re.sub(r"\[/?bold\]", "", " ".join(message)).partition(" Got errors:")[0]
    return text.strip() or "the options could not be understood"


def _unknown_option(option: str, known: list[str]) -> str:
    option = option.partition("=")[0]
    if not option.startswith("--"):
        return f"unexpected {option!r}: options are written --section.name VALUE"
    # "--batch-size" is meant as often as "--data.batchsize": compare whole names and last parts
    by_last = {name.rpartition(".")[2].removeprefix("--"): name for name in known}
    last = option.rpartition(".")[2].removeprefix("--").replace("_", "-")
    near = [name for name in known if name == _rename(option)]
    near = near or difflib.get_close_matches(option.replace("_", "-"), known, n=1, cutoff=0.8)
    near = near or [by_last[match] for match in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]
    near = near or difflib.get_close_matches(option, known, n=1, cutoff=0.4)
    return f"unknown option {option}" + (f"; did you mean {near[0]}?" if near else "; see --help")


def _rename(option: str) -> str:
    """An option of an older version, under today's name."""
    section, _, name = option.removeprefix("--").replace("-", "_").partition(".")
    return f"--{section}.{NAMES.get(section, {}).get(name, name)}".replace("_", "-")


def check_early(config: Any) -> Any:
    """What can be found wrong before torch is imported.

    Returns:
        What the task's ``check_data`` found.

    Raises:
        UserError: impossible settings, an unknown model, a folder that is missing or without images.
    """
    from itpn.models.variants import BACKBONES

    config.check()
    name = config.model.name
    if name is not None and name not in BACKBONES:
        raise UserError(f"no model {name!r}{nearest(name, list(BACKBONES))}; see `itpn list`")
    check = task_of(config).check_data
    return None if check is None else check(config)


def run_list(options: argparse.Namespace) -> int:
    import fnmatch

    from rich.table import Table

    from itpn.models.variants import BACKBONES, WITH_PYRAMID
    from itpn.system.console import Answer

    files = recipe_files()
    # a bare word means any name with it inside
    pattern = options.pattern if set(options.pattern) & set("*?[") else f"*{options.pattern}*"
    known = [*BACKBONES, *WITH_PYRAMID.values()]
    recipes, models = list_recipes(pattern), fnmatch.filter(known, pattern)
    if not recipes and not models:
        raise UserError(f"no recipe or model matches {options.pattern!r}{nearest(options.pattern, [*files, *known])}")
    table = Table("recipe", "what", box=None, pad_edge=False, header_style="bold")
    for recipe in recipes:
        table.add_row(recipe, describe(files[recipe]))
    for model in models:
        table.add_row(model, describe_model(model))
    # names must survive a narrow window or a pipe in one piece
    Answer(width=None if sys.stdout and sys.stdout.isatty() else 200).print(table, highlight=False)
    return 0


def describe_model(name: str) -> str:
    """A line of `itpn list`."""
    from itpn.models.variants import BACKBONES, FAST

    if name not in BACKBONES:
        return f"model: {name.removesuffix('_pyramid')} and its pyramid, maps for detectors and segmenters"
    settings = BACKBONES[name]
    shown = ", ".join(f"{key} {value}" for key, value in settings.items() if key not in FAST)
    return f"model: {shown}{', Fast-iTPN' if settings.keys() >= FAST.keys() else ''}"


def run_info(options: argparse.Namespace) -> int:
    from itpn.models.variants import BACKBONES, WITH_PYRAMID

    config = None
    known = [*BACKBONES, *WITH_PYRAMID.values()]
    if options.name not in known:
        files = recipe_files()
        if options.name not in files and not Path(options.name).is_file():
            raise UserError(f"no recipe or model {options.name!r}{nearest(options.name, [*files, *known])}")
        config = read_recipe(options.name)[1]
    from itpn.commands.info import print_info

    if config is None and options.checkpoint is not None:
        raise UserError("--checkpoint is for recipes; `itpn inspect` tells what a checkpoint is")
    print_info(options.name, config, options.checkpoint)
    return 0


def run_predict(options: argparse.Namespace) -> int:
    from itpn.data.files import find_images

    if not 0 <= options.min_score <= 1:
        raise UserError(f"--min-score must lie between 0 and 1, not {options.min_score}")
    source = find_images(options.images, options.members)
    check_file(options.checkpoint)
    features = None if options.features is None else Path(options.features)
    if features is not None and features.suffix not in (".safetensors", ".npy"):
        raise UserError(f"--features {features} must end in .safetensors or .npy")
    from itpn.commands.predict import predict

    out = None if options.out is None else Path(options.out)
    predict(options.checkpoint, source, out, options.seed, features, options.min_score, _check_max_pixels(options))
    return 0


def run_inspect(options: argparse.Namespace) -> int:
    check_file(options.checkpoint)
    from itpn.commands.inspect import print_report

    print_report(options.checkpoint)
    return 0


def run_convert(options: argparse.Namespace) -> int:
    check_file(options.source)
    from itpn.checkpoints.convert import convert
    from itpn.system.console import Output

    done = convert(options.source, Path(options.target), options.to, options.num_heads)
    lines = [f"{options.target}: {done.count} tensors under the names of {done.form}"]
    parts = Counter(name.partition(".")[0] for name in done.left)
    for part, count in parts.items():
        lines.append(f"left out, for it has no place there: {part} ({count} tensor{'s' * (count != 1)})")
    for name, value in done.unsaid.items():
        lines.append(f"names and shapes do not say {name}={value!r}: set it in the code that reads the file")
    if done.nonfinite:
        count = sum(done.nonfinite.values())
        lines.append(f"{count} infinite numbers or NaN were kept as they are, in {', '.join(done.nonfinite)}")
    for line in lines:
        Output().print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def run_export(options: argparse.Namespace) -> int:
    check_file(options.checkpoint)
    if options.img_size is not None and len(options.img_size) > 2:
        raise UserError(f"--img-size takes a side, or height and width, not {len(options.img_size)} numbers")
    if options.levels and options.task not in (None, "pyramid"):
        raise UserError(f"--levels is for --task pyramid, not {options.task}")
    from itpn.commands.export import export_checkpoint
    from itpn.tasks.export import check_out

    out = Path(options.out)
    check_out(out)
    task: Any = "pyramid" if options.levels else options.task
    overrides = {name: getattr(options, name) for name in ("levels", "num_heads") if getattr(options, name) is not None}
    size = None if options.img_size is None else (options.img_size[0], options.img_size[-1])
    export_checkpoint(options.checkpoint, out, task, size, options.dynamic_size, **overrides)
    return 0


def run_demo(options: argparse.Namespace) -> int:
    from itpn.tasks.demo import demo

    demo(Path(options.output_dir))
    return 0


WITH_CONFIG = {"train": run_train, "evaluate": run_evaluate, "cache-features": run_cache_features}
COMMANDS = {
    "list": run_list,
    "info": run_info,
    "shrink": run_shrink,
    "predict": run_predict,
    "inspect": run_inspect,
    "convert": run_convert,
    "export": run_export,
    "demo": run_demo,
}
